"""Which documents a lane reads, and in which order: a pure function of (seed, epoch, lane).

A corpus is blocks of documents. Blocks are cut in parts where there are few, so that every lane gets some; a
part of a block is a unit. Each epoch has its own permutation of the units, dealt out to the lanes in turn. So a
place in the data is three integers: epoch, unit, document.
"""

import sys
from collections import OrderedDict
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from nanochat.common import BadShard, UserError
from nanochat.data.batches import seeded_rng

UNITS_PER_LANE = 8  # at least, in an epoch
CACHE_BYTES = 256 * 2**20  # of text, in blocks kept for the next visit
AHEAD_UNITS = 3  # of each lane, that are asked for before they are needed
FEW_BLOCKS = 4  # a corpus of no more is looked at before its blocks are cut in parts
KEPT_UNITS = 2**18  # of permutations, beside the last four
LONGEST_TEXT = 2**20  # characters; a longer document is tokenised piece by piece
ORDER_OF_UNITS, ORDER_IN_BLOCK = 1, 2  # purposes of random numbers


class NoText(UserError):
    """There is no document in a split, or none is left without the shards that are bad."""


class Corpus(Protocol):
    """The part of corpus.Corpus that reading needs."""

    name: str
    fingerprint: str

    def num_blocks(self, split: str) -> int: ...
    def read_block(self, split: str, index: int) -> list: ...


class Tokens:
    """A text that was tokenised before. len() is its characters, as of the text, and getsizeof the memory it takes."""

    __slots__ = ("characters", "ids")

    def __init__(self, ids: np.ndarray, characters: int) -> None:
        self.ids, self.characters = ids, characters

    def __len__(self) -> int:
        return self.characters

    def __sizeof__(self) -> int:
        return 200 + self.ids.nbytes


class Text(NamedTuple):
    """A document to be tokenised, or its tokens, and where it came from."""

    text: str | Tokens
    epoch: int
    block: int
    number: int  # in the block


class Cursor(NamedTuple):
    """A lane's place: the next document it reads is `document` of its `unit`-th unit in `epoch`."""

    epoch: int = 0
    unit: int = 0
    document: int = 0


class DocumentOrder:
    """Reads one split of a corpus for any number of lanes, one thread at a time; keeps the last blocks.

    own_lanes: how many lanes will read through this object; it bounds what is kept.
    """

    def __init__(
        self, corpus: Corpus, split: str, *, num_lanes: int, own_lanes: int, seed: int, shuffle: bool = True
    ) -> None:
        self.corpus, self.split, self.num_lanes = corpus, split, num_lanes
        self.seed, self.shuffle = seed, shuffle
        self.num_blocks = corpus.num_blocks(split)
        if self.num_blocks == 0:
            raise self._no_text()
        self.parts = -(-UNITS_PER_LANE * num_lanes // self.num_blocks)
        # A block in one part is visited once an epoch: keep only the one each lane is at.
        self._keep_blocks = own_lanes if self.parts == 1 else self.num_blocks
        self._kept: OrderedDict[int, tuple[int, list[str | Tokens]]] = OrderedDict()  # block -> (bytes, texts)
        self._kept_bytes = 0
        self._prefetch = getattr(corpus, "prefetch", None)
        self._sizes = np.full(self.num_blocks, -1)  # documents in each block, -1 = not read yet
        if self.num_blocks <= FEW_BLOCKS:  # then perhaps few documents, too: no more parts than there are
            most = max(self._size(block) for block in range(self.num_blocks))
            self.parts = max(1, min(self.parts, most))
        self._documents_of = lru_cache(maxsize=own_lanes)(self._share_out)  # a unit is taken from many times
        self.cut_blocks(self.parts)

    def cut_blocks(self, parts: int) -> None:
        """Cut each block in so many units, as a saved state says. Otherwise the first reading decides it, which may
        have met a shard that is left out now."""
        self.parts, self.num_units = parts, self.num_blocks * parts
        self._permutation = lru_cache(maxsize=4 + KEPT_UNITS // self.num_units)(self._make_permutation)
        self._documents_of.cache_clear()

    def take(self, lane: int, cursor: Cursor, max_documents: int, max_chars: int) -> tuple[list[Text], Cursor]:
        """The lane's next documents and the cursor after them: at least one, never across the end of an epoch.

        Stops once there are max_documents, or max_chars characters. Raises NoText if the split has none.
        """
        taken: list[Text] = []
        chars = 0
        epoch, unit, document = cursor
        while True:
            position = (lane - epoch) % self.num_lanes + unit * self.num_lanes
            if position >= self.num_units:
                if taken:
                    return taken, Cursor(epoch, unit, document)
                epoch, unit, document = epoch + 1, 0, 0
                if not self._sizes.any():
                    raise self._no_text()
                continue
            block, part = divmod(int(self._permutation(epoch)[position]), self.parts)
            chosen = self._documents_of(epoch, block, part)
            for index in chosen[document:]:
                text = self._read(block)[index]
                taken.append(Text(text, epoch, block, int(index)))
                chars += len(text)
                document += 1
                if len(taken) == max_documents or chars >= max_chars:
                    return taken, Cursor(epoch, unit, document)
            unit, document = unit + 1, 0

    def forget(self) -> None:
        """Read anew what is asked for again: the corpus leaves out more than before."""
        self._kept.clear()
        self._kept_bytes = 0
        self._sizes[:] = np.where(self._sizes == 0, 0, -1)
        self._documents_of.cache_clear()

    def _make_permutation(self, epoch: int) -> np.ndarray:
        """Units of an epoch in the order in which they are dealt out, (num_units,) int64."""
        if not self.shuffle:
            return np.arange(self.num_units)
        return seeded_rng(ORDER_OF_UNITS, self.seed, epoch).permutation(self.num_units)

    def _share_out(self, epoch: int, block: int, part: int) -> np.ndarray:
        """Indices in the block of a unit's documents; the parts of a block share its documents out anew each epoch."""
        size = int(self._sizes[block])
        if size < 0:
            size = len(self._read(block))
        if not self.shuffle:
            return np.arange(part * size // self.parts, (part + 1) * size // self.parts)
        if part >= size:
            return np.arange(0)  # a pass over many of these should be quick
        return seeded_rng(ORDER_IN_BLOCK, self.seed, epoch, block).permutation(size)[part :: self.parts]

    def look_ahead(self, lane: int, cursor: Cursor) -> None:
        """Tell a corpus that has to fetch its blocks which ones the lane will want next."""
        if self._prefetch is None:
            return
        epoch, unit, _ = cursor
        blocks: list[int] = []
        for _ in range(AHEAD_UNITS):
            position = (lane - epoch) % self.num_lanes + unit * self.num_lanes
            if position >= self.num_units:
                epoch, unit, position = epoch + 1, 0, (lane - epoch - 1) % self.num_lanes
            if position < self.num_units:
                blocks.append(int(self._permutation(epoch)[position]) // self.parts)
            unit += 1
        self._prefetch(self.split, [block for block in dict.fromkeys(blocks) if block not in self._kept])

    def _size(self, block: int) -> int:
        """Documents in a block; none in one that cannot be read and may be skipped, of which take() will tell."""
        try:
            return len(self._read(block))
        except BadShard:
            if not getattr(self.corpus, "skip_bad", False):
                raise
            return 0

    def _read(self, block: int) -> list[str | Tokens]:
        """The texts of a block, from memory if it was read lately."""
        if block in self._kept:
            self._kept.move_to_end(block)
            return self._kept[block][1]
        found = self.corpus.read_block(self.split, block)
        texts = [piece for item in found for piece in ([item] if isinstance(item, Tokens) else cut(item.text))]
        size = sum(map(sys.getsizeof, texts))
        self._sizes[block] = len(texts)
        self._kept[block] = size, texts
        self._kept_bytes += size
        while len(self._kept) > 1 and (self._kept_bytes > CACHE_BYTES or len(self._kept) > self._keep_blocks):
            self._kept_bytes -= self._kept.popitem(last=False)[1][0]
        return texts

    def _no_text(self) -> NoText:
        return NoText(f"{self.corpus.name}: there is no text in its {self.split} split; check --data")


def cut(text: str) -> list[str]:
    """A text as pieces of bounded size, nearly always itself; cut after white space if possible. None if empty."""
    pieces, start = [], 0
    while len(text) - start > LONGEST_TEXT:
        window = start + LONGEST_TEXT // 2, start + LONGEST_TEXT
        end = max(text.rfind("\n", *window), text.rfind(" ", *window)) + 1 or window[1]
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]] if text else pieces
