"""One whole optimizer step, as base_train takes it: `python -m bench.train --depth=4`.

matmul_share says how much of the time is well spent: how long the products of all linear layers of a micro-batch take,
run bare at the same shapes and in the same dtype, divided by how long forward and backward take. 1 would mean that
training costs nothing but the products it cannot do without. Products and steps are timed in turn, in one run.

`--fit` takes the rows per micro-batch that base_train would. `--profile=FILE` writes a table of the operations of one
step, the slowest first, and beside it a trace for chrome://tracing.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import _run
from bench._common import (
    Flags,
    LinearProducts,
    linear_shapes,
    model_config,
    peak_during,
    peak_memory,
    sample_in_turn,
    tensor_bytes,
)
from bench._run import Result
from nanochat.common import format_count
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.planning.hardware import expected_pace, known_gpu
from nanochat.runtime import Runtime, process_age
from nanochat.scaling import make_plan
from nanochat.train.build import choose_device_batch, make_optimizer, random_batch
from nanochat.train.compiling import compiled_loss
from nanochat.train.config import TrainConfig
from nanochat.train.device_batch import fit_device_batch
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import TrainStep
from nanochat.train.timing import measure_peak_flops
from scripts import _cli

LONG_RUN = 10_000  # steps in the plan; only the first few are taken


@dataclass
class TrainFlags(Flags):
    """Sizes, and how long to measure."""

    fit: bool = False
    """Rows per micro-batch as base_train chooses them, by the device and its memory; --batch is not used."""
    profile: str = ""
    """File for a table of one step's operations by time; FILE.trace.json.gz is their trace."""


@dataclass
class TimedStep(TrainStep):
    """An optimizer step that records how long its forward and backward passes took."""

    gradient_seconds: list[float] = field(default_factory=list)

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        started = time.perf_counter()
        result = super().accumulate(batch)  # ends with the loss on the CPU: queued work is done
        self.gradient_seconds.append(time.perf_counter() - started)
        return result


def make_step(flags: TrainFlags, runtime: Runtime) -> TimedStep:
    """The optimizer step of a fresh model; its batch is one micro-batch."""
    config = model_config(flags)
    rows = choose_device_batch(-1, LONG_RUN, flags.seq_len, runtime) if flags.fit else flags.batch
    rates = TrainConfig().optimizer_config(flags.recipe)
    plan = make_plan(config, num_iterations=LONG_RUN, total_batch_size=flags.tokens, weight_decay=rates.weight_decay)
    model = GPT.create(config, runtime.device, runtime.dtype)
    optimizer = make_optimizer(model, rates, runtime, plan.lr_scale, plan.weight_decay)
    loss_fn = compiled_loss(model, "auto", runtime)
    step = TimedStep(model, optimizer, runtime, ScheduleConfig(LONG_RUN), rows, loss_fn)
    if flags.fit:
        fit_device_batch(step, -1, lambda: flags.seq_len)
    return step


def measure(flags: TrainFlags, runtime: Runtime) -> Result:
    program = peak_memory(runtime)
    train_step = make_step(flags, runtime)
    flags = replace(flags, batch=train_step.device_batch_size)
    batch = random_batch(flags.batch, flags.seq_len, flags.vocab_size, runtime)
    step = partial(train_step, batch)
    step()
    first = peak_memory(runtime)
    around = peak_during(step, runtime)
    age = process_age()
    peak = max(first, peak_memory(runtime))  # before the bare products allocate theirs
    state = state_bytes(train_step)

    shapes = linear_shapes(train_step.model)
    products = LinearProducts(shapes, flags.tokens, runtime)
    peaks: list[float] = []
    actions: dict[str, Callable[[], Any]] = {
        "products": products,
        "step": step,
        "peak": lambda: peaks.append(measure_peak_flops(runtime, 0.1)),
    }
    samples = sample_in_turn(actions, flags.seconds, runtime, least=5)
    seconds, matmul = median(samples["step"]), median(samples["products"])
    gradient = train_step.gradient_seconds[-len(samples["step"]) :]  # of the same steps
    update = [whole - part for whole, part in zip(samples["step"], gradient)]
    flops = train_step.model.estimate_flops() * flags.tokens / seconds
    busy = profile_step(step, flags.profile, runtime) if flags.profile else None
    values: dict[str, Any] = {
        "batch": flags.batch,
        "tokens_per_second": flags.tokens / seconds,
        "step_seconds": seconds,
        "forward_backward_seconds": median(gradient),
        "optimizer_seconds": median(update),  # everything after the gradients
        "matmul_seconds": matmul,
        "matmul_share": matmul / median(gradient),
        "matmul_share_of_fastest": min(samples["products"]) / min(gradient),  # steadier on a shared machine
        "flops_per_second": flops,
        "share_of_peak": flops / median(peaks),
        **shares(train_step.model.config, flops, flags.tokens / seconds, runtime),
        "busy_share": busy and busy / seconds,
        "seconds_to_second_step": age,
        "peak_memory_bytes": peak,
        "program_memory_bytes": program,  # before there was a model
        "state_bytes": state,
        "peak_step_bytes_above_state": around and around[1] - state,
        "steps_timed": len(gradient),
        "num_params": train_step.model.num_scaling_params()["total"],
    }
    return Result(f"bench.train on {runtime.describe()}", ["", ""], describe(values), values)


def shares(config: GPTConfig, flops: float, tokens: float, runtime: Runtime) -> dict[str, float | None]:
    """FLOP/s as a share of the data sheet's, tokens a second of the planner's forecast; None for an unknown device."""
    gpu = known_gpu(runtime)
    return {
        "share_of_data_sheet": flops / gpu.peak_flops if gpu else None,
        "share_of_forecast": tokens * expected_pace(config, gpu).token_seconds if gpu else None,
    }


def profile_step(step: Callable[[], Any], path: str, runtime: Runtime) -> float | None:
    """Write the operations of one step, and their trace; returns the seconds in which kernels ran, on a GPU."""
    on_gpu = runtime.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        step()
        runtime.synchronize()
    operations = profiled.key_averages()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    Path(path).write_text(operations.table(sort_by=by, row_limit=40), encoding="utf-8")
    profiled.export_chrome_trace(f"{path}.trace.json.gz")
    return kernel_seconds(operations) if on_gpu else None


def kernel_seconds(operations: Iterable[Any]) -> float:
    """Time on the GPU. Operations of the CPU count their kernels' time once more, annotations what is within them."""
    kernels = [o for o in operations if o.device_type != torch.autograd.DeviceType.CPU and not o.is_user_annotation]
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e6


def state_bytes(step: TrainStep) -> int:
    """Memory of weights, gradients and optimizer state."""
    weights = tensor_bytes(step.model.parameters())
    return 2 * weights + tensor_bytes(t for state in step.optimizer.state.values() for t in state.values())


def describe(values: dict[str, Any]) -> list[Sequence[str]]:
    """The figures with their units, for the table."""

    def bytes_of(key: str) -> str:
        return "unknown" if values[key] is None else f"{values[key] / 2**20:,.0f} MiB"

    def share_of(key: str) -> str:
        return "unknown" if values[key] is None else f"{values[key]:.1%}"

    return [
        ("parameters", f"{values['num_params']:,}"),
        ("tokens a second", f"{values['tokens_per_second']:,.0f}"),
        ("one step", f"{values['step_seconds']:.4f} s"),
        ("  forward and backward", f"{values['forward_backward_seconds']:.4f} s"),
        ("  update", f"{values['optimizer_seconds']:.4f} s"),
        ("bare products of the linear layers", f"{values['matmul_seconds']:.4f} s"),
        ("  their share of forward and backward", f"{values['matmul_share']:.1%}"),
        ("  the same for the fastest of each", f"{values['matmul_share_of_fastest']:.1%}"),
        ("FLOP/s", format_count(values["flops_per_second"])),
        ("  share of the matrix peak", f"{values['share_of_peak']:.1%}"),
        ("  share of the data sheet's peak", share_of("share_of_data_sheet")),
        ("  tokens a second against the planner's forecast", share_of("share_of_forecast")),
        ("from the program's start to the second step's end", f"{values['seconds_to_second_step']:.1f} s"),
        ("peak memory", bytes_of("peak_memory_bytes")),
        ("  before there was a model", bytes_of("program_memory_bytes")),
        ("  of a step, above weights, gradients, optimizer state", bytes_of("peak_step_bytes_above_state")),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("train", TrainFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
