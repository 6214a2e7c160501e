"""From a model to its training step: optimizer, compiled loss, and rows per micro-batch.

The rows are chosen by the device, and on a GPU by trying what its memory holds.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from nanochat.common import UserError
from nanochat.data.batches import Batch
from nanochat.gpt import GPT
from nanochat.optim import DistMuonAdamW, MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.optimizer.update_rules import optimizer_bytes
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
    if requested > 0:
        return min(requested, own)
    tokens = CPU_TOKENS if runtime.device.type == "cpu" else GPU_TOKENS
    return max(1, min(own, tokens // sequence_len))


def fit_device_batch(step: TrainStep, requested: int, T: int) -> None:
    """Lower the step's device batch to what the GPU's memory holds of T-token rows, unless a size was requested.

    Nothing to do on a CPU.
    """
    if requested > 0 or step.runtime.device.type != "cuda":
        return
    chosen = step.device_batch_size
    step.device_batch_size = find_device_batch(partial(try_micro_batches, step, T=T), chosen, step.runtime)
    if step.device_batch_size < chosen:
        step.runtime.print0(f"{chosen} rows do not fit in memory: {step.device_batch_size} per micro-batch")


def find_device_batch(trial: Callable[[int], None], rows: int, runtime: Runtime) -> int:
    """`rows`, halved until `trial(rows)` raises torch.OutOfMemoryError on no rank."""
    while True:
        try:
            trial(rows)
            failed = False
        except torch.OutOfMemoryError:
            failed = True
        if not runtime.all_reduce_max(float(failed), "checking that the batch fits"):
            return rows
        if rows == 1:
            raise UserError("not even one row fits in the GPU's memory: give a smaller --depth or --max-seq-len")
        rows //= 2


def try_micro_batches(step: TrainStep, rows: int, T: int) -> None:
    """Run two random micro-batches, the second with the first one's gradients and optimizer state in memory.

    Raises OutOfMemoryError if they do not fit. Whatever torch.compile compiles here, the run uses.
    """
    runtime = step.runtime
    torch.cuda.empty_cache()  # left over from a larger trial
    step.device_batch_size = rows
    size = optimizer_bytes(step.optimizer.param_groups) // runtime.world_size
    optimizer_state = torch.empty(size, dtype=torch.uint8, device=runtime.device)
    batch = random_batch(2 * rows * runtime.world_size, T, step.model.config.vocab_size, runtime)
    try:
        for micro in step.micro_batches(batch):
            step.add_gradients(*micro, num_targets=2 * rows * T)
    finally:
        step.model.zero_grad(set_to_none=True)
    del optimizer_state  # held until here


def random_batch(rows: int, T: int, vocab_size: int, runtime: Runtime, supervised: float = 1.0) -> Batch:
    """This rank's share of a global batch of random tokens, for timing; every 1/supervised-th position has a target."""
    own = len(range(runtime.rank, rows, runtime.world_size))
    tokens = torch.randint(vocab_size, (own, T + 1), generator=torch.Generator().manual_seed(runtime.seed))
    targets = torch.full((own, T), -1)
    every = round(1 / supervised)
    targets[:, ::every] = tokens[:, 1::every]
    return Batch(tokens[:, :-1].contiguous(), targets, None, "timing")
