"""What a pretraining run will take, before it starts: `python -m scripts.plan --depth=24 --gpu=h100 --num-gpus=8`.

Steps, FLOPs, memory, time and cost, with the assumptions behind them. `--gpu=here` (the default) measures this
machine by training for a few steps.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, say
from nanochat.gpt import GPT, GPTConfig
from nanochat.law import Law
from nanochat.optim import OptimizerConfig
from nanochat.planner import Gpu, Pace, RunPlan, expected_pace, find_gpu, memory_by_kind, plan_run
from nanochat.runtime import Runtime, device_name
from nanochat.scaling import USUAL_SHARE_OF_PEAK, Plan, align_batch, estimate, make_plan
from nanochat.session import choose_device_batch, measure_peak_flops
from nanochat.trainer import ScheduleConfig, Trainer
from scripts import _cli
from scripts._model import ModelFlags, network
from scripts._train import batch_for_minutes, compiled_loss, make_optimizer, print_table, random_batch, steps_in

MEASURING_SECONDS = 20.0
SHORTEST_ROW = 256  # tokens: fewer would not keep the matrix products busy


@dataclass
class Config(ModelFlags):
    """Plan a pretraining run: steps, memory, time and cost. The model's and the horizon's flags are base_train's."""

    gpu: str = "here"
    """h100, a100, 4090, … (an unknown one lists them all); here measures this machine."""
    num_gpus: int = -1
    """GPUs that share each step; -1 is one, or with --gpu=here all there are."""
    fp8: bool = False
    """Matrix products in fp8."""
    minutes: float = -1.0
    """Plan for as many steps as fit in this time."""
    dollars_per_gpu_hour: float = -1.0
    """Price; -1 takes the GPU's usual one."""
    json: bool = False
    """Print one line of JSON instead of the table."""
    vocab_size: int = 32768
    """Tokens in the vocabulary."""
    num_iterations: int = -1
    """Horizon in optimizer steps."""
    total_batch_size: int = -1
    """Tokens per optimizer step over all GPUs; -1 derives it."""
    device_batch_size: int = -1
    """Rows per micro-batch and GPU; -1 finds the largest that fits."""

    def __post_init__(self) -> None:
        if self.num_gpus < 1 and self.num_gpus != -1:
            raise UserError(f"--num-gpus must be at least 1, or -1 for all there are, got {self.num_gpus}")
        if self.dollars_per_gpu_hour < 0 and self.dollars_per_gpu_hour != -1:
            raise UserError(f"--dollars-per-gpu-hour cannot be negative, got {self.dollars_per_gpu_hour:g}")


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, print."""
    config = _cli.parse(Config, argv)
    model_config = network(config, config.vocab_size)(config.depth)
    make_plan(model_config, **horizon(config, num_steps=1))  # a mistake is refused before anything is measured
    made = plan_here(config, model_config) if config.gpu.lower() == "here" else plan_there(config, model_config)
    if config.json:
        say(json.dumps(made.to_dict()))
        return
    print_table("plan", made.rows())
    say("It assumes:")
    for sentence in made.assumptions:
        say(f"- {sentence}")


def horizon(config: Config, num_steps: int = -1) -> dict[str, Any]:
    """make_plan's arguments; with --minutes it is `num_steps` that counts."""
    by_time = config.minutes > 0 and config.num_iterations == -1
    return {"num_iterations": num_steps if by_time else config.num_iterations, "target_flops": config.target_flops,
            "target_param_data_ratio": config.target_param_data_ratio,
            "total_batch_size": config.total_batch_size}  # fmt: skip


def fix_steps(config: Config, model_config: GPTConfig, pace: Pace, num_gpus: int, cpu: bool) -> Plan:
    """The plan of the horizon asked for; with --minutes the steps that fit, at base_train's batch."""
    if config.minutes <= 0 or config.num_iterations > 0:
        return make_plan(model_config, **horizon(config))
    if config.total_batch_size == -1:
        config = replace(config, total_batch_size=batch_for_minutes("cpu" if cpu else "cuda"))
    T = model_config.sequence_len
    rows = align_batch(config.total_batch_size, T) // T
    steps = steps_in(config.minutes, pace.step_seconds(math.ceil(rows / num_gpus) * T))
    plan = make_plan(model_config, **horizon(config, steps))
    plan.horizon = f"--minutes={config.minutes:g}"
    return plan


def plan_there(config: Config, model_config: GPTConfig) -> RunPlan:
    """On a GPU known by name: by the published runs' rule."""
    gpu = find_gpu(config.gpu)
    pace = expected_pace(model_config, gpu, config.fp8)
    num_gpus = max(1, config.num_gpus)
    plan = fix_steps(config, model_config, pace, num_gpus, cpu=False)
    return plan_run(model_config, plan, gpu, pace, num_gpus=num_gpus, device_batch_size=config.device_batch_size,
                    dollars_per_gpu_hour=config.dollars_per_gpu_hour, fp8=config.fp8, law=Law.load())  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# This machine


def plan_here(config: Config, model_config: GPTConfig) -> RunPlan:
    """On this machine: by training for a moment."""
    if config.fp8:
        raise UserError("--fp8 cannot be measured with --gpu=here: name the GPU, such as --gpu=h100")
    with Runtime.create() as runtime:
        cpu = runtime.device.type != "cuda"
        there = 1 if cpu else torch.cuda.device_count()
        num_gpus = there if config.num_gpus == -1 else config.num_gpus
        if num_gpus > there:
            raise UserError(f"--num-gpus={num_gpus}: this machine has {there}; name another with --gpu")
        if not config.json:
            say(f"measuring this machine: {runtime.describe()}")
        gpu = this_machine(runtime)
        pace = measure_pace(model_config, gpu, runtime)
        plan = fix_steps(config, model_config, pace, num_gpus, cpu)
        # On a CPU small micro-batches, which stay in its caches, are the fast ones.
        most = choose_device_batch(-1, 2**30, model_config.sequence_len, runtime) if cpu else None
        return plan_run(model_config, plan, gpu, pace, num_gpus=num_gpus, most_rows=most,
                        device_batch_size=config.device_batch_size, device_type=runtime.device.type,
                        dollars_per_gpu_hour=config.dollars_per_gpu_hour, law=Law.load())  # fmt: skip


def this_machine(runtime: Runtime) -> Gpu:
    """The device at hand, its peak measured."""
    name = device_name(runtime.device)
    if runtime.device.type == "cuda":
        memory = float(torch.cuda.mem_get_info(runtime.device)[0])
    else:
        name, memory = f"{name}, {os.cpu_count()} CPUs", available_memory()
    peak = max(measure_peak_flops(runtime) for _ in range(3))  # other work on the machine can only lower it
    return Gpu(name, memory, peak, None, 0.0, None, str(runtime.dtype).removeprefix("torch."))


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
        memory = sum(memory_by_kind(trial, gpu, 1, rows, runtime.device.type).values())
        if seconds > MEASURING_SECONDS or memory > gpu.memory_bytes / 2:
            continue
        micro, update = time_step(trial, rows, runtime)
        layers = "all" if trial.n_layer == config.n_layer else f"{trial.n_layer} of the"
        return Pace(micro / tokens * cost / trial_cost, update * params["total"] / trial_params["total"],
                    f"measured on this machine with {layers} layers: {micro:.3g} s for {rows} x {trial.sequence_len} "
                    f"tokens and {update:.3g} s for an update, scaled by FLOPs and parameters")  # fmt: skip
    return Pace(cost / usual, 0.0, f"{USUAL_SHARE_OF_PEAK:.0%} of the measured peak of matrix products, "
                "as even one layer is too large to be measured here in a moment")  # fmt: skip


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
    trainer = Trainer(model, optimizer, None, runtime, ScheduleConfig(1000), rows,  # type: ignore[arg-type]
                      loss_fn=compiled_loss(model, "auto", runtime))  # fmt: skip
    batch = random_batch(rows, config.sequence_len, config.vocab_size, runtime)
    trainer.step(batch)
    micro: list[float] = []
    update: list[float] = []
    while not micro or (len(micro) < 5 and sum(micro) + sum(update) < MEASURING_SECONDS / 8):
        started = read_clock(runtime)
        trainer.accumulate(batch)
        summed = read_clock(runtime)
        optimizer.step()
        micro.append(summed - started)
        update.append(read_clock(runtime) - summed)
        model.zero_grad(set_to_none=True)
    return min(micro), min(update)


def read_clock(runtime: Runtime) -> float:
    """Seconds, once the device is idle."""
    runtime.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    _cli.run(main)
