"""C forms of the steps between matrix products, on a CPU: each calls a function of kernels.c or attention.c.

They take the arguments of the plain PyTorch forms, which define them; fused.py says when they stand for these. The
gradients of gradients are not there, and asking for them is an error.

Shapes: B batch, T time, C channels, H heads, D head size, N = B*H.
"""

import functools
import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nanochat.cpu.kernels import add_transposed_product, call, library

EPSILON = torch.finfo(torch.float32).eps  # F.rms_norm adds this to the mean square, in bfloat16 too

# ---------------------------------------------------------------------------------------------------
# RMSNorm


def norm(x: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(x.contiguous())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y, n = torch.empty_like(x), x.size(-1)
        r = torch.empty(x.shape[:-1], dtype=torch.float32)
        call("norm_forward", x, y, r, r.numel(), n, EPSILON, x.dtype == torch.bfloat16)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        y, r = ctx.saved_tensors
        gy = grads[0].contiguous()
        gx = torch.empty_like(y)
        call("norm_backward", gy, y, r, gx, r.numel(), y.size(-1), y.dtype == torch.bfloat16)
        return gx


# ---------------------------------------------------------------------------------------------------
# a * x + b * y


def mix(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _Mix.apply(x.contiguous(), y.contiguous(), a, b)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = torch.empty_like(x)
        call("mix_forward", x, y, z, float(a), float(b), x.numel(), x.dtype == torch.bfloat16)
        ctx.save_for_backward(x, y, a, b)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y, a, b = ctx.saved_tensors
        g = grads[0].contiguous()
        gx, gy, dots = torch.empty_like(x), torch.empty_like(y), torch.empty(2, dtype=torch.float64)
        bf16 = x.dtype == torch.bfloat16
        call("mix_backward", g, x, y, gx, gy, float(a), float(b), dots, x.numel(), bf16)
        return gx, gy, dots[0].to(a.dtype).view_as(a), dots[1].to(b.dtype).view_as(b)


# ---------------------------------------------------------------------------------------------------
# ReLU squared


def relu_squared(h: torch.Tensor) -> torch.Tensor:
    return _ReluSquared.apply(h)


class _ReluSquared(torch.autograd.Function):
    """In place. The result is all that the backward pass needs: the slope is twice its root."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        call("relu2_forward", h, h.numel(), h.dtype == torch.bfloat16)
        ctx.mark_dirty(h)
        ctx.save_for_backward(h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (a,) = ctx.saved_tensors
        gh = torch.empty_like(a)
        call("relu2_backward", grads[0].contiguous(), a, gh, a.numel(), a.dtype == torch.bfloat16)
        return gh


# ---------------------------------------------------------------------------------------------------
# Linear layers: the weight's gradient is summed in float32 and written once


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w)
        return torch.nn.functional.linear(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        g, dx, dw = grads[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx = g @ w
        if ctx.needs_input_grad[1]:
            dw = torch.empty(w.shape, dtype=torch.float32)
            add_transposed_product(dw, g.view(-1, g.size(-1)), x.view(-1, x.size(-1)), keep=0.0)
        return dx, dw


# ---------------------------------------------------------------------------------------------------
# Queries and keys: rotation, norm, scale


def normed_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float) -> torch.Tensor:
    """x (B, T, H, D) -> (B, T, H, D), laid out head by head in memory, as attention reads it."""
    return _NormedRotary.apply(x.contiguous(), cos.contiguous(), sin.contiguous(), scale)


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
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        y, r, cos, sin = ctx.saved_tensors
        B, H, T, D = y.shape
        gy = grads[0].transpose(1, 2).contiguous()
        gx = torch.empty(B, T, H, D, dtype=y.dtype)
        call("rotary_backward", gy, y, r, cos, sin, gx, B, T, H, D, ctx.scale, y.dtype == torch.bfloat16)
        return gx, None, None, None


# ---------------------------------------------------------------------------------------------------
# Attention with AMX


BLOCK = 64  # queries: fewer hidden scores are computed than in larger blocks, and products cost no call


def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    return _BlockAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), window)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        N, T, D = q.shape
        blocks = ((start, min(start + BLOCK, T)) for start in range(0, T, BLOCK))
        kept = sum((end - start) * (end - max(0, start - window)) for start, end in blocks)
        y, p = torch.empty_like(q), torch.empty(N, kept, dtype=q.dtype)
        ctx.sizes = (N, T, D, BLOCK, window, 1 / math.sqrt(D))
        call("attention_forward", q, k, v, y, p, kept, *ctx.sizes)
        ctx.save_for_backward(q, k, v, p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, p = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        call("attention_backward", grads[0].contiguous(), q, k, v, p, p.size(1), dq, dk, dv, *ctx.sizes)
        return dq, dk, dv, None


@functools.cache
def tiles_usable() -> bool:
    found = library()
    return found is not None and bool(found.tiles_usable())


def amx_attends(element_bytes: int, length: int, head_dim: int) -> bool:
    """Whether attention of these sizes can run there; its window must fit too."""
    return element_bytes == 2 and length % 32 == head_dim % 32 == 0 and tiles_usable()


# ---------------------------------------------------------------------------------------------------
# In place, called inside the autograd functions of attention and of the loss


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    add_transposed_product(total, a.T, b)
    return total


def block_softmax_(scores: torch.Tensor, first: int, window: int, scale: float) -> torch.Tensor:
    call("softmax_forward", scores, *scores.shape, first, window, scale, scores.dtype == torch.bfloat16)
    return scores


def block_softmax_backward_(grad: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
    call("softmax_backward", grad, weights, *grad.shape, scale, grad.dtype == torch.bfloat16)
    return grad


def adamw_(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *rates: Any) -> tuple[torch.Tensor, ...]:
    step, lr, (beta1, beta2), eps, decay = rates
    rate, correction = lr / (1 - beta1**step), 1 / (1 - beta2**step)
    factors = (1 - lr * decay, rate, 1 - beta1, beta2, 1 - beta2, correction, eps)
    call("adamw", p, g, m, v, p.numel(), *map(float, factors))
    torch.autograd.graph.increment_version(p)  # decoding copies of the weights are renewed by it
    return p, m, v


def cautious_step_(p: torch.Tensor, update: torch.Tensor, lr: float, decay: float) -> torch.Tensor:
    call("cautious_step", p, update, p.numel(), float(lr), float(lr * decay), update.dtype == torch.bfloat16)
    torch.autograd.graph.increment_version(p)
    return p


def head_rows_(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, cap: float, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = torch.empty(logits.size(0), dtype=torch.float32)
    call(
        "head_rows",
        logits,
        targets,
        weights,
        losses,
        *logits.shape,
        float(cap),
        backward,
        logits.dtype == torch.bfloat16,
    )
    return losses, logits
