"""How fast this machine trains: measured by training for a moment, before a plan or a run."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import OptimizerConfig
from nanochat.planning.hardware import Gpu, Pace
from nanochat.planning.law import Choice, Law, candidates_by_depth
from nanochat.planning.memory import memory_by_kind
from nanochat.runtime import Runtime, device_name
from nanochat.scaling import REFERENCE_DEPTH, USUAL_SHARE_OF_PEAK, align_batch, estimate
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.session import choose_device_batch, measure_peak_flops
from nanochat.trainer import Trainer
from scripts._device_batch import random_batch
from scripts._train import batch_for_minutes, compiled_loss, make_optimizer, steps_in

MEASURING_SECONDS = 20.0
SHORTEST_ROW = 256  # tokens: fewer would not keep the matrix products busy
PROBES = (2, 6)  # depths that are timed; the others' pace lies on the line through them


def choose_depth(
    minutes: float, total_batch_size: int, of_depth: Callable[[int], GPTConfig], runtime: Runtime
) -> Choice:
    """The depth that will have learnt the most after so many minutes here, by the fitted law; alike on all processes.

    `total_batch_size` is in tokens, -1 for what --minutes takes. Raises UserError where there is no law.
    """
    law = Law.load()
    if law is None:
        raise UserError("--depth=-1 needs a fitted scaling law (bash runs/scaling_laws.sh); give a depth")
    total = batch_for_minutes(runtime.device.type) if total_batch_size == -1 else total_batch_size
    choice = best_depth(minutes, align_batch(total, of_depth(2).sequence_len), of_depth, law, runtime)
    return choice._replace(key=int(runtime.all_reduce_max(choice.key, "choosing the depth")))


def best_depth(
    minutes: float, batch_tokens: int, of_depth: Callable[[int], GPTConfig], law: Law, runtime: Runtime
) -> Choice:
    """The depth, of 1 to 12, that ends with the lowest loss after so many minutes on this machine.

    `batch_tokens` are those of a step, over all processes.
    """
    gpu, candidates = this_machine(runtime), candidates_by_depth(of_depth, range(1, REFERENCE_DEPTH + 1))
    near, far = (measure_pace(of_depth(depth), gpu, runtime) for depth in PROBES)
    first, last = (candidates[depth] for depth in PROBES)

    def between(x: float, x0: float, x1: float, y0: float, y1: float) -> float:
        # Less than a third of what was measured is not to be believed, however small the model.
        return max(y0 + (x - x0) / (x1 - x0) * (y1 - y0), y0 / 3)

    def flops(depth: int) -> float:
        model = candidates[depth]
        token = between(
            model.flops_per_token, first.flops_per_token, last.flops_per_token, near.token_seconds, far.token_seconds
        )
        update = between(model.params, first.params, last.params, near.update_seconds, far.update_seconds)
        step = runtime.all_reduce_max(
            Pace(token, update, "").step_seconds(batch_tokens // runtime.world_size), "timing a step"
        )
        return steps_in(minutes, step) * batch_tokens * model.flops_per_token

    return law.best(flops, candidates)


def this_machine(runtime: Runtime) -> Gpu:
    """The device at hand, its peak measured."""
    name = device_name(runtime.device)
    if runtime.device.type == "cuda":
        memory = float(torch.cuda.mem_get_info(runtime.device)[0])
    else:
        name, memory = f"{name}, {os.cpu_count()} CPUs", available_memory()
    # Other work on the machine can only lower it; processes must agree, as they measure together afterwards.
    peak = runtime.all_reduce_max(max(measure_peak_flops(runtime) for _ in range(3)), "measuring the peak")
    memory = -runtime.all_reduce_max(-memory, "measuring the memory")
    return Gpu(name, memory, peak, None, 0.0, None, str(runtime.dtype).removeprefix("torch."), runtime.device.type)


def available_memory(path: str = "/proc/meminfo") -> float:
    """Bytes of memory that programs can still have; all there is where the system does not say."""
    try:
        lines = Path(path).read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def measure_pace(config: GPTConfig, gpu: Gpu, runtime: Runtime) -> Pace:
    """Time a micro-batch and an update of the model; where that takes too long, of a shorter or shallower one."""
    cost, params = estimate(config)
    usual = USUAL_SHARE_OF_PEAK * gpu.peak_flops
    for trial, rows in trials(config, choose_device_batch(-1, 2**30, config.sequence_len, runtime)):
        trial_cost, trial_params = estimate(trial)
        tokens = rows * trial.sequence_len
        seconds = 2 * (tokens * trial_cost + update_flops(trial)) / usual  # once to warm up, at least once to measure
        memory = sum(memory_by_kind(trial, gpu, 1, rows).values())
        if seconds > MEASURING_SECONDS or memory > gpu.memory_bytes / 2:
            continue
        micro, update = time_step(trial, rows, runtime)
        layers = "all" if trial.n_layer == config.n_layer else f"{trial.n_layer} of the"
        return Pace(
            micro / tokens * cost / trial_cost,
            update * params["total"] / trial_params["total"],
            f"measured on this machine with {layers} layers: {micro:.3g} s for {rows} x {trial.sequence_len} "
            f"tokens and {update:.3g} s for an update, scaled by FLOPs and parameters",
        )
    return Pace(
        cost / usual,
        0.0,
        f"{USUAL_SHARE_OF_PEAK:.0%} of the measured peak of matrix products, "
        "as even one layer is too large to be measured here in a moment",
    )


def trials(config: GPTConfig, rows: int) -> Iterator[tuple[GPTConfig, int]]:
    """(model, rows) to measure, the real thing first, then ever cheaper: fewer rows, shorter ones, fewer layers."""
    yield config, rows
    yield config, 1
    while config.sequence_len > SHORTEST_ROW:
        config = replace(config, sequence_len=max(SHORTEST_ROW, config.sequence_len // 2))
        yield config, 1
    while config.n_layer > 1:
        config = replace(config, n_layer=config.n_layer // 2)
        yield config, 1


def update_flops(config: GPTConfig) -> float:
    """FLOPs of one Muon update: per matrix and iteration two products with its smaller side's Gram matrix, one of
    that with itself. What AdamW does is small beside it."""
    with torch.device("meta"):
        shapes = [sorted(p.shape) for p in GPT(config).blocks.parameters()]
    return sum(5 * (4 * small**2 * large + 2 * small**3) for small, large in shapes)


def time_step(config: GPTConfig, rows: int, runtime: Runtime) -> tuple[float, float]:
    """(seconds of one micro-batch, seconds of one update), the fastest of a few after a warm-up."""
    model = GPT.create(config, runtime.device, runtime.dtype)
    optimizer = make_optimizer(model, OptimizerConfig(), runtime, 1.0, 0.0)
    trainer = Trainer(
        model,
        optimizer,
        None,  # type: ignore[arg-type]
        runtime,
        ScheduleConfig(1000),
        rows,
        loss_fn=compiled_loss(model, "auto", runtime),
    )
    batch = random_batch(rows, config.sequence_len, config.vocab_size, runtime)
    trainer.step(batch)
    micro: list[float] = []
    update: list[float] = []
    while not micro or (
        len(micro) < 5 and runtime.all_reduce_max(sum(micro) + sum(update), "timing steps") < MEASURING_SECONDS / 8
    ):
        started = read_clock(runtime)
        trainer.accumulate(batch)
        summed = read_clock(runtime)
        optimizer.step()
        micro.append(summed - started)
        update.append(read_clock(runtime) - summed)
        model.zero_grad(set_to_none=True)
    return runtime.all_reduce_max(min(micro), "timing steps"), runtime.all_reduce_max(min(update), "timing steps")


def read_clock(runtime: Runtime) -> float:
    """Seconds, once the device is idle."""
    runtime.synchronize()
    return time.perf_counter()
