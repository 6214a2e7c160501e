"""C forms of the steps between matrix products, on a CPU (kernels.c), and when they may be used.

The plain form of each is a PyTorch function marked `@in_c("name")`, beside its caller: in gpt.py, flash_attention.py or
loss_head.py. It is the definition. The C form makes one pass over memory where PyTorch makes many, and keeps less for
the backward pass. It is used for CPU tensors while the plain form is the one it was written for, and after one small
example has given the same result both ways.

Shapes: B batch, T time, C channels, H heads, D head size.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nanochat.common.fast_path import fingerprint, warn_once
from nanochat.cpu.kernels import add_transposed_product, call, library, usable, wide_product

EPSILON = torch.finfo(torch.float32).eps  # F.rms_norm adds this to the mean square, in bfloat16 too
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class CForm:
    """A C form of a plain function."""

    run: Callable[..., Any]  # takes the plain function's arguments
    fingerprint: str  # of the plain function it computes (fast_path.fingerprint)
    example: Callable[[], tuple[Any, ...]]  # small float32 arguments to compare the two with
    tensors: int = 1  # the first so many arguments must be float32 or bfloat16 CPU tensors
    fits: Callable[..., bool] = lambda *args: True  # what else the arguments must satisfy
    tolerance: float = 1e-3  # of the two's difference on the example, by norm


def in_c(name: str) -> Callable[[F], F]:
    """Decorate a plain function whose C form is FORMS[name]; `plain` of the result is the function itself."""
    form = FORMS[name]

    def decorate(plain: F) -> F:
        @functools.wraps(plain)
        def either(*args: Any) -> Any:
            if usable(*args[: form.tensors]) and form.fits(*args) and agrees(form, plain):
                return form.run(*args)
            return plain(*args)

        either.plain = plain  # type: ignore[attr-defined]
        return either  # type: ignore[return-value]

    return decorate


@functools.cache
def agrees(form: CForm, plain: Callable[..., Any]) -> bool:
    """Whether the C form stands for `plain` as it is now: the same code, and the same result on the example."""
    name = f"{plain.__module__}.{plain.__qualname__}"
    if fingerprint(plain) != form.fingerprint:
        warn_once(f"{name} has changed: PyTorch computes it instead of C, slower (see nanochat/common/fast_path.py)")
        return False
    if not all(
        float((a.double() - b.double()).norm()) <= form.tolerance * max(0.1, float(b.double().norm()))  # some are 0
        for a, b in zip(_results(form.run, form), _results(plain, form))
    ):
        # Because of this machine, or because a function that the plain form calls was edited.
        warn_once(f"{name} in C gives another result than in PyTorch: PyTorch is used, slower")
        return False
    return True


def _results(function: Callable[..., Any], form: CForm) -> list[torch.Tensor]:
    """What `function` returns for the example, and the gradients of its inputs if it has any."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in form.example()]
        with torch.set_grad_enabled(not form.run.__name__.endswith("_")):  # those in place are not differentiable
            out = function(*(x + 0 if torch.is_tensor(x) else x for x in leaves))
        outs = out if isinstance(out, tuple) else (out,)
        if not outs[0].requires_grad:
            return [x.detach() for x in outs]
        inputs = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
        scalar = (outs[0] * _waves(*outs[0].shape)).sum()  # grad_outputs= instead would import sympy, 0.3 s
        grads = torch.autograd.grad(scalar, inputs, allow_unused=True)
        return [outs[0].detach(), *(g for g in grads if g is not None)]


def _waves(*shape: int) -> torch.Tensor:
    """Irregular numbers in [-1, 1], the same every time."""
    return torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").mul_(7.1).sin_().view(shape)


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


def adamw_(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    lazy: bool,
) -> tuple[torch.Tensor, ...]:
    (beta1, beta2), keep = betas, 1 - lr * decay
    rates = (keep, lr / (1 - beta1**step), beta1, beta2, 1 / (1 - beta2**step), eps)
    call("adamw", p, g, m, v, p.numel(), *map(float, rates), lazy)
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
    call("head_rows", logits, targets, weights, losses, *logits.shape, cap, backward, logits.dtype == torch.bfloat16)
    return losses, logits


# ---------------------------------------------------------------------------------------------------


def _few_terms() -> torch.Tensor:
    """A matrix in bfloat16 whose products are exact in it: each sum has one term, each factor is a power of two."""
    return torch.tensor([1.0, -2.0, 0.5, 4.0], device="cpu").diag().bfloat16()


def _rotary_example() -> tuple[Any, ...]:
    angles = _waves(1, 5, 1, 4)
    return _waves(2, 5, 3, 8), angles.cos(), angles.sin(), 1.2


FORMS = {
    "norm": CForm(norm, "95f9edc2", lambda: (_waves(3, 37),)),
    "mix": CForm(mix, "60102a94", lambda: (_waves(3, 37), _waves(3, 37).cos(), _waves(2)[1], _waves(3)[2]), tensors=2),
    "relu_squared": CForm(relu_squared, "cf51e9e4", lambda: (_waves(3, 37),), fits=lambda h: h.is_contiguous()),
    "linear": CForm(
        linear,
        "0ad23a94",
        lambda: (_few_terms(), _waves(3, 4)),
        tensors=2,
        fits=lambda x, weight: (
            x.dtype == torch.bfloat16
            and weight.dtype == torch.float32
            and x.is_contiguous()
            and x.numel() > 0
            and torch.is_grad_enabled()
            and wide_product() is not None
        ),
    ),
    "add_product_": CForm(
        add_product_,
        "e7bbb3e0",
        lambda: (_waves(4, 3), _few_terms().T, _waves(4, 3).bfloat16()),
        tensors=3,
        fits=lambda total, a, b: (
            (total.dtype, a.dtype, b.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
            and a.T.is_contiguous()
            and b.is_contiguous()
            and total.is_contiguous()
            and wide_product() is not None
        ),
    ),
    "adamw_": CForm(
        adamw_,
        "3756712c",
        lambda: (
            _waves(37),
            _waves(37).relu(),
            _waves(37).square(),
            _waves(37).square(),
            3,
            0.1,
            (0.8, 0.95),
            1e-8,
            0.1,
            True,
        ),
        tensors=4,
        fits=lambda p, g, m, v, *rates: all(x.dtype == torch.float32 and x.is_contiguous() for x in (p, g, m, v)),
    ),
    "cautious_step_": CForm(
        cautious_step_,
        "48088c69",
        lambda: (_waves(3, 37), _waves(3, 37).cos(), 0.5, 0.25),
        tensors=2,
        fits=lambda p, update, *rates: p.dtype == torch.float32 and p.is_contiguous() and update.is_contiguous(),
    ),
    "normed_rotary": CForm(
        normed_rotary,
        "f381e780",
        _rotary_example,
        fits=lambda x, cos, sin, scale: cos.size(0) == 1,  # one position per column
    ),
    "block_attention": CForm(
        block_attention,
        "54022b74",
        lambda: (*(_waves(2, 128, 32).mul(f).cos().bfloat16() for f in (1.0, 2.0, 3.0)), 32),
        tensors=3,
        fits=lambda q, k, v, window: (
            all(x.dtype == torch.bfloat16 for x in (q, k, v))
            and q.numel() > 0
            and (window % 32 == 0 or window >= q.size(1))
            and amx_attends(q.element_size(), *q.shape[1:])
        ),
        tolerance=1e-2,  # the plain form rounds the scores too
    ),
    "block_softmax_": CForm(block_softmax_, "92f31ea6", lambda: (_waves(2, 5, 9), 4, 3, 0.3)),
    "block_softmax_backward_": CForm(
        block_softmax_backward_, "e1a07a38", lambda: (_waves(2, 5, 9), _waves(2, 5, 9).square(), 0.3), tensors=2
    ),
    "head_rows_": CForm(
        head_rows_,
        "c3c09adf",
        lambda: (9 * _waves(3, 37), torch.tensor([0, 36, 5], device="cpu"), _waves(3).abs(), 15.0, True),
        # e^cap, summed over a vocabulary, must be finite.
        fits=lambda logits, targets, weights, cap, backward: (
            cap <= 64 and targets.is_contiguous() and weights.is_contiguous()
        ),
    ),
}
"""By the name of the plain function. A changed fingerprint is printed by tests/test_fast_path.py."""
