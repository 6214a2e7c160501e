"""How long steps take, and how many of them fit in --minutes."""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from nanochat.data.batches import Batch
from nanochat.gpt import GPT
from nanochat.planning.hardware import known_gpu
from nanochat.runtime import Runtime, process_age
from nanochat.scaling import REFERENCE_BATCH_TOKENS
from nanochat.train.config import TrainConfig
from nanochat.train.deadline import Deadline
from nanochat.train.device_batch import fit_device_batch
from nanochat.train.step import TrainStep
from nanochat.trainer import Trainer


def reference_peak(runtime: Runtime) -> tuple[float, str]:
    """(FLOP/s, where from) of matrix products in the run's dtype, the reference for "share of peak": the data sheet's
    of a known GPU, else measured, which other work on the machine makes too low."""
    gpu = known_gpu(runtime)
    if gpu and str(runtime.dtype) == f"torch.{gpu.dtype}":
        return gpu.peak_flops, f"{gpu.name}'s data sheet"
    return measure_peak_flops(runtime), "measured"


def measure_peak_flops(runtime: Runtime, seconds: float = 0.3) -> float:
    """FLOP/s of large matrix products on this machine, now."""
    size = 1024 if runtime.device.type == "cpu" else 8192
    draw = torch.Generator(runtime.device).manual_seed(0)  # a resumed run's global generator stays as it was saved
    a = torch.randn(size, size, generator=draw, device=runtime.device, dtype=runtime.dtype)
    a @ a
    runtime.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        runtime.synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def time_calls(call: Callable[[], Any], runtime: Runtime, seconds: float, most: int) -> list[float]:
    """Seconds of each call on the slowest rank, after one to warm up: at least two, and up to `most` within about
    `seconds`. Collective."""
    call()  # allocation, compilation
    times: list[float] = []
    while len(times) < 2 or (sum(times) < seconds and len(times) < most):
        runtime.synchronize()
        started = time.perf_counter()
        call()
        runtime.synchronize()
        times.append(runtime.all_reduce_max(time.perf_counter() - started, "timing steps"))
    return times


def batch_for_minutes(device_type: str) -> int:
    """Tokens per step where time, not the data, sets the horizon: many small steps on a slow machine."""
    return 2**13 if device_type == "cpu" else REFERENCE_BATCH_TOKENS


def steps_in(minutes: float, step_seconds: float) -> int:
    """How many steps to plan for; the remaining time is for the start, evaluations and the end."""
    return max(1, round(minutes * 60 * 0.93 / step_seconds))


def steps_for_minutes(
    config: TrainConfig, make_step: Callable[[GPT], TrainStep], model: GPT, batch: Batch, runtime: Runtime
) -> int:
    """How many optimizer steps fit in --minutes, by timing real ones on a copy of the model.

    A first estimate, which the run's Deadline corrects.
    """
    step = make_step(copy.deepcopy(model))
    fit_device_batch(step, config.device_batch_size, lambda: batch.inputs.size(1))
    seconds = median(time_calls(lambda: step(batch), runtime, min(10.0, config.minutes * 60 * 0.01), most=20))
    steps = steps_in(config.minutes, seconds)
    runtime.print0(
        f"timed a few steps on this machine, {seconds:.3g} s each: at this pace about {steps:,} fit in "
        f"{config.minutes:g} minutes; the clock decides"
    )
    return steps


def deadline_for(config: TrainConfig, trainer: Trainer, total_batch_tokens: int) -> Deadline | None:
    """The deadline of --minutes, counted from the start of the program to its end; None without one."""
    if not config.ends_on_time:
        return None
    age = trainer.runtime.all_reduce_max(process_age(), "reading the clock")
    step_seconds = config.minutes * 60 / trainer.schedule.num_steps
    for hook in trainer.hooks:
        if hook.seconds is None:  # a forward pass takes about a third of a training step
            hook.seconds = step_seconds * hook.tokens / total_batch_tokens / 3
    deadline = Deadline(config.minutes * 60 - age, trainer.final_hooks_seconds())
    deadline.resume(trainer.progress.step, trainer.progress.wall_seconds)
    return deadline
