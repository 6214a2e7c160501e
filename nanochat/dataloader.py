"""Documents in, (B, T) batches out, with a state from which the next batches come out the same.

Pretraining: PretrainLoader, here. Finetuning: ConversationLoader, in conversation_loader.py. The global batch
of step k is a function of (seed, data, k) alone: of how many processes share it, each gets its rows.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.common import UserError, get_base_dir
from nanochat.data.batches import Batch, Loader, PrefetchingLoader
from nanochat.data.conversation_loader import ConversationLoader
from nanochat.data.document_order import Corpus, DocumentOrder
from nanochat.data.pretokenized import with_tokens
from nanochat.data.row_streams import REFILL_ROWS, LanePacker, LaneState, TextEncoder, check_layout
from nanochat.dataset import resolve_corpus

__all__ = [
    "Batch",
    "ConversationLoader",
    "Loader",
    "PretrainLoader",
    "tokenizing_distributed_data_loader_with_state_bos_bestfit",
]

MAX_LANES = 32


class PretrainLoader(PrefetchingLoader[list[LaneState]]):
    """Packed rows of documents for ever, epoch after epoch, each in another order.

    One step has `rows_per_step` rows over all processes; row j comes from lane j mod L, and rank r of W owns the
    lanes l with l % W == r. L is gcd(rows_per_step, 32) unless given (it must divide rows_per_step). Rows are
    made ahead of need on a thread that starts with the first batch; see lanes.py for what a row is. num_threads
    tokenise; one makes well over a million tokens a second, and costs the least where training needs the cores.

    Raises UserError for sizes that do not go together, and while reading, whatever the corpus raises.
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
        shuffle: bool = True,
        num_lanes: int | None = None,
        num_threads: int = 1,
    ) -> None:
        self.sequence_len, self.rows_per_step = sequence_len, rows_per_step
        self.num_lanes = num_lanes or math.gcd(rows_per_step, MAX_LANES)
        check_sizes(sequence_len, rows_per_step, self.num_lanes, world_size)
        assert 0 <= rank < world_size
        self.lanes = range(rank, self.num_lanes, world_size)
        self.corpus = with_tokens(corpus, tokenizer)
        order = DocumentOrder(
            self.corpus, split, num_lanes=self.num_lanes, own_lanes=len(self.lanes), seed=seed, shuffle=shuffle
        )
        rounds = rows_per_step // self.num_lanes
        packer = LanePacker(
            order,
            tokenizer,
            list(self.lanes),
            sequence_len=sequence_len,
            num_threads=num_threads,
            rows_per_step=rounds,
        )
        super().__init__(packer, depth=max(3, 2 * REFILL_ROWS // rounds))  # rows are at hand while the lanes read
        self.packer = packer
        data = fingerprint_number(f"{corpus.fingerprint} {split}")
        self._order = order
        self._layout = {
            "version": 1,
            "lanes": self.num_lanes,
            "sequence_len": sequence_len,
            "seed": seed,
            "shuffle": int(shuffle),
            "data": data,
        }

    @property
    def skips_bad_shards(self) -> bool:
        """Whether bad shards may be left out."""
        return getattr(self.corpus, "skip_bad", False)

    @property
    def skipped(self) -> dict[str, str]:
        """Bad shards that are left out, and why."""
        return getattr(self.corpus, "skipped", {})

    def skip(self, shards: dict[str, str]) -> None:
        """From the next batch on leave out these shards, too (name -> why). For all processes, after the same batch."""
        self.close()
        for shard, reason in shards.items():
            self.corpus.skip(shard, reason)  # type: ignore[attr-defined]
        self._order.forget()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Where this process's lanes stand after the last batch handed out, however far the thread is ahead.

        Keys carry the lane: the states of all ranks can be joined into one dict, and loaded by any number.
        """
        fixed = self._layout | {"parts": self._order.parts}
        state = {f"loader.{name}": np.array(value, np.int64) for name, value in fixed.items()}
        if self.skipped:
            state["loader.skipped"] = pack(self.skipped)
        for lane, lane_state in zip(self.lanes, self._state, strict=True):
            state |= lane_state.to_arrays(f"lane{lane:02d}", self.packer.dtype)
        return state

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a saved state, which must hold all lanes of this process. Raises UserError for another run's."""
        check_layout(
            {name: int(state[f"loader.{name}"]) for name in self._layout if f"loader.{name}" in state}, self._layout
        )
        self.skip(unpack_skipped(state))
        if "loader.parts" in state:
            self._order.cut_blocks(int(state["loader.parts"]))
        self._restore([LaneState.from_arrays(state, f"lane{lane:02d}", self.packer.dtype) for lane in self.lanes])

    def stats(self) -> dict[str, float]:
        """Of this process's lanes, up to the last batch handed out: documents begun, target tokens, the share of
        documents that were cropped (their tails came back), whole epochs read, rows."""
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


def check_sizes(sequence_len: int, rows_per_step: int, num_lanes: int, world_size: int) -> None:
    """Raise UserError for sizes that no batch can have."""
    if sequence_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {sequence_len}")
    if rows_per_step < 1:
        raise UserError("--total-batch-size must hold at least one row of --max-seq-len tokens")
    if rows_per_step % num_lanes:
        raise UserError(f"{num_lanes} lanes do not divide {rows_per_step} rows a step; use a divisor")
    if world_size > num_lanes:
        raise UserError(
            f"at most {num_lanes} processes can share {rows_per_step} rows a step, not {world_size}; make "
            "--total-batch-size / --max-seq-len a multiple of a larger power of two"
        )


def unpack_skipped(state: dict[str, np.ndarray]) -> dict[str, str]:
    """The shards that a saved state leaves out, and why."""
    packed = state.get("loader.skipped")
    return {} if packed is None else json.loads(bytes(np.asarray(packed, np.uint8)).decode())


def pack(skipped: dict[str, str]) -> np.ndarray:
    """A dict of texts as an array, (bytes,) uint8."""
    return np.frombuffer(json.dumps(skipped).encode(), np.uint8).copy()


def fingerprint_number(fingerprint: str) -> int:
    """63 bits of a fingerprint, to be kept among arrays."""
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
    """The published form of PretrainLoader: (inputs, targets, state) for ever, (B, T) int64 on `device`.

    B rows on each process. The state is the one after the batch it comes with. Without `corpus`, reads what
    --data="" means. tokenizer_batch_size and buffer_size have no effect: see POOL_ROWS in lanes.py.
    """
    many = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if many else 1
    loader = PretrainLoader(
        corpus or resolve_corpus("", get_base_dir()),
        tokenizer,
        sequence_len=T,
        split=split,
        rows_per_step=B * world_size,
        rank=dist.get_rank() if many else 0,
        world_size=world_size,
        num_lanes=world_size * math.gcd(B, MAX_LANES),
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
