"""The output head and its loss in chunks: the full (tokens, vocabulary) logits never exist in training.

Shapes: N tokens, C channels, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.cpu.fused import in_c
from nanochat.cpu.kernels import wide_product


def softcap_(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap), in place (Gemma 2, arXiv 2408.00118)."""
    return logits.div_(cap).tanh_().mul_(cap)


def head_logits(x: torch.Tensor, weight: torch.Tensor, cap: float) -> torch.Tensor:
    """x (..., C), weight (V, C) -> softcapped fp32 logits (..., V)."""
    return softcap_(F.linear(x, weight.to(x.dtype)).float(), cap)


@in_c("head_rows_")
def head_rows_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses (N,), gradient (N, V) of sum(weights * losses) by the logits) of logits (N, V) before their softcap.

    May overwrite the logits; without `backward` the second value is meaningless.
    """
    tanh = logits.float().div_(cap).tanh_()  # the softcap before its last factor
    target, capped = targets[:, None], tanh * cap
    lse = torch.logsumexp(capped, dim=-1, keepdim=True)
    losses = (lse - capped.gather(1, target)).squeeze(1)
    if not backward:
        return losses, logits
    grad = capped.sub_(lse).exp_()  # softmax
    grad.scatter_add_(1, target, torch.full_like(lse, -1.0))
    grad.mul_(tanh.square_().neg_().add_(1)).mul_(weights[:, None])
    return losses, grad.to(logits.dtype)


class _ChunkedHeadLoss(torch.autograd.Function):
    """Sum of weighted token losses, and each token's own loss.

    The forward pass computes the gradients too, while a chunk's logits are still in cache: nothing is computed
    twice, and it saves the gradients of x (N, C) and of the weight (V, C), not logits (N, V). The backward pass
    multiplies them by the incoming scalar.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,  # (N, C)
        weight: torch.Tensor,  # (V, C)
        targets: torch.Tensor,  # (N,)
        token_weights: torch.Tensor,  # (N,)
        cap: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        w = weight.to(x.dtype)
        losses = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if need_grad else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if need_grad else None
        for start in range(0, x.size(0), chunk):
            part = slice(start, start + chunk)
            logits = x[part] @ w.T  # (chunk, V)
            losses[part], grad = head_rows_(logits, targets[part], token_weights[part], cap, need_grad)
            if dx is not None and dw is not None:
                torch.mm(grad, w, out=dx[part])
                add_product_(dw, grad.T, x[part])
        if need_grad:
            ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dx, dw = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), dw * grads[0], None, None, None, None


@in_c("add_product_")
def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total += a @ b, where `total` may have a finer dtype than the factors."""
    return total.addmm_(a, b) if a.dtype == total.dtype else total.add_(a @ b)


LOGIT_BYTES = 14  # of a chunk's logits on a GPU: in 16 bits, and at the peak three forms in float32


def chunk_tokens(vocab_size: int, gpu_memory: float | None = None) -> int:
    """Tokens per chunk: a chunk's logits should stay in a CPU's caches, or take about 2% of a GPU's memory (bytes).

    Smaller chunks make the products inefficient. On a GPU a power of two of logits, so that the little that a card
    lacks of its nominal memory changes nothing. With AMX the products outrun the memory: there larger chunks win, as
    each reads and writes the weight's whole gradient (bench/loss_head.py).
    """
    in_cache = 2**22 if torch.compiler.is_compiling() or wide_product() is None else 2**24
    logits = 2 ** int(math.log2(0.024 * gpu_memory / LOGIT_BYTES)) if gpu_memory else in_cache
    return max(64, logits // vocab_size)


def gpu_memory(device: torch.device) -> float | None:
    """Bytes of memory of a GPU, which torch.compile takes for a constant; None for other devices."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(torch.mps.recommended_max_memory()) if device.type == "mps" else None


def head_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor | None,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softcapped cross-entropy of x (N, C) through weight (V, C) against targets (N,), -1 = ignored.

    Returns (the differentiable sum over tokens of token_weights * loss, each token's loss (N,), detached,
    0 where ignored). `token_weights` (N,) defaults to 1.
    """
    kept = targets >= 0
    ones = kept.to(torch.float32)
    token_weights = ones if token_weights is None else token_weights * ones
    chunk = chunk_tokens(weight.size(0), gpu_memory(x.device))
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(kept.all()):
        # Prompts and padding have no target: drop their rows instead of multiplying them by zero.
        index = kept.nonzero().squeeze(1)
        total, some = _ChunkedHeadLoss.apply(x[index], weight, targets[index], token_weights[index], cap, chunk)
        losses = torch.zeros(x.size(0), dtype=torch.float32).index_copy_(0, index, some)
        return total, losses
    total, losses = _ChunkedHeadLoss.apply(x, weight, targets.clamp_min(0), token_weights, cap, chunk)
    return total, losses * ones
