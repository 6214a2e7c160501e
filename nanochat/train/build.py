"""From a model to its training step: optimizer, device batch, compiled loss."""

import shutil

import torch

from nanochat.common import warn
from nanochat.flash_attention import prepare
from nanochat.gpt import GPT
from nanochat.optim import DistMuonAdamW, MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.train.config import TrainConfig
from nanochat.train.device_batch import choose_device_batch
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import LossFunction, TrainStep


def create_step(
    model: GPT,
    config: TrainConfig,
    recipe: str,
    schedule: ScheduleConfig,
    runtime: Runtime,
    *,
    rows: int,
    T: int,
    lr_scale: float,
    weight_decay: float,
    compile: str,
) -> TrainStep:
    """The step that trains `model` on global batches of `rows` rows of T tokens, with the recipe's scaled rates."""
    optimizer = make_optimizer(model, config.optimizer_config(recipe), runtime, lr_scale, weight_decay)
    device_batch_size = choose_device_batch(config.device_batch_size, rows, T, runtime)
    return TrainStep(model, optimizer, runtime, schedule, device_batch_size, compiled_loss(model, compile, runtime))


def make_optimizer(
    model: GPT, config: OptimizerConfig, runtime: Runtime, lr_scale: float, weight_decay: float
) -> MuonAdamW:
    """MuonAdamW for this model; the distributed form when there are several ranks."""
    # Orthogonalising in bf16 pays only where bf16 products are fast.
    ns_dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
    groups = build_param_groups(model, config, lr_scale=lr_scale, weight_decay=weight_decay, ns_dtype=ns_dtype)
    return (DistMuonAdamW if runtime.world_size > 1 else MuonAdamW)(groups)


def compiled_loss(model: GPT, mode: str, runtime: Runtime) -> LossFunction:
    """model.loss, compiled if `mode` is "on", or "auto" on a CUDA device with a C compiler at hand."""
    if mode == "off" or (mode == "auto" and runtime.device.type != "cuda"):
        return model.loss
    if mode == "auto" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warn("no C compiler found, which torch.compile needs: training without it, slower (install gcc or clang)")
        return model.loss
    prepare(model.config, runtime.device, model.compute_dtype)
    return torch.compile(model.loss, dynamic=False)
