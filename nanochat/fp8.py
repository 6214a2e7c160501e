"""Matrix products of the blocks in 8-bit floating point, by torchao (the optional extra `torchao`).

Only the products change: a converted layer holds the same fp32 parameter under the same name, so optimizer groups and
checkpoints are unaffected. torchao casts weight, input and gradient to fp8, each with a scale computed for every
product: one per tensor (tensorwise, the fastest) or one per row (rowwise, more exact). The result has the dtype of the
input, bfloat16.

Not converted: the output head, whose chunked loss multiplies the weight itself (loss_head.py), embeddings, and layers
too small to gain.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from nanochat.common import UserError, warn
from nanochat.common.fast_path import fingerprint
from nanochat.gpt import GPT, Linear
from nanochat.runtime import Runtime

RECIPES = ("tensorwise", "rowwise")
MULTIPLE = 16  # the hardware's fp8 products take sizes divisible by this, the number of tokens included
SMALLEST = 128  # in smaller layers casting the factors costs more than the product saves
MAX_ERROR = 0.2  # of a converted layer's result, relative; the rounding of fp8 alone makes about 0.04
PLAIN_FORM = "8f413056"  # fingerprint of the Linear.forward that fp8 layers replace


def convert(model: GPT, recipe: str, runtime: Runtime) -> None:
    """Convert the large layers of the blocks to fp8 products, in place. UserError if this machine or model cannot.

    Layers of another class than gpt.Linear stay as they are, with a warning; so does the whole model if the first
    converted layer gives another result than in bfloat16.
    """
    check(model, recipe, runtime)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("--fp8 needs torchao: pip install 'nanochat[torchao]', or leave --fp8 out") from None
    others = [n for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear) and type(m) is not Linear]
    if others:
        warn(f"--fp8: {len(others)} layers are not gpt.Linear and stay in bfloat16: {', '.join(others[:3])}")
    names = [name for name, module in model.blocks.named_modules() if convertible(module)]
    convert_to_float8_training(
        model.blocks,
        config=Float8LinearConfig.from_recipe_name(recipe),
        module_filter_fn=lambda module, name: convertible(module),
    )
    for name in names:
        model.blocks.get_submodule(name).is_fp8 = True
    error = conversion_error(model.blocks.get_submodule(names[0]))
    if not error <= MAX_ERROR:  # NaN is not
        warn(f"--fp8: a layer's result differs from bfloat16's (relative error {error:.2g}): training in bfloat16")
        for parent, name, layer in converted_layers(model):
            setattr(parent, name, plain(layer))


def conversion_error(layer: nn.Module) -> float:
    """Relative difference between a converted layer and its plain form on a small input."""
    assert isinstance(layer, nn.Linear)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(MULTIPLE, layer.in_features, generator=draw).to(layer.weight.device, torch.bfloat16)
    with torch.no_grad():
        wanted = plain(layer)(x).float()
        return float((layer(x).float() - wanted).norm() / wanted.norm().clamp_min(1e-9))


def check(model: GPT, recipe: str, runtime: Runtime) -> None:
    """Raise UserError for what would fail later, or gain nothing."""
    if fingerprint(Linear.forward) != PLAIN_FORM:
        raise UserError(
            "--fp8 does not implement gpt.Linear.forward as it is now (nanochat/common/fast_path.py); leave it out"
        )
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
            f"--fp8 works with bfloat16, not {str(model.compute_dtype).removeprefix('torch.')}; unset NANOCHAT_DTYPE"
        )
    if model.config.sequence_len % MULTIPLE:
        raise UserError(f"--fp8 needs --max-seq-len divisible by {MULTIPLE}, got {model.config.sequence_len}")
    if not any(convertible(module) for module in model.blocks.modules()):
        raise UserError(f"--fp8: this model has no layer of {SMALLEST} x {SMALLEST} or more; leave it out")


def convertible(module: nn.Module) -> bool:
    """Whether a module is a gpt.Linear, large enough, and of sizes that fit the hardware."""
    if type(module) is not Linear:
        return False
    sizes = (module.in_features, module.out_features)
    return min(sizes) >= SMALLEST and all(size % MULTIPLE == 0 for size in sizes)


def converted_layers(model: GPT) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of every layer that `convert` has converted."""
    return [
        (parent, name, child)
        for parent in model.blocks.modules()
        for name, child in parent.named_children()
        if getattr(child, "is_fp8", False)
    ]


@contextlib.contextmanager
def without_fp8(model: GPT) -> Iterator[None]:
    """Context in which converted layers multiply in the dtype of their input: evaluation is of the model that a
    checkpoint holds, and a single generated token is not a multiple of 16. Other models are unchanged."""
    layers = converted_layers(model)
    for parent, name, layer in layers:
        setattr(parent, name, plain(layer))
    try:
        yield
    finally:
        for parent, name, layer in layers:  # the same objects, so that nothing is recompiled
            setattr(parent, name, layer)


def plain(layer: nn.Linear) -> Linear:
    """The unconverted form of a layer, sharing its parameter."""
    with torch.device("meta"):
        linear = Linear(layer.in_features, layer.out_features)
    linear.weight = layer.weight
    return linear
