"""Deterministic shuffling: maps (seed, epoch, stream) to the sequence of documents that stream reads.

The unit of shuffling is a row group; a corpus with few row groups has each cut into slices, so that every stream gets
some. Each epoch permutes all slices and deals them to the streams round-robin, so a position in the data is three
integers: (epoch, slice, document). Resuming needs nothing else.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from nanochat.common import BadShard, warn
from nanochat.data.batches import seeded_rng
from nanochat.data.corpus import Corpus, NoText

MIN_SLICES_PER_STREAM = 8  # in an epoch
CACHE_BYTES = 256 * 2**20  # of text or tokens, in row groups kept for the next visit
PREFETCH_SLICES = 3  # of each stream
FEW_ROW_GROUPS = 4  # a corpus with no more is read before its row groups are cut into slices
PERMUTATION_CACHE = 2**18  # slices, of epochs besides the last four
MAX_SEGMENT_CHARS = 2**20  # a longer document is tokenised in several segments
ORDER_OF_SLICES, ORDER_IN_ROW_GROUP = 1, 2  # purposes of random numbers (batches.seeded_rng)


class Tokens:
    """A segment tokenised beforehand. len() is its characters, as of the text; getsizeof the memory it takes."""

    __slots__ = ("characters", "ids")

    def __init__(self, ids: np.ndarray, characters: int) -> None:
        self.ids, self.characters = ids, characters

    def __len__(self) -> int:
        return self.characters

    def __sizeof__(self) -> int:
        return 200 + self.ids.nbytes


class SegmentReader:
    """Reads the row groups of a corpus as segments: documents, the very long ones split."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def read(self, split: str, index: int) -> list[str | Tokens]:
        """The segments of a row group, in order."""
        return [segment for document in self.corpus.read(split, index) for segment in split_text(document.text)]

    def prefetch(self, split: str, indices: Iterable[int]) -> None:
        """Start fetching row groups that read() will need soon."""
        self.corpus.prefetch(split, indices)


class PlacedSegment(NamedTuple):
    """A segment to be trained on, as text or tokens, and where in the data it comes from."""

    text: str | Tokens
    epoch: int
    row_group: int
    number: int  # in the row group


class Visit(NamedTuple):
    """A stream's `slice_number`-th slice in `epoch`: slice `which` of a row group."""

    epoch: int
    slice_number: int
    row_group: int
    which: int


class Cursor(NamedTuple):
    """A stream's position: it reads next segment `document` of its `slice_number`-th slice in `epoch`."""

    epoch: int = 0
    slice_number: int = 0
    document: int = 0


class DocumentOrder:
    """Reads one split of a corpus for any number of streams, on one thread; caches row groups.

    own_streams: how many of the streams are read through this object; bounds the cache. empty_if_bad: where bad shards
    may be skipped, read them as empty (for evaluation, which must not change what training skips).
    """

    def __init__(
        self,
        reader: SegmentReader,
        split: str,
        *,
        num_streams: int,
        own_streams: int,
        seed: int,
        empty_if_bad: bool = False,
    ) -> None:
        self.reader, self.corpus, self.split, self.num_streams = reader, reader.corpus, split, num_streams
        self.seed = seed
        self.empty_if_bad = empty_if_bad and self.corpus.bad_shards.may_skip
        self._warned: set[str] = set()  # bad shards read as empty
        self.num_row_groups = self.corpus.num_row_groups(split)
        if self.num_row_groups == 0:
            raise self._no_text()
        slices = -(-MIN_SLICES_PER_STREAM * num_streams // self.num_row_groups)
        # Without slices a row group is visited once an epoch: keep only the one each stream is at.
        self._max_cached = own_streams if slices == 1 else self.num_row_groups
        self._cache: OrderedDict[int, tuple[int, list[str | Tokens]]] = OrderedDict()  # row group -> (bytes, segments)
        self._cached_bytes = 0
        self._sizes = np.full(self.num_row_groups, -1)  # segments in each row group, -1 = not read yet
        if self.num_row_groups <= FEW_ROW_GROUPS:  # perhaps few documents, too: no more slices than there are
            slices = max(1, min(slices, max(self._size(group) for group in range(self.num_row_groups))))
        self._indices_of = lru_cache(maxsize=own_streams)(self._slice_indices)  # a slice is taken from many times
        self.set_slices(slices)

    def set_slices(self, per_row_group: int) -> None:
        """Cut each row group into so many slices, as a saved state says: the number found at the first start may have
        depended on a shard that is skipped now."""
        self.slices_per_group, self.num_slices = per_row_group, self.num_row_groups * per_row_group
        self._permutation = lru_cache(maxsize=4 + PERMUTATION_CACHE // self.num_slices)(self._make_permutation)
        self._indices_of.cache_clear()

    def take(
        self, stream: int, cursor: Cursor, max_documents: int, max_chars: int
    ) -> tuple[list[PlacedSegment], Cursor]:
        """The stream's next segments and the cursor after them: at least one, never across the end of an epoch.

        Stops once there are max_documents, or max_chars characters. Raises NoText if the split has none.
        """
        taken: list[PlacedSegment] = []
        chars = 0
        epoch, number, document = cursor
        for visit in self._visits(stream, cursor):
            if visit.epoch > epoch:
                if taken:
                    break
                if not self._sizes.any():
                    raise self._no_text()
            epoch, number = visit.epoch, visit.slice_number
            for index in self._indices_of(epoch, visit.row_group, visit.which)[document:]:
                text = self._read(visit.row_group)[index]
                taken.append(PlacedSegment(text, epoch, visit.row_group, int(index)))
                chars += len(text)
                document += 1
                if len(taken) == max_documents or chars >= max_chars:
                    return taken, Cursor(epoch, number, document)
            number, document = number + 1, 0
        return taken, Cursor(epoch, number, document)

    def prefetch(self, stream: int, cursor: Cursor) -> None:
        """Start fetching the row groups that the stream reads next."""
        groups = dict.fromkeys(visit.row_group for visit in islice(self._visits(stream, cursor), PREFETCH_SLICES))
        self.reader.prefetch(self.split, [group for group in groups if group not in self._cache])

    def forget(self) -> None:
        """Drop the cache, after the corpus has begun to skip more shards."""
        self._cache.clear()
        self._cached_bytes = 0
        self._sizes[:] = np.where(self._sizes == 0, 0, -1)
        self._indices_of.cache_clear()

    def _visits(self, stream: int, cursor: Cursor) -> Iterator[Visit]:
        """The slices that a stream reads from a position on, without end. Some epochs may have none for it."""
        for epoch in count(cursor.epoch):
            own = self._permutation(epoch)[(stream - epoch) % self.num_streams :: self.num_streams]
            first = cursor.slice_number if epoch == cursor.epoch else 0
            for number in range(first, len(own)):
                yield Visit(epoch, number, *divmod(int(own[number]), self.slices_per_group))

    def _make_permutation(self, epoch: int) -> np.ndarray:
        """An epoch's slices in the order in which they are dealt to the streams, (num_slices,) int64."""
        return seeded_rng(ORDER_OF_SLICES, self.seed, epoch).permutation(self.num_slices)

    def _slice_indices(self, epoch: int, group: int, which: int) -> np.ndarray:
        """Indices in the row group of a slice's segments. Each epoch deals a row group to its slices anew."""
        size = int(self._sizes[group])
        if size < 0:
            size = len(self._read(group))
        if which >= size:
            return np.arange(0)  # fast, as there may be very many
        order = seeded_rng(ORDER_IN_ROW_GROUP, self.seed, epoch, group).permutation(size)
        return order[which :: self.slices_per_group]

    def _size(self, group: int) -> int:
        """Segments in a row group; 0 for one in a bad shard that may be skipped, which take() will raise for."""
        try:
            return len(self._read(group))
        except BadShard:
            if not self.corpus.bad_shards.may_skip:
                raise
            return 0

    def _read(self, group: int) -> list[str | Tokens]:
        """The segments of a row group, from the cache if it was read lately."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group][1]
        try:
            segments = self.reader.read(self.split, group)
        except BadShard as error:
            if not self.empty_if_bad:
                raise
            if error.shard not in self._warned:
                warn(f"not measured on: {error}")
            self._warned.add(error.shard)
            segments = []
        size = sum(map(sys.getsizeof, segments))
        self._sizes[group] = len(segments)
        self._cache[group] = size, segments
        self._cached_bytes += size
        while len(self._cache) > 1 and (self._cached_bytes > CACHE_BYTES or len(self._cache) > self._max_cached):
            self._cached_bytes -= self._cache.popitem(last=False)[1][0]
        return segments

    def _no_text(self) -> NoText:
        return NoText(f"{self.corpus.name}: there is no text in its {self.split} split; check --data")


def split_text(text: str) -> list[str]:
    """A text as segments of bounded size, nearly always one; split after white space if possible. None if empty."""
    segments, start = [], 0
    while len(text) - start > MAX_SEGMENT_CHARS:
        window = start + MAX_SEGMENT_CHARS // 2, start + MAX_SEGMENT_CHARS
        end = max(text.rfind("\n", *window), text.rfind(" ", *window)) + 1 or window[1]
        segments.append(text[start:end])
        start = end
    return [*segments, text[start:]] if text else segments
