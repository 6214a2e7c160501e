"""The steps between matrix products, each with a plain PyTorch form and, on a CPU, one pass of C (kernels.c).

The plain form says what is computed; it runs on GPUs, where torch.compile fuses it, and wherever there is no C
compiler. The C form computes the same and its derivative, and keeps less for the way back.

Shapes: B batch, T time, C channels, H heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F

from nanochat.cpu.kernels import call, usable

EPSILON = torch.finfo(torch.float32).eps  # what F.rms_norm adds to the mean square, in bfloat16 too

# ---------------------------------------------------------------------------------------------------
# RMSNorm


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, without parameters (arXiv 1910.07467)."""
    if usable(x):
        return _Norm.apply(x.contiguous())
    return F.rms_norm(x, (x.size(-1),))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y, n = torch.empty_like(x), x.size(-1)
        r = torch.empty(x.shape[:-1], dtype=torch.float32)
        call("norm_forward", x, y, r, r.numel(), n, EPSILON, x.dtype == torch.bfloat16)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        y, r = ctx.saved_tensors
        gy = grads[0].contiguous()
        gx = torch.empty_like(y)
        call("norm_backward", gy, y, r, gx, r.numel(), y.size(-1), y.dtype == torch.bfloat16)
        return gx


# ---------------------------------------------------------------------------------------------------
# Two tensors mixed


def mix(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * x + b * y with tensors a and b of no dimension; x and y of one shape."""
    if usable(x, y):
        return _Mix.apply(x.contiguous(), y.contiguous(), a, b)
    return a * x + b * y  # scalars without a dimension: the result has the tensors' dtype


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = torch.empty_like(x)
        call("mix_forward", x, y, z, float(a), float(b), x.numel(), x.dtype == torch.bfloat16)
        ctx.save_for_backward(x, y, a, b)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y, a, b = ctx.saved_tensors
        gx, gy, dots = torch.empty_like(x), torch.empty_like(y), torch.empty(2, dtype=torch.float64)
        call(
            "mix_backward",
            grads[0].contiguous(),
            x,
            y,
            gx,
            gy,
            float(a),
            float(b),
            dots,
            x.numel(),
            x.dtype == torch.bfloat16,
        )
        return gx, gy, dots[0].to(a.dtype).view_as(a), dots[1].to(b.dtype).view_as(b)


# ---------------------------------------------------------------------------------------------------
# ReLU squared


def relu_squared(h: torch.Tensor) -> torch.Tensor:
    """max(h, 0)^2 (arXiv 2109.08668). May overwrite `h`, which must be nobody else's."""
    if usable(h) and h.is_contiguous():
        return _ReluSquared.apply(h)
    return F.relu(h).square()


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        call("relu2_forward", h, h.numel(), h.dtype == torch.bfloat16)
        ctx.mark_dirty(h)
        ctx.save_for_backward(h)  # its root is all that the way back needs
        return h

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        gh = torch.empty_like(a)
        call("relu2_backward", grads[0].contiguous(), a, gh, a.numel(), a.dtype == torch.bfloat16)
        return gh


# ---------------------------------------------------------------------------------------------------
# Queries and keys


def normed_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * norm(rotate(x)): x (B, T, H, D) -> the same shape; cos, sin (B or 1, T, 1, D/2) float32.

    Rotary position embedding turns the halves of each head (RoPE, arXiv 2104.09864). The C form lays the result
    out head by head in memory, as attention reads it.
    """
    if usable(x) and cos.size(0) == 1:
        return _NormedRotary.apply(x.contiguous(), cos.contiguous(), sin.contiguous(), scale)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    y = norm(torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1))
    return y * scale if scale != 1 else y


class _NormedRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float) -> torch.Tensor:
        B, T, H, D = x.shape
        y = torch.empty(B, H, T, D, dtype=x.dtype)
        r = torch.empty(B, H, T, dtype=torch.float32)
        call("rotary_forward", x, cos, sin, y, r, B, T, H, D, float(scale), EPSILON, x.dtype == torch.bfloat16)
        ctx.save_for_backward(y, r, cos, sin)
        ctx.scale = float(scale)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        y, r, cos, sin = ctx.saved_tensors
        B, H, T, D = y.shape
        gy = grads[0].transpose(1, 2).contiguous()
        gx = torch.empty(B, T, H, D, dtype=y.dtype)
        call("rotary_backward", gy, y, r, cos, sin, gx, B, T, H, D, ctx.scale, y.dtype == torch.bfloat16)
        return gx, None, None, None


# ---------------------------------------------------------------------------------------------------
# Attention's softmax over a block of queries


def block_softmax_(scores: torch.Tensor, first: int, window: int, scale: float) -> torch.Tensor:
    """scores (N, Q, K) -> probabilities, in place. Query i sits at key position `first` + i and sees itself and
    `window` keys before it."""
    N, Q, K = scores.shape
    if usable(scores):
        call("softmax_forward", scores, N, Q, K, first, window, scale, scores.dtype == torch.bfloat16)
        return scores
    query = first + torch.arange(Q, device=scores.device)[:, None]
    key = torch.arange(K, device=scores.device)[None, :]
    hidden = (key > query) | (query - key > window)
    return torch.softmax(scores.mul_(scale).masked_fill_(hidden, -torch.inf), dim=-1)


def block_softmax_backward_(grad: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    """Gradient of the scores from that of the probabilities, both (N, Q, K), in place."""
    if usable(grad, weights):
        call("softmax_backward", grad, weights, *grad.shape, scale, grad.dtype == torch.bfloat16)
        return grad
    row_sum = (grad * weights).sum(-1, keepdim=True)
    return grad.sub_(row_sum).mul_(weights).mul_(scale)


# ---------------------------------------------------------------------------------------------------
# The head's softcapped cross-entropy


def head_rows_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses (N,), gradient (N, V) of sum(weights * losses) by the logits) of logits (N, V) before their softcap.

    May overwrite the logits; without `backward` the second value means nothing.
    """
    if usable(logits) and targets.is_contiguous() and weights.is_contiguous():
        losses = torch.empty(logits.size(0), dtype=torch.float32)
        call(
            "head_rows", logits, targets, weights, losses, *logits.shape, cap, backward, logits.dtype == torch.bfloat16
        )
        return losses, logits
    tanh = logits.float().div_(cap).tanh_()  # the softcap (Gemma 2, arXiv 2408.00118), before its last factor
    target, capped = targets[:, None], tanh * cap
    lse = torch.logsumexp(capped, dim=-1, keepdim=True)
    losses = (lse - capped.gather(1, target)).squeeze(1)
    if not backward:
        return losses, logits
    grad = capped.sub_(lse).exp_()  # softmax
    grad.scatter_add_(1, target, torch.full_like(lse, -1.0))
    grad.mul_(tanh.square_().neg_().add_(1)).mul_(weights[:, None])
    return losses, grad.to(logits.dtype)
