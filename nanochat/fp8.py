"""Matrix products of the blocks in 8-bit floating point, by torchao (the optional extra `torchao`).

Only the products change: a converted layer holds the very same fp32 parameter under the same name, so optimizer
groups and checkpoints know nothing of it. torchao casts weight, input and gradient to fp8 with a scale each, fresh
for every product: one per tensor (tensorwise, the fastest) or one per row (rowwise, more exact). What comes out
has the dtype of the input, bfloat16.

Left as they are: the output head, whose chunked loss multiplies the weight itself (loss_head.py), embeddings, and
layers too small to gain.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.gpt import GPT, Linear
from nanochat.runtime import Runtime

RECIPES = ("tensorwise", "rowwise")
MULTIPLE = 16  # the hardware's fp8 products take sizes divisible by this, the number of tokens included
SMALLEST = 128  # casting the factors costs more than the product saves below


def convert(model: GPT, recipe: str, runtime: Runtime) -> None:
    """Let the large layers of the blocks multiply in fp8, in place. UserError where this machine or model cannot."""
    check(model, recipe, runtime)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("--fp8 needs torchao: pip install 'nanochat[torchao]', or leave --fp8 out") from None
    convert_to_float8_training(
        model.blocks,
        config=Float8LinearConfig.from_recipe_name(recipe),
        module_filter_fn=lambda module, name: convertible(module),
    )


def check(model: GPT, recipe: str, runtime: Runtime) -> None:
    """Refuse what would fail later, or gain nothing."""
    if recipe not in RECIPES:
        raise UserError(f"--fp8-recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if runtime.device.type != "cuda":
        raise UserError(f"--fp8 needs an NVIDIA GPU, not {runtime.device.type}; leave it out")
    capability = torch.cuda.get_device_capability(runtime.device)
    if capability < (8, 9):
        found = ".".join(map(str, capability))
        raise UserError(f"--fp8 needs a GPU of compute capability 8.9 or newer, this one has {found}; leave it out")
    if model.compute_dtype != torch.bfloat16:
        raise UserError(
            f"--fp8 works beside bfloat16, not {str(model.compute_dtype).removeprefix('torch.')}; unset NANOCHAT_DTYPE"
        )
    if model.config.sequence_len % MULTIPLE:
        raise UserError(f"--fp8 needs --max-seq-len divisible by {MULTIPLE}, got {model.config.sequence_len}")
    if not any(convertible(module) for module in model.blocks.modules()):
        raise UserError(f"--fp8: this model has no layer of {SMALLEST} x {SMALLEST} or more; leave it out")


def convertible(module: nn.Module) -> bool:
    """Whether a layer is large enough, and its sizes fit the hardware."""
    if not isinstance(module, nn.Linear):
        return False
    sizes = (module.in_features, module.out_features)
    return min(sizes) >= SMALLEST and all(size % MULTIPLE == 0 for size in sizes)


@contextlib.contextmanager
def without_fp8(model: GPT) -> Iterator[None]:
    """Inside, converted layers multiply in the dtype of their input again: what is evaluated is the model that a
    checkpoint holds, and a single generated token is no multiple of 16. Nothing happens to other models."""
    swapped: list[tuple[nn.Module, str, Any]] = [
        (parent, name, child)
        for parent in model.blocks.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and type(child) is not Linear
    ]
    for parent, name, layer in swapped:
        setattr(parent, name, plain(layer))
    try:
        yield
    finally:
        for parent, name, layer in swapped:  # the same objects, so that nothing is compiled anew
            setattr(parent, name, layer)


def plain(layer: nn.Linear) -> Linear:
    """The unconverted form of a layer, sharing its parameter."""
    with torch.device("meta"):
        linear = Linear(layer.in_features, layer.out_features)
    linear.weight = layer.weight
    return linear
