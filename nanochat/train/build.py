"""From a model to its training step: optimizer, compiled loss, and rows per micro-batch.

On a GPU device_batch.py lowers the rows to what its memory holds.
"""

import math

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT
from nanochat.optim import DistMuonAdamW, MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.train.compiling import compiled_loss
from nanochat.train.config import TrainConfig
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import TrainStep

CPU_TOKENS, GPU_TOKENS = 4096, 65536  # per micro-batch: keeps a CPU's caches warm, a GPU busy


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


def choose_device_batch(requested: int, rows: int, sequence_len: int, runtime: Runtime) -> int:
    """Rows per micro-batch: as requested, or (-1) by the device; at most this rank's share of `rows` per step."""
    own = math.ceil(rows / runtime.world_size)
    if requested > own:
        runtime.print0(f"--device-batch-size={requested}: a step has {own} rows on each rank, so it is {own}")
    if requested > 0:
        return min(requested, own)
    return min(own, usual_rows(runtime.device.type, sequence_len))


def usual_rows(device_type: str, sequence_len: int) -> int:
    """Rows per micro-batch that are enough for a device; more would not make it faster."""
    return max(1, (CPU_TOKENS if device_type == "cpu" else GPU_TOKENS) // sequence_len)


def random_batch(rows: int, T: int, vocab_size: int, runtime: Runtime, supervised: float = 1.0) -> Batch:
    """This rank's share of a global batch of random tokens, for timing; every 1/supervised-th position has a target."""
    own = len(range(runtime.rank, rows, runtime.world_size))
    tokens = torch.randint(vocab_size, (own, T + 1), generator=torch.Generator().manual_seed(runtime.seed))
    targets = torch.full((own, T), -1)
    every = round(1 / supervised)
    targets[:, ::every] = tokens[:, 1::every]
    return Batch(tokens[:, :-1].contiguous(), targets, None, "timing")
