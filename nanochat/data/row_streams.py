"""Lanes: L independent streams of packed rows. Row j of every global batch comes from lane j mod L.

A lane reads its own documents, holds some in a pool, and packs rows of T+1 tokens from it. What it does next
depends on nothing but its own state, so the rows are the same whichever process owns the lane, however many
processes there are, and however far ahead of need the rows are made.

The tail of a cropped document goes back to the pool behind a bos of its own. With inputs row[:-1] and targets
row[1:], every token of every document is a target exactly once.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.data.batches import Batch
from nanochat.data.document_order import Cursor, DocumentOrder, Text, Tokens
from nanochat.data.packing import BestFitPool, fill_row

# The pool is topped up every REFILL_ROWS rows, and whenever it is empty, to POOL_DOCUMENTS pieces, but to no less
# than POOL_ROWS[0] rows of tokens (many short documents) and no more than POOL_ROWS[1] (a few long ones).
REFILL_ROWS = 8
POOL_DOCUMENTS = 128
POOL_ROWS = (16, 64)
TAKE_DOCUMENTS, TAKE_CHARS = 32, 64_000  # at a time
MAX_LISTED_GROUPS = 8  # in a batch's origin
REMEMBERED_BYTES = 256 * 2**20  # of documents' tokens, for the next epoch


def token_dtype(vocab_size: int) -> np.dtype:
    """Of ids in memory and in files."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


class TextEncoder(Protocol):
    """The part of a tokenizer that loading needs."""

    def encode(self, text: list[str], *, num_threads: int) -> list[list[int]]: ...
    def get_bos_token_id(self) -> int: ...
    def get_vocab_size(self) -> int: ...


class Piece(NamedTuple):
    """A document without its bos, or what is left of one. The array is shared and never written to."""

    ids: np.ndarray
    epoch: int
    block: int
    is_tail: bool

    @property
    def length(self) -> int:
        """Tokens in a row, with its bos."""
        return len(self.ids) + 1


class TokenMemory:
    """Tokenises documents, and remembers the tokens of as many as fit, so that later epochs of a small corpus cost
    nothing. The first ones stay: of an epoch larger than the memory, the latest would always be gone when asked."""

    def __init__(self, tokenizer: TextEncoder, dtype: np.dtype, num_threads: int) -> None:
        self.tokenizer, self.dtype, self.num_threads = tokenizer, dtype, num_threads
        self.known: dict[tuple[int, int], np.ndarray] = {}  # by block and index
        self.free_bytes = REMEMBERED_BYTES

    def encode(self, texts: list[Text]) -> list[np.ndarray]:
        """Token ids of each document, arrays that nobody may write to."""
        found = [
            text.text.ids.copy()
            if isinstance(text.text, Tokens)  # a view would keep its whole block in memory
            else self.known.get((text.block, text.number))
            for text in texts
        ]
        new = [i for i, ids in enumerate(found) if ids is None]
        plain: list[str] = [texts[i].text for i in new]  # type: ignore[misc]
        encoded = self.tokenizer.encode(plain, num_threads=self.num_threads) if new else []
        for i, ids in zip(new, encoded, strict=True):
            found[i] = array = np.array(ids, self.dtype)
            if array.nbytes <= self.free_bytes:
                self.known[texts[i].block, texts[i].number] = array
                self.free_bytes -= array.nbytes + 200  # and what Python needs to keep it
        return found  # type: ignore[return-value]


class Counts(NamedTuple):
    """What a lane has put into rows so far."""

    rows: int = 0
    documents: int = 0
    cropped: int = 0  # documents that did not fit in one piece

    def plus(self, rows: int = 0, documents: int = 0, cropped: int = 0) -> "Counts":
        return Counts(self.rows + rows, self.documents + documents, self.cropped + cropped)


class LaneState(NamedTuple):
    """All there is to know about a lane. Cheap to take: the pieces are shared."""

    cursor: Cursor
    counts: Counts
    pieces: list[Piece]  # oldest first

    def to_arrays(self, prefix: str, dtype: np.dtype) -> dict[str, np.ndarray]:
        """The state as arrays for a file, their names starting with `prefix`."""
        columns = [(len(p.ids), p.epoch, p.block, int(p.is_tail)) for p in self.pieces]
        empty = np.empty(0, dtype)
        return {
            f"{prefix}.place": np.array([*self.cursor, *self.counts], np.int64),
            f"{prefix}.pieces": np.array(columns, np.int64).reshape(-1, 4),
            f"{prefix}.tokens": np.concatenate([empty, *(p.ids for p in self.pieces)]),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], prefix: str, dtype: np.dtype) -> "LaneState":
        """The inverse of to_arrays. KeyError if the lane is not there."""
        place = np.asarray(arrays[f"{prefix}.place"]).tolist()
        tokens = np.asarray(arrays[f"{prefix}.tokens"]).astype(dtype)
        pieces, start = [], 0
        for length, epoch, block, is_tail in np.asarray(arrays[f"{prefix}.pieces"]).tolist():
            pieces.append(Piece(tokens[start : start + length].copy(), epoch, block, bool(is_tail)))
            start += length
        assert start == len(tokens), f"{prefix}: {len(tokens)} tokens, its pieces have {start}"
        return cls(Cursor(*place[:3]), Counts(*place[3:]), pieces)


class Lane:
    """One stream of rows of T+1 tokens. `state` and the constructor are inverse to each other."""

    def __init__(self, index: int, row_tokens: int, state: LaneState | None = None) -> None:
        self.index, self.row_tokens = index, row_tokens
        self.cursor, self.counts, pieces = state or LaneState(Cursor(), Counts(), [])
        self.pool: BestFitPool[Piece] = BestFitPool()
        for piece in pieces:
            self.pool.add(piece.length, piece)

    def state(self) -> LaneState:
        """Where the lane stands; not changed by what it does afterwards."""
        return LaneState(self.cursor, self.counts, self.pool.items())

    def wants_documents(self) -> bool:
        """True if the pool should be topped up, were this a moment for it.

        A small corpus is not read ahead by more than one epoch, or the pool would fill up with copies.
        """
        if not self.pool:
            return True
        if self.cursor.epoch > 1 + min(piece.epoch for piece in self.pool.items()):
            return False
        rows = self.pool.total / self.row_tokens
        return rows < POOL_ROWS[0] or (rows < POOL_ROWS[1] and len(self.pool) < POOL_DOCUMENTS)


class LanePacker:
    """Some lanes of a corpus, in step with each other, sharing the reader and the tokenizer. For one thread."""

    def __init__(
        self,
        order: DocumentOrder,
        tokenizer: TextEncoder,
        lanes: list[int],
        *,
        sequence_len: int,
        num_threads: int = 1,
        rows_per_step: int = 1,
    ) -> None:
        self.order, self.rows_per_step = order, rows_per_step
        self.row_tokens = sequence_len + 1
        self.bos = tokenizer.get_bos_token_id()
        self.dtype = token_dtype(tokenizer.get_vocab_size())
        self.memory = TokenMemory(tokenizer, self.dtype, num_threads)
        self.lanes = [Lane(index, self.row_tokens) for index in lanes]

    def state(self) -> list[LaneState]:
        """The state of each lane."""
        return [lane.state() for lane in self.lanes]

    def restore(self, states: list[LaneState]) -> None:
        """Go on from `states`, one for each lane."""
        self.lanes = [Lane(lane.index, self.row_tokens, state) for lane, state in zip(self.lanes, states, strict=True)]

    def next_step(self) -> tuple[Batch, list[LaneState]]:
        """The next `rows_per_step` rows of each lane as a batch, and the lanes' states after it."""
        rows, sources = self.next_rows(self.rows_per_step)
        rows_tensor = torch.from_numpy(rows)  # (N, T+1)
        numbers = [lane.index for lane in self.lanes]
        origin = f"{describe_sources(sources)}, {len(numbers)} streams from {numbers[0]} to {numbers[-1]}"
        inputs, targets = rows_tensor[:, :-1].contiguous(), rows_tensor[:, 1:].contiguous()  # (N, T) each
        return Batch(inputs, targets, None, origin), self.state()

    def next_rows(self, rows_per_lane: int) -> tuple[np.ndarray, set[tuple[int, int]]]:
        """The next rows of all lanes, (rows_per_lane * lanes, T+1) int64, lane by lane within each round.

        With them, the (epoch, block) of everything in them.
        """
        rows = np.empty((rows_per_lane, len(self.lanes), self.row_tokens), np.int64)
        sources: set[tuple[int, int]] = set()
        for round_of_rows in rows:
            due = [lane for lane in self.lanes if lane.counts.rows % REFILL_ROWS == 0]
            self._top_up(due)  # all at once, so that the tokenizer's threads have enough to share
            for lane, row in zip(self.lanes, round_of_rows):
                self._pack(lane, row, sources)
        return rows.reshape(-1, self.row_tokens), sources

    def _pack(self, lane: Lane, row: np.ndarray, sources: set[tuple[int, int]]) -> None:
        """Write a lane's next row."""
        row[-1] = self.bos  # stays where the pieces leave a space of one
        end = documents = cropped = 0
        for piece, length, taken in fill_row(lane.pool, self.row_tokens, lambda: self._top_up([lane])):
            row[end] = self.bos
            row[end + 1 : end + taken] = piece.ids[: taken - 1]
            end += taken
            sources.add((piece.epoch, piece.block))
            documents += not piece.is_tail
            if taken < length:
                cropped += not piece.is_tail
                tail = Piece(piece.ids[taken - 1 :], piece.epoch, piece.block, True)
                lane.pool.add(tail.length, tail)
        lane.counts = lane.counts.plus(1, documents, cropped)

    def _top_up(self, lanes: list[Lane]) -> None:
        """Read and tokenise until none of the lanes wants more."""
        while lanes := [lane for lane in lanes if lane.wants_documents()]:
            taken = []
            for lane in lanes:
                self.order.look_ahead(lane.index, lane.cursor)
            for lane in lanes:
                texts, lane.cursor = self.order.take(lane.index, lane.cursor, TAKE_DOCUMENTS, TAKE_CHARS)
                taken += [(lane, text) for text in texts]
            for (lane, text), ids in zip(taken, self.memory.encode([text for _, text in taken]), strict=True):
                lane.pool.add(len(ids) + 1, Piece(ids, text.epoch, text.block, False))


def describe_sources(sources: set[tuple[int, int]]) -> str:
    """`epoch 0 to 1, row groups 3 17`: where a batch's documents came from, the first few row groups of them."""
    epochs, groups = {epoch for epoch, _ in sources}, sorted({group for _, group in sources})
    named = " ".join(map(str, groups[:MAX_LISTED_GROUPS]))
    more = f" and {len(groups) - MAX_LISTED_GROUPS} more" if len(groups) > MAX_LISTED_GROUPS else ""
    last = f" to {max(epochs)}" if len(epochs) > 1 else ""
    return f"epoch {min(epochs)}{last}, row groups {named}{more}"


def check_layout(found: dict[str, Any], expected: dict[str, int]) -> None:
    """Raise UserError if a saved state belongs to another run: other data, seed, lanes or row length."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(
                f"cannot go on from the saved place in the data: its {name.replace('_', ' ')} was "
                f"{found.get(name)}, now it is {value}; resume with the same settings"
            )
