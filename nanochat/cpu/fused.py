"""When the C forms of the steps between matrix products (functions.py) are used on a CPU.

The plain form of each is a PyTorch function marked `@in_c("name")`, beside its caller: in gpt.py, flash_attention.py or
loss_head.py. It is the definition. The C form makes one pass over memory where PyTorch makes many, and keeps less for
the backward pass. It is used for CPU tensors while the plain form is the one it was written for, and after one small
example has given the same result both ways.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nanochat.common.fast_path import fingerprint, warn_once
from nanochat.cpu import functions
from nanochat.cpu.kernels import usable, wide_product

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


def _few_terms() -> torch.Tensor:
    """A matrix in bfloat16 whose products are exact in it: each sum has one term, each factor is a power of two."""
    return torch.tensor([1.0, -2.0, 0.5, 4.0], device="cpu").diag().bfloat16()


def _rotary_example() -> tuple[Any, ...]:
    angles = _waves(1, 5, 1, 4)
    return _waves(2, 5, 3, 8), angles.cos(), angles.sin(), 1.2


FORMS = {
    "norm": CForm(functions.norm, "95f9edc2", lambda: (_waves(3, 37),)),
    "mix": CForm(
        functions.mix, "60102a94", lambda: (_waves(3, 37), _waves(3, 37).cos(), _waves(2)[1], _waves(3)[2]), tensors=2
    ),
    "relu_squared": CForm(
        functions.relu_squared, "cf51e9e4", lambda: (_waves(3, 37),), fits=lambda h: h.is_contiguous()
    ),
    "linear": CForm(
        functions.linear,
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
        functions.add_product_,
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
        functions.adamw_,
        "5dd2f3c2",
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
        ),
        tensors=4,
        fits=lambda p, g, m, v, *rates: all(x.dtype == torch.float32 and x.is_contiguous() for x in (p, g, m, v)),
    ),
    "cautious_step_": CForm(
        functions.cautious_step_,
        "48088c69",
        lambda: (_waves(3, 37), _waves(3, 37).cos(), 0.5, 0.25),
        tensors=2,
        fits=lambda p, update, *rates: p.dtype == torch.float32 and p.is_contiguous() and update.is_contiguous(),
    ),
    "normed_rotary": CForm(
        functions.normed_rotary,
        "f381e780",
        _rotary_example,
        fits=lambda x, cos, sin, scale: cos.size(0) == 1,  # one position per column
    ),
    "block_attention": CForm(
        functions.block_attention,
        "54022b74",
        lambda: (*(_waves(2, 128, 32).mul(f).cos().bfloat16() for f in (1.0, 2.0, 3.0)), 32),
        tensors=3,
        fits=lambda q, k, v, window: (
            all(x.dtype == torch.bfloat16 for x in (q, k, v))
            and q.numel() > 0
            and (window % 32 == 0 or window >= q.size(1))
            and functions.amx_attends(q.element_size(), *q.shape[1:])
        ),
        tolerance=1e-2,  # the plain form rounds the scores too
    ),
    "block_softmax_": CForm(functions.block_softmax_, "92f31ea6", lambda: (_waves(2, 5, 9), 4, 3, 0.3)),
    "block_softmax_backward_": CForm(
        functions.block_softmax_backward_,
        "e1a07a38",
        lambda: (_waves(2, 5, 9), _waves(2, 5, 9).square(), 0.3),
        tensors=2,
    ),
    "head_rows_": CForm(
        functions.head_rows_,
        "c3c09adf",
        lambda: (9 * _waves(3, 37), torch.tensor([0, 36, 5], device="cpu"), _waves(3).abs(), 15.0, True),
        # e^cap, summed over a vocabulary, must be finite.
        fits=lambda logits, targets, weights, cap, backward: (
            cap <= 64
            and (targets.dtype, weights.dtype) == (torch.int64, torch.float32)
            and targets.is_contiguous()
            and weights.is_contiguous()
        ),
    ),
}
"""By the name of the plain function. A changed fingerprint is printed by tests/test_fast_path.py."""
