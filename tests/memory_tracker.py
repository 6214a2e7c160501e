"""The peak memory of a training step on a GPU, from a run on tensors without memory.

A model on the meta device takes the very steps of training, and a dispatch mode adds up the storages that exist at
each moment. Where PyTorch's CUDA kernels save other tensors than the meta device's decompositions, stand-ins save the
same as they do.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import flash_attention, gpt, loss_head
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_head import chunk_tokens
from nanochat.optim import MuonAdamW, OptimizerConfig, build_param_groups

BLOCK = 512  # bytes: CUDA's caching allocator rounds up to it


class MemoryTracker(TorchDispatchMode):
    """Bytes of all storages on a device that were made inside: `now` and `peak`. Views share their storage."""

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type, self.now, self.peak = device_type, 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == self.device_type:
                self.add(t.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        self.now -= size

    def peak_of(self, action: Any) -> int:
        """The peak while `action` runs."""
        self.peak = self.now
        action()
        return self.peak


class _Norm(torch.autograd.Function):
    """aten._fused_rms_norm, which the meta device would decompose: saves x and the reciprocal RMS."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0])


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """What flex and FlashAttention keep: q, k, v, the output and its row sums; no scores."""
    repeat = q.size(2) // k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].transpose(1, 2)


def _logsumexp(x: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
    """torch.logsumexp with its temporary, which it makes below the dispatcher."""
    largest = x.amax(dim, keepdim=keepdim)
    return (x - largest).exp_().sum(dim, keepdim=keepdim).log_().add_(largest)


@contextlib.contextmanager
def like_cuda(memory_bytes: float) -> Iterator[None]:
    """Let tensors on the meta device be computed as on a GPU of this memory."""
    with (
        mock.patch.object(gpt, "norm", _Norm.apply),
        mock.patch.object(flash_attention, "choose_backend", lambda *args, **kwargs: "sdpa"),
        mock.patch.dict(flash_attention.BACKENDS, {"sdpa": _flash}),
        mock.patch.object(torch, "logsumexp", _logsumexp),
        mock.patch.object(loss_head, "chunk_tokens", lambda vocab, _: chunk_tokens(vocab, memory_bytes)),
    ):
        yield


def track_step(
    config: GPTConfig, rates: OptimizerConfig, rows: int, dtype: torch.dtype, memory_bytes: float
) -> dict[str, int]:
    """Peak bytes of a step of two micro-batches on one GPU: in forward and backward passes, and in the update.

    Of the second step: the optimizer's state exists, and so do the gradients of the first micro-batch.
    """
    with like_cuda(memory_bytes), MemoryTracker() as tracker:
        with torch.device("meta"):
            model = GPT(config, dtype)
        ns_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizer = MuonAdamW(build_param_groups(model, rates, ns_dtype=ns_dtype))
        tokens = torch.zeros(rows, config.sequence_len, dtype=torch.long, device="meta")
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()

        def micro_batch() -> None:
            (model.loss(tokens, tokens)[0] / 3).backward()

        backward = tracker.peak_of(micro_batch)
        return {"backward": backward, "update": tracker.peak_of(optimizer.step)}
