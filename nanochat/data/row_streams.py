"""Row streams: L independent streams of packed rows. Row j of every global batch comes from stream j mod L.

A stream reads its own documents, holds some in a pool, and packs rows of T+1 tokens from it. Its next row depends on
nothing but its own state, so rows are the same whichever rank owns the stream, whatever the world size, and however
far ahead of need they are made.

The rest of a cropped document returns to the pool as a segment with a bos of its own. With inputs row[:-1] and targets
row[1:], every token of every document is a target exactly once.

Saved states keep their first names: "lane" for a stream, "pieces" for segments, "parts" for slices per row group.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.data.batches import Batch, saved_numbers
from nanochat.data.document_order import Cursor, DocumentOrder, PlacedSegment, Tokens
from nanochat.data.packing import BestFitPool, fill_row

# The pool is topped up every REFILL_ROWS rows, and whenever it is empty, to POOL_SEGMENTS segments, but to no less
# than POOL_ROWS[0] rows of tokens (many short documents) and no more than POOL_ROWS[1] (a few long ones).
REFILL_ROWS = 8
POOL_SEGMENTS = 128
POOL_ROWS = (16, 64)
TAKE_DOCUMENTS, TAKE_CHARS = 32, 64_000  # per read of a stream
MAX_LISTED_GROUPS = 8  # in a batch's origin
TOKEN_CACHE_BYTES = 256 * 2**20  # of tokens kept for the next epoch
ARRAY_OVERHEAD_BYTES = 200  # of Python's, per kept array


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of token ids in memory and in token files."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


class TextEncoder(Protocol):
    """The part of a tokenizer that loading needs."""

    def encode(self, text: list[str], *, num_threads: int) -> list[list[int]]: ...
    def get_bos_token_id(self) -> int: ...
    def get_vocab_size(self) -> int: ...


class Segment(NamedTuple):
    """A document without its bos, or what is left of one. The array is shared and read-only."""

    ids: np.ndarray
    epoch: int
    row_group: int
    is_tail: bool

    @property
    def length(self) -> int:
        """Tokens in a row, including a bos."""
        return len(self.ids) + 1


class CachingTokenizer:
    """Tokenises segments and caches tokens, so that later epochs of a small corpus cost nothing.

    The first ones read are kept: in an epoch larger than the cache, the most recent are never there when needed again.
    """

    def __init__(self, tokenizer: TextEncoder, dtype: np.dtype, num_threads: int) -> None:
        self.tokenizer, self.dtype, self.num_threads = tokenizer, dtype, num_threads
        self.cache: dict[tuple[int, int], np.ndarray] = {}  # by row group and number in it
        self.free_bytes = TOKEN_CACHE_BYTES

    def encode(self, segments: list[PlacedSegment]) -> list[np.ndarray]:
        """Token ids of each segment, as read-only arrays."""
        found = [
            segment.text.ids.copy()
            if isinstance(segment.text, Tokens)  # a view would keep its whole row group in memory
            else self.cache.get((segment.row_group, segment.number))
            for segment in segments
        ]
        new = [i for i, ids in enumerate(found) if ids is None]
        texts: list[str] = [segments[i].text for i in new]  # type: ignore[misc]
        encoded = self.tokenizer.encode(texts, num_threads=self.num_threads) if new else []
        for i, ids in zip(new, encoded, strict=True):
            found[i] = array = np.array(ids, self.dtype)
            if array.nbytes <= self.free_bytes:
                self.cache[segments[i].row_group, segments[i].number] = array
                self.free_bytes -= array.nbytes + ARRAY_OVERHEAD_BYTES
        return found  # type: ignore[return-value]


class Counts(NamedTuple):
    """What a stream has put into rows so far."""

    rows: int = 0
    documents: int = 0
    cropped: int = 0  # documents that did not fit as a whole


class StreamState(NamedTuple):
    """Everything about a stream. Cheap to take: the segments are shared."""

    cursor: Cursor = Cursor()
    counts: Counts = Counts()
    segments: list[Segment] = []  # noqa: RUF012 (never written to); oldest first

    def to_arrays(self, prefix: str, dtype: np.dtype) -> dict[str, np.ndarray]:
        """The state as arrays for a file, their names starting with `prefix`."""
        columns = [(len(s.ids), s.epoch, s.row_group, int(s.is_tail)) for s in self.segments]
        empty = np.empty(0, dtype)
        return {
            f"{prefix}.place": np.array([*self.cursor, *self.counts], np.int64),
            f"{prefix}.pieces": np.array(columns, np.int64).reshape(-1, 4),
            f"{prefix}.tokens": np.concatenate([empty, *(s.ids for s in self.segments)]),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], prefix: str, vocab_size: int) -> "StreamState":
        """The inverse of to_arrays. UserError if the stream is not there, or damaged."""
        place = saved_numbers(arrays, f"{prefix}.place", (len(Cursor._fields) + len(Counts._fields),)).tolist()
        tokens = saved_numbers(arrays, f"{prefix}.tokens", (-1,), vocab_size).astype(token_dtype(vocab_size))
        segments, start = [], 0
        for length, epoch, row_group, is_tail in saved_numbers(arrays, f"{prefix}.pieces", (-1, 4)).tolist():
            segments.append(Segment(tokens[start : start + length].copy(), epoch, row_group, bool(is_tail)))
            start += length
        if start != len(tokens):
            raise UserError(f"the saved position in the data is damaged ({prefix}: {len(tokens)} tokens, not {start})")
        return cls(Cursor(*place[:3]), Counts(*place[3:]), segments)


class RowStream:
    """One stream of rows. `state()` and the constructor are inverse to each other."""

    def __init__(self, index: int, row_tokens: int, state: StreamState | None = None) -> None:
        self.index, self.row_tokens = index, row_tokens
        self.cursor, self.counts, segments = state or StreamState()
        self.pool: BestFitPool[Segment] = BestFitPool()
        for segment in segments:
            self.pool.add(segment.length, segment)

    def state(self) -> StreamState:
        """The state now; later changes do not affect it."""
        return StreamState(self.cursor, self.counts, self.pool.items())

    def wants_documents(self) -> bool:
        """True if a refill should read more. A small corpus is read ahead by at most one epoch, or the pool would fill
        up with copies."""
        if not self.pool:
            return True
        if self.cursor.epoch > 1 + min(segment.epoch for segment in self.pool.items()):
            return False
        rows = self.pool.total / self.row_tokens
        return rows < POOL_ROWS[0] or (rows < POOL_ROWS[1] and len(self.pool) < POOL_SEGMENTS)


class RowPacker:
    """Packs the rows of some streams in lockstep, with one reader and one tokenizer. For one thread."""

    def __init__(
        self,
        order: DocumentOrder,
        tokenizer: TextEncoder,
        streams: list[int],
        *,
        sequence_len: int,
        num_threads: int = 1,
        rows_per_stream: int = 1,
    ) -> None:
        self.order, self.rows_per_stream, self.row_tokens = order, rows_per_stream, sequence_len + 1
        self.bos = tokenizer.get_bos_token_id()
        self.vocab_size = tokenizer.get_vocab_size()
        self.dtype = token_dtype(self.vocab_size)
        self.tokenizer = CachingTokenizer(tokenizer, self.dtype, num_threads)
        self.streams = [RowStream(index, self.row_tokens) for index in streams]

    def state(self) -> list[StreamState]:
        """The state of each stream."""
        return [stream.state() for stream in self.streams]

    def restore(self, state: list[StreamState]) -> None:
        """Continue from the states, one for each stream."""
        self.streams = [
            RowStream(old.index, self.row_tokens, new) for old, new in zip(self.streams, state, strict=True)
        ]

    def next_step(self) -> tuple[Batch, list[StreamState]]:
        """The next `rows_per_stream` rows of each stream as a batch, and the streams' states after it.

        The N = rows_per_stream * streams rows have one of each stream, then the next of each, and so on.
        """
        rows = np.empty((self.rows_per_stream, len(self.streams), self.row_tokens), np.int64)
        sources: list[set[tuple[int, int]]] = []  # of each row: (epoch, row group) of everything in it
        for round_of_rows in rows:
            due = [stream for stream in self.streams if stream.counts.rows % REFILL_ROWS == 0]
            self._refill(due)  # all at once, so that the tokenizer's threads have enough to share
            sources += [self._pack(stream, row) for stream, row in zip(self.streams, round_of_rows)]
        flat = rows.reshape(-1, self.row_tokens)  # (N, T+1)
        # Copied by numpy: torch would wake threads for it, which training may be using.
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(half)) for half in (flat[:, :-1], flat[:, 1:]))
        first, last = self.streams[0].index, self.streams[-1].index
        origin = f"{describe_sources(set().union(*sources))}, {len(self.streams)} streams from {first} to {last}"
        read_before = sum(min(epoch for epoch, _ in of_row) > 0 for of_row in sources)
        return Batch(inputs, targets, None, origin, read_before), self.state()

    def _pack(self, stream: RowStream, row: np.ndarray) -> set[tuple[int, int]]:
        """Write a stream's next row into `row`, (T+1,). Returns (epoch, row group) of everything in it."""
        sources: set[tuple[int, int]] = set()
        row[-1] = self.bos  # stays where the segments leave a space of one
        end = documents = cropped = 0
        for segment, length, taken in fill_row(stream.pool, self.row_tokens, lambda: self._refill([stream])):
            row[end] = self.bos
            row[end + 1 : end + taken] = segment.ids[: taken - 1]
            end += taken
            sources.add((segment.epoch, segment.row_group))
            documents += not segment.is_tail
            if taken < length:
                cropped += not segment.is_tail
                tail = Segment(segment.ids[taken - 1 :], segment.epoch, segment.row_group, True)
                stream.pool.add(tail.length, tail)
        old = stream.counts
        stream.counts = Counts(old.rows + 1, old.documents + documents, old.cropped + cropped)
        return sources

    def _refill(self, streams: list[RowStream]) -> None:
        """Read and tokenise until none of the streams wants more."""
        while streams := [stream for stream in streams if stream.wants_documents()]:
            for stream in streams:
                self.order.prefetch(stream.index, stream.cursor)
            taken = []
            for stream in streams:
                found, stream.cursor = self.order.take(stream.index, stream.cursor, TAKE_DOCUMENTS, TAKE_CHARS)
                taken += [(stream, segment) for segment in found]
            encoded = self.tokenizer.encode([segment for _, segment in taken])
            for (stream, segment), ids in zip(taken, encoded, strict=True):
                stream.pool.add(len(ids) + 1, Segment(ids, segment.epoch, segment.row_group, False))


def describe_sources(sources: set[tuple[int, int]]) -> str:
    """`epoch 0 to 1, row groups 3 17`: where a batch's documents came from, the first few row groups of them."""
    epochs, groups = {epoch for epoch, _ in sources}, sorted({group for _, group in sources})
    named = " ".join(map(str, groups[:MAX_LISTED_GROUPS]))
    more = f" and {len(groups) - MAX_LISTED_GROUPS} more" if len(groups) > MAX_LISTED_GROUPS else ""
    last = f" to {max(epochs)}" if len(epochs) > 1 else ""
    return f"epoch {min(epochs)}{last}, row groups {named}{more}"


def layout_arrays(prefix: str, layout: dict[str, int]) -> dict[str, np.ndarray]:
    """The sizes, seed and data that a saved state is valid for, as arrays."""
    return {f"{prefix}.{name}": np.array(value, np.int64) for name, value in layout.items()}


def check_layout(prefix: str, state: dict[str, Any], layout: dict[str, int]) -> None:
    """Raise UserError if a saved state belongs to another run: other data, seed, streams or row length."""
    for name, value in layout.items():
        key = f"{prefix}.{name}"
        found = int(state[key]) if key in state else None
        if found != value:
            label = LAYOUT_LABELS.get(name, name.replace("_", " "))
            raise UserError(
                f"cannot resume at the saved position in the data: its {label} was {found}, now it is {value}; "
                "resume with the same settings"
            )


LAYOUT_LABELS = {"lanes": "number of row streams", "data": "data fingerprint"}
