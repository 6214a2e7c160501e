"""Documents in, (B, T) batches out, with a state from which the next batches come out the same.

    Corpus              documents by row group                            dataset.py, which has the whole path
    DocumentOrder       the order of documents in each stream             data/document_order.py
    RowPacker           rows of T+1 tokens from each stream               data/row_streams.py, data/packing.py
    PrefetchingLoader   makes batches of rows on a thread                 data/batches.py
    PretrainLoader      all of these for one rank                         here
    ConversationLoader  the same for finetuning: rows of conversations    data/conversation_loader.py

The trainer knows a loader by the `Loader` protocol. The global batch of step k is a function of (seed, data, k) alone:
whatever the world size, each rank gets its share of the same rows.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.common import UserError, get_base_dir
from nanochat.data.batches import Batch, Loader, PrefetchingLoader, saved_numbers
from nanochat.data.conversation_loader import ConversationLoader
from nanochat.data.corpus import BadShards, Corpus
from nanochat.data.document_order import MIN_SLICES_PER_STREAM, DocumentOrder
from nanochat.data.pretokenized import TokenReader, segment_reader
from nanochat.data.row_streams import (
    REFILL_ROWS,
    RowPacker,
    StreamState,
    TextEncoder,
    check_layout,
    layout_arrays,
)
from nanochat.data.shards import ShardCorpus
from nanochat.dataset import resolve_corpus

__all__ = [
    "Batch",
    "ConversationLoader",
    "Loader",
    "PretrainLoader",
    "tokenizing_distributed_data_loader_with_state_bos_bestfit",
]

MAX_STREAMS = 32
MIN_PREFETCH_STEPS = 3


class PretrainLoader(PrefetchingLoader[list[StreamState]]):
    """Packed rows of documents without end, epoch after epoch, each in another order.

    One step has `rows_per_step` rows over all ranks; row j comes from stream j mod L, and rank r of W owns the streams
    l with l % W == r. L is gcd(rows_per_step, 32) unless given (it must divide rows_per_step). `num_threads` tokenise
    (Runtime.loader_threads; the rows are the same for any number). empty_if_bad: see DocumentOrder.

    Raises UserError for sizes that do not fit together, and while reading, whatever the corpus raises.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: TextEncoder,
        *,
        sequence_len: int,
        rows_per_step: int,
        split: str = "train",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_streams: int | None = None,
        num_threads: int = 1,
        empty_if_bad: bool = False,
    ) -> None:
        self.sequence_len, self.rows_per_step = sequence_len, rows_per_step
        self.num_streams = num_streams or math.gcd(rows_per_step, MAX_STREAMS)
        check_sizes(sequence_len, rows_per_step, self.num_streams, world_size)
        assert 0 <= rank < world_size
        self.streams = range(rank, self.num_streams, world_size)
        self.corpus = corpus
        self._order = DocumentOrder(
            segment_reader(corpus, tokenizer),
            split,
            num_streams=self.num_streams,
            own_streams=len(self.streams),
            seed=seed,
            empty_if_bad=empty_if_bad,
        )
        rows_per_stream = rows_per_step // self.num_streams
        self.packer = RowPacker(
            self._order,
            tokenizer,
            list(self.streams),
            sequence_len=sequence_len,
            num_threads=num_threads,
            rows_per_stream=rows_per_stream,
        )
        # Deep enough that rows are at hand while a refill reads.
        super().__init__(self.packer, depth=max(MIN_PREFETCH_STEPS, 2 * REFILL_ROWS // rows_per_stream))

    @property
    def _layout(self) -> dict[str, int]:
        """The sizes, seed and data that a saved state is valid for."""
        return {
            "version": 1,
            "lanes": self.num_streams,
            "sequence_len": self.sequence_len,
            "seed": self._order.seed,
            "shuffle": 1,  # kept from a version that could also read in file order
            "data": fingerprint_number(f"{self.corpus.fingerprint} {self._order.split}"),
        }

    @property
    def skips_bad_shards(self) -> bool:
        return self.corpus.bad_shards.may_skip

    @property
    def skipped(self) -> dict[str, str]:
        return self.corpus.bad_shards.skipped

    def skip(self, shards: dict[str, str]) -> None:
        self.close()
        self.corpus.bad_shards.skipped |= shards | self.skipped  # the first reason stays
        self._order.forget()

    def state_dict(self) -> dict[str, np.ndarray]:
        """The position of this rank's streams after the last batch handed out, however far the thread is ahead.

        Keys carry the stream: the states of all ranks can be joined into one dict, and loaded with any world size.
        """
        state = layout_arrays("loader", self._layout | {"parts": self._order.slices_per_group})
        state |= self.corpus.bad_shards.to_arrays()
        for stream, stream_state in zip(self.streams, self._state, strict=True):
            state |= stream_state.to_arrays(f"lane{stream:02d}", self.packer.dtype)
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Continue from a saved state, which must hold all streams of this rank. UserError for another run's."""
        check_layout("loader", state, self._layout)
        self.skip(BadShards.from_arrays(state))
        if "loader.parts" in state:
            most = MIN_SLICES_PER_STREAM * self.num_streams
            self._order.set_slices(max(1, int(saved_numbers(state, "loader.parts", (), most + 1))))
        size = self.packer.vocab_size
        self._restore([StreamState.from_arrays(state, f"lane{stream:02d}", size) for stream in self.streams])

    @property
    def advice(self) -> str:
        reader = self._order.reader
        if not isinstance(self.corpus, ShardCorpus) or (isinstance(reader, TokenReader) and reader.is_complete):
            return super().advice
        return "make the tokens before training: python -m scripts.tok_data with this run's --data and --text-field"

    def stats(self) -> dict[str, float]:
        """Of this rank's streams, up to the last batch handed out: documents begun, target tokens, the share of
        documents that were cropped (the rest came later), whole epochs read, rows."""
        counts = [state.counts for state in self._state]
        documents, rows = sum(c.documents for c in counts), sum(c.rows for c in counts)
        return {
            "documents": documents,
            "tokens": rows * self.sequence_len,
            "rows": rows,
            "cropped_share": sum(c.cropped for c in counts) / max(documents, 1),
            "epoch": min(state.cursor.epoch for state in self._state),
            **({"skipped_shards": len(self.skipped)} if self.skipped else {}),
        }


def check_sizes(sequence_len: int, rows_per_step: int, num_streams: int, world_size: int) -> None:
    """Raise UserError for sizes that no batch can have."""
    if sequence_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {sequence_len}")
    if rows_per_step < 1:
        raise UserError("--total-batch-size must hold at least one row of --max-seq-len tokens")
    if rows_per_step % num_streams:
        raise UserError(f"{num_streams} row streams do not divide {rows_per_step} rows a step; use a divisor")
    if world_size > num_streams:
        larger = "; make --total-batch-size / --max-seq-len a multiple of a larger power of two"
        most = "" if num_streams == MAX_STREAMS else larger
        raise UserError(f"at most {num_streams} ranks can share {rows_per_step} rows a step, not {world_size}{most}")


def fingerprint_number(fingerprint: str) -> int:
    """63 bits of a fingerprint, as an int64 for saved states."""
    return int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:8], "big") >> 1


def tokenizing_distributed_data_loader_with_state_bos_bestfit(
    tokenizer: TextEncoder,
    B: int,
    T: int,
    split: str,
    tokenizer_threads: int = 1,
    tokenizer_batch_size: int = 128,
    device: torch.device | str = "cpu",
    resume_state_dict: dict[str, np.ndarray] | None = None,
    buffer_size: int = 1000,
    *,
    corpus: Corpus | None = None,
    seed: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """The published form of PretrainLoader: (inputs, targets, state) without end, (B, T) int64 on `device`.

    B rows on each rank. The state is the one after the batch it comes with. Without `corpus`, reads what --data=""
    means. tokenizer_batch_size and buffer_size have no effect: see POOL_ROWS in data/row_streams.py.
    """
    distributed = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if distributed else 1
    loader = PretrainLoader(
        corpus or resolve_corpus("", get_base_dir()),
        tokenizer,
        sequence_len=T,
        split=split,
        rows_per_step=B * world_size,
        rank=dist.get_rank() if distributed else 0,
        world_size=world_size,
        num_streams=world_size * math.gcd(B, MAX_STREAMS),
        seed=seed,
        num_threads=tokenizer_threads,
    )
    if resume_state_dict is not None:
        loader.load_state_dict(resume_state_dict)
    try:
        while True:
            batch = loader.next_batch()
            yield batch.inputs.to(device), batch.targets.to(device), loader.state_dict()
    finally:
        loader.close()
