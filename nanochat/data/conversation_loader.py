"""Conversations in, (B, T) batches out: rows of whole conversations, padded, with the assistant's turns as targets.

Every rank packs the whole stream, for which it needs only the lengths, and builds the rows that are its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.common.output import ProgressLine
from nanochat.data.batches import Batch, PrefetchingLoader, saved_numbers, seeded_rng
from nanochat.data.packing import BestFitPool, fill_row_whole
from nanochat.data.rendered import TRUNCATED, Dataset, Rendered, RenderedConversations
from nanochat.data.row_streams import check_layout, layout_arrays

POOL_CONVERSATIONS = 256  # to choose the best fit from
EXACT_CONVERSATIONS = 200_000  # num_steps() packs all of a data set up to this size, of a larger one a sample
SAMPLE_CONVERSATIONS = 20_000
SAMPLE_MARGIN = 0.98  # of the estimate: several times its standard error, so that the data outlasts the steps
PREFETCH_STEPS = 4
COUNT_ROWS = 1000  # per step when rows are only counted
ORDER_OF_CONVERSATIONS, SAMPLE = 3, 4  # purposes of random numbers (batches.seeded_rng)


class ConversationCursor(NamedTuple):
    """A position: the next conversation is the `position`-th of `epoch`; and counters of what came before it, of what
    is in rows where it says so."""

    epoch: int = 0
    position: int = 0
    truncated: int = 0  # in rows; too long for one: the last turns are left out
    skipped: int = 0  # not even the first exchange fits, or the assistant says nothing
    rows: int = 0  # over all ranks
    tokens: int = 0  # in them, without padding


class ConversationState(NamedTuple):
    """Everything about the stream after a step."""

    cursor: ConversationCursor = ConversationCursor()
    pool: Sequence[int] = ()  # conversations in the pool, oldest first


class Pooled(NamedTuple):
    """A conversation in the pool."""

    number: int
    ids: np.ndarray  # int32, the mask in the sign (rendered.py)
    truncated: bool


class ConversationPacker:
    """Packs conversations 0 .. size - 1, in each epoch's order, into rows; builds those of one rank. For one thread."""

    def __init__(
        self,
        get: Callable[[int], Rendered],
        size: int,
        *,
        row_tokens: int,
        seed: int,
        num_epochs: int | None,
        rows_per_step: int = COUNT_ROWS,
        rank: int = 0,
        world_size: int = 1,
        pad: int = 0,
    ) -> None:
        self.get, self.size, self.row_tokens = get, size, row_tokens
        self.seed, self.num_epochs = seed, num_epochs
        self.rows_per_step, self.rank, self.world_size, self.pad = rows_per_step, rank, world_size, pad
        self.restore(ConversationState())

    def state(self) -> ConversationState:
        """The position and the pool."""
        return ConversationState(self.cursor, [rendered.number for rendered in self.pool.items()])

    def restore(self, state: ConversationState) -> None:
        """Continue from a state."""
        self.cursor = state.cursor
        self.pool: BestFitPool[Pooled] = BestFitPool()
        self._order_epoch, self._order = -1, np.empty(0, np.int64)
        for index in state.pool:
            ids, use = self.get(index)
            assert ids is not None, f"conversation {index} was usable when the state was saved"
            self.pool.add(len(ids), Pooled(index, ids, use == TRUNCATED))

    def next_step(self) -> tuple[Batch, ConversationState]:
        """The rank's rows of the next step. Raises StopIteration when there is none left."""
        used = self.cursor.epoch * self.size + self.cursor.position - len(self.pool)
        rows = self.next_rows()
        if not rows:
            raise StopIteration
        batch = build_batch(rows[self.rank :: self.world_size], self.row_tokens, self.pad)
        if used >= self.size:  # as many conversations as an epoch has were in rows
            batch.read_before = len(batch.inputs)
        return batch, self.state()

    def next_rows(self) -> list[list[Pooled]]:
        """The rows of the next step: rows_per_step, fewer at the end of the data, then none."""
        rows: list[list[Pooled]] = []
        while len(rows) < self.rows_per_step:
            self._refill()
            before = self.pool.total
            row = fill_row_whole(self.pool, self.row_tokens)
            if not row:
                break
            rows.append(row)
            now = self.cursor
            self.cursor = now._replace(
                rows=now.rows + 1,
                tokens=now.tokens + before - self.pool.total,
                truncated=now.truncated + sum(conversation.truncated for conversation in row),
            )
        return rows

    def _refill(self) -> None:
        """Fill the pool with the next conversations that have a target."""
        while len(self.pool) < POOL_CONVERSATIONS and (index := self._next_index()) is not None:
            ids, use = self.get(index)
            if ids is None:
                self.cursor = self.cursor._replace(skipped=self.cursor.skipped + 1)
                continue
            self.pool.add(len(ids), Pooled(index, ids, use == TRUNCATED))

    def _next_index(self) -> int | None:
        """The next conversation of the stream, None at its end. UserError if the first epoch had no usable one."""
        now = self.cursor
        if now.position == self.size:
            if now.epoch == 0 and now.skipped == self.size:
                raise UserError(
                    f"none of {self.size} conversations has an answer that fits {self.row_tokens} tokens; "
                    "raise --max-seq-len, or shorten the conversations"
                )
            now = now._replace(epoch=now.epoch + 1, position=0)
        self.cursor = now
        if self.num_epochs is not None and now.epoch >= self.num_epochs:
            return None
        if self._order_epoch != now.epoch:
            self._order_epoch = now.epoch
            self._order = seeded_rng(ORDER_OF_CONVERSATIONS, self.seed, now.epoch).permutation(self.size)
        self.cursor = now._replace(position=now.position + 1)
        return int(self._order[now.position])


class ConversationLoader(PrefetchingLoader[ConversationState]):
    """Rows of whole conversations for finetuning. `dataset` has a length and gives conversations by index.

    Each epoch goes through the data set in its own order. Conversations are packed by best fit; one that does not fit
    a row of sequence_len + 1 tokens is truncated by whole turns, and skipped where even its first exchange does not fit
    or the assistant says nothing; stats() counts both. One step has rows_per_step rows over all ranks, of which rank r
    of W gets rows r, r + W, ...; only the last step has fewer, and then perhaps none for some ranks, whose batch is
    (0, T): all ranks end after the same step.

    num_epochs None goes on without end. Raises UserError for an invalid conversation, naming it, or where none is
    usable.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        *,
        sequence_len: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_epochs: int | None = 1,
    ) -> None:
        if len(dataset) == 0:
            raise UserError("there are no conversations; check --data")
        if sequence_len < 2 or rows_per_step < 1:
            raise UserError(f"a step needs at least one row of two tokens, got {rows_per_step} of {sequence_len}")
        assert 0 <= rank < world_size and (num_epochs is None or num_epochs > 0)
        self.rows_per_step, self.sequence_len = rows_per_step, sequence_len
        self.seed, self.num_epochs, self.size, self.row_tokens = seed, num_epochs, len(dataset), sequence_len + 1
        self.rendered = RenderedConversations(dataset, tokenizer, self.row_tokens)
        packer = ConversationPacker(
            self.rendered.get,
            self.size,
            row_tokens=self.row_tokens,
            seed=seed,
            num_epochs=num_epochs,
            rows_per_step=rows_per_step,
            rank=rank,
            world_size=world_size,
            pad=tokenizer.encode_special("<|bos|>"),
        )
        super().__init__(packer, PREFETCH_STEPS)
        self._layout = {"version": 1, "conversations": self.size, "sequence_len": sequence_len, "seed": seed}

    def num_steps(self) -> int:
        """Steps in num_epochs (in one epoch, if endless), from the start.

        Exact for up to EXACT_CONVERSATIONS, which are all rendered for it. For more, an estimate from a sample that
        errs on the low side: there will be a batch for every step, and a little of the data may go unseen.
        """
        return -(-self.num_rows() // self.rows_per_step)

    def num_rows(self) -> int:
        """Rows in num_epochs (in one epoch, if endless), from the start: exact or estimated as num_steps says."""
        epochs = self.num_epochs or 1
        if self.size <= EXACT_CONVERSATIONS:
            return self._count_rows(self.rendered.get, self.size, epochs)
        chosen = seeded_rng(SAMPLE, self.seed).choice(self.size, SAMPLE_CONVERSATIONS, replace=False).tolist()
        rows = self._count_rows(lambda i: self.rendered.get(chosen[i]), SAMPLE_CONVERSATIONS, 1)
        whole_steps = int(SAMPLE_MARGIN * rows * self.size / SAMPLE_CONVERSATIONS * epochs / self.rows_per_step)
        return max(1, whole_steps) * self.rows_per_step

    def _count_rows(self, get: Callable[[int], Rendered], size: int, epochs: int) -> int:
        packer = ConversationPacker(get, size, row_tokens=self.row_tokens, seed=self.seed, num_epochs=epochs)
        progress = ProgressLine(lambda: f"packed {packer.cursor.rows:,} rows to count the steps")
        while packer.next_rows():
            progress.show()
        progress.close()
        return packer.cursor.rows

    def state_dict(self) -> dict[str, np.ndarray]:
        """The position of the stream after the last batch handed out. The same on every rank."""
        return layout_arrays("conversations", self._layout) | {
            "conversations.place": np.array(self._state.cursor, np.int64),
            "conversations.waiting": np.array(self._state.pool, np.int64),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        check_layout("conversations", state, self._layout)
        place = saved_numbers(state, "conversations.place", (len(ConversationCursor._fields),)).tolist()
        waiting = saved_numbers(state, "conversations.waiting", (-1,), self.size).tolist()
        cursor = ConversationCursor(*place)
        self._restore(ConversationState(cursor._replace(position=min(cursor.position, self.size)), waiting))

    def stats(self) -> dict[str, float]:
        """Over all ranks, up to the last batch handed out. `conversations` are those read for it, `trained` those in
        its rows and the rows before."""
        now = self._state.cursor
        read = now.epoch * self.size + now.position
        return {
            "conversations": read,
            "trained": read - now.skipped - len(self._state.pool),
            "truncated": now.truncated,
            "skipped": now.skipped,
            "rows": now.rows,
            "tokens": now.tokens,
            "epoch": now.epoch,
            "padded_share": 1 - now.tokens / max(now.rows * self.row_tokens, 1),
        }


def build_batch(rows: list[list[Pooled]], row_tokens: int, pad: int) -> Batch:
    """(N, T) inputs and targets; padding is `pad` with target -1. Every row has a target."""
    signed = np.full((len(rows), row_tokens), ~pad, np.int32)
    for line, row in zip(signed, rows):
        joined = np.concatenate([conversation.ids for conversation in row])
        line[: len(joined)] = joined
    inputs, targets = signed[:, :-1].astype(np.int64), signed[:, 1:].astype(np.int64)  # (N, T) each
    np.invert(inputs, out=inputs, where=inputs < 0)
    targets[targets < 0] = -1
    assert (targets >= 0).any(axis=1).all(), "a row without a target"
    origin = f"conversations {' '.join(str(conversation.number) for row in rows for conversation in row)}"
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), None, origin)
