"""The plan of a pretraining run on a machine: memory, time, cost and forecast loss, with the assumptions behind them.

scaling.py decides how many steps of how many tokens a run has; hardware.py, memory.py and law.py say what they cost
and what loss to expect.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat.common import format_count, format_seconds
from nanochat.gpt import GPTConfig
from nanochat.optimizer.param_groups import OptimizerConfig
from nanochat.planning.hardware import Gpu, Pace
from nanochat.planning.law import Forecast, Law
from nanochat.planning.memory import choose_rows, memory_by_kind, uncounted_weights
from nanochat.runtime import process_age
from nanochat.scaling import Plan, beyond_measured, describe, scaling_params
from nanochat.train.progress import Progress

MAX_EXTRAPOLATION = 1000.0  # beyond this many times the FLOPs of the law's largest run, no forecast is given
USABLE_MEMORY = 0.93  # the estimate is up to 5% low (tests/test_memory.py), and the allocator fragments memory


@dataclass
class RunPlan:
    """A pretraining run on a machine."""

    config: GPTConfig
    plan: Plan
    gpu: Gpu
    num_gpus: int
    pace: Pace
    device_batch_size: int  # rows
    grad_accum_steps: int
    memory: dict[str, int]  # bytes per GPU, by kind
    forecast: Forecast | None = None
    wall_seconds: float | None = None  # of the whole program, where --minutes fixed it
    assumptions: list[str] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        return self.pace.step_seconds(rows_per_step(self.config, self.plan, self.num_gpus) * self.config.sequence_len)

    @property
    def seconds(self) -> float:
        return self.plan.num_steps * self.step_seconds

    @property
    def dollars(self) -> float | None:
        hourly = self.gpu.dollars_per_hour
        return None if hourly is None else self.seconds / 3600 * self.num_gpus * hourly

    @property
    def flops(self) -> int:
        return self.plan.tokens * self.plan.flops_per_token

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation: share of the peak of all GPUs."""
        return self.flops / self.seconds / self.num_gpus / self.gpu.product_peak

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= USABLE_MEMORY * self.gpu.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """The values that --json prints."""
        plan = self.plan
        return {
            "steps": plan.num_steps,
            "total_batch_size": plan.total_batch_tokens,
            "tokens": plan.tokens,
            "flops": self.flops,
            "flops_per_token": plan.flops_per_token,
            "num_params": plan.params["total"],
            "scaling_params": scaling_params(plan.params),
            "tokens_per_param": plan.tokens_per_param,
            "horizon": plan.horizon,
            "recipe": plan.recipe,
            "lr_scale": plan.lr_scale,
            "weight_decay": plan.weight_decay,
            "measured_here": max(beyond_measured(self.config, plan)) <= 1,
            "model_config": self.config.to_dict(),
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "dtype": self.gpu.dtype,
            "fp8": self.gpu.fp8,
            "peak_flops": self.gpu.product_peak,
            "utilisation": self.utilisation,
            "device_batch_size": self.device_batch_size,
            "grad_accum_steps": self.grad_accum_steps,
            "memory_bytes": self.memory_bytes,
            "memory": self.memory,
            "memory_available_bytes": int(self.gpu.memory_bytes),
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "dollars": self.dollars,
            "wall_seconds": self.wall_seconds,
            "forecast_bpb": self.forecast and self.forecast.bpb,
            "forecast_bpb_error": self.forecast and self.forecast.error,
            "assumptions": self.assumptions,
        }

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) rows to print."""
        kinds = [(f"  {kind.replace('_', ' ')}", gigabytes(size)) for kind, size in self.memory.items() if size]
        verdict = "" if self.fits else ": DOES NOT FIT"
        hourly = self.gpu.dollars_per_hour
        cost = "unknown" if hourly is None else f"${self.dollars:,.2f} at ${hourly:.2f} per GPU hour"
        return [
            *describe(self.config, self.plan),
            ("machine", f"{self.num_gpus} x {self.gpu.name}"),
            ("memory per GPU", f"{gigabytes(self.memory_bytes)} of {gigabytes(self.gpu.memory_bytes)}{verdict}"),
            *kinds,
            ("rows per micro-batch", str(self.device_batch_size)),
            ("micro-batches per step", str(self.grad_accum_steps)),
            ("tokens per second", format_count(self.plan.tokens / self.seconds)),
            (
                "share of peak",
                f"{self.utilisation:.1%} of {self.num_gpus} x {self.gpu.product_peak / 1e12:.3g} TFLOP/s",
            ),
            ("training time", f"{long_time(self.seconds)} ({self.step_seconds:.3g} s a step)"),
            *([("total time", long_time(self.wall_seconds))] if self.wall_seconds else []),
            ("cost", cost),
            *([("bits per byte, forecast", str(self.forecast))] if self.forecast else []),
        ]


def gigabytes(size: float) -> str:
    """Bytes in GiB, or in MiB below 0.25 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def long_time(seconds: float) -> str:
    """`2h05m`, or `4.5 days` beyond three days."""
    return f"{seconds / 86400:,.1f} days" if seconds > 3 * 86400 else format_seconds(seconds)


def rows_per_step(config: GPTConfig, plan: Plan, num_gpus: int) -> int:
    """Rows of a step on each GPU."""
    return math.ceil(plan.total_batch_tokens / config.sequence_len / num_gpus)


def plan_run(
    config: GPTConfig,
    plan: Plan,
    gpu: Gpu,
    pace: Pace,
    *,
    num_gpus: int = 1,
    device_batch_size: int = -1,
    max_rows: int | None = None,
    law: Law | None = None,
    rates: OptimizerConfig | None = None,
) -> RunPlan:
    """Plan the steps of `plan` on a machine. A device batch of -1 is the largest up to max_rows that fits."""
    step_rows = rows_per_step(config, plan, num_gpus)

    def fits(rows: int) -> bool:
        return sum(memory_by_kind(config, gpu, num_gpus, rows, rates).values()) <= USABLE_MEMORY * gpu.memory_bytes

    rows = choose_rows(step_rows, fits, max_rows) if device_batch_size == -1 else min(device_batch_size, step_rows)
    run = RunPlan(
        config,
        plan,
        gpu,
        num_gpus,
        pace,
        rows,
        math.ceil(step_rows / rows),
        memory_by_kind(config, gpu, num_gpus, rows, rates),
        credible_forecast(law, plan),
    )
    run.assumptions = list(assumptions(run))
    return run


def assumptions(run: RunPlan) -> Iterator[str]:
    """The assumptions behind the plan's figures, one sentence each."""
    yield f"time: {run.pace.source}"
    yield "time: training steps only; compilation, evaluation, samples and checkpoints come on top"
    if run.num_gpus > 1:
        yield (
            "time: communication as fast as over NVLink; it starts after the backward pass and overlaps with the "
            "update alone, so GPUs connected by PCIe are slower"
        )
        yield f"memory: the optimizer state is sharded over the {run.num_gpus} GPUs (ZeRO-2), nothing else is"
    yield (
        "memory: fp32 weights and gradients; activations as without torch.compile, which saves about as much; "
        f"{1 - USABLE_MEMORY:.0%} is left free"
    )
    if others := uncounted_weights(run.config):
        yield f"memory: activations of {', '.join(others)} are NOT counted: planning/memory.py does not know them"
    if run.gpu.fp8:
        yield "memory: copies in fp8 are not counted"
    if not run.fits:
        yield (
            f"memory: {run.device_batch_size} row(s) per micro-batch do not fit; time and cost are for the same GPU "
            "with more memory"
        )
    if run.gpu.dtype == "float16":
        yield f"dtype: {run.gpu.name} has no fast bfloat16; the figures are for NANOCHAT_DTYPE=float16"
    yield "cost: GPUs known by name have typical cloud prices, which drift; set yours with --dollars-per-gpu-hour"
    if run.forecast is None:
        yield f"loss: no forecast: no fitted law, or a run beyond {MAX_EXTRAPOLATION:g} times the largest one fitted"
    else:
        yield f"loss: {run.forecast.basis}"


def plan_and_outcome(
    plan: Plan, progress: Progress, minutes: float, corpus: str, law: Law | None
) -> list[dict[str, Any]]:
    """Planned and achieved figures, as rows of the report's table.

    Steps, tokens, the time if `minutes` was given, bits per byte if there is a law; one fitted to other text than
    `corpus` is named.
    """
    rows: list[dict[str, Any]] = [
        {"": "steps", "planned": f"{plan.num_steps:,}", "outcome": f"{progress.step:,}"},
        {"": "tokens", "planned": format_count(plan.tokens), "outcome": format_count(progress.tokens)},
    ]
    if minutes > 0:
        seconds = max(process_age(), progress.wall_seconds)  # the latter counts earlier sessions too
        rows.append({"": "time", "planned": format_seconds(60 * minutes), "outcome": format_seconds(seconds)})
    if law and progress.val_bpb is not None:
        planned = "no forecast: too far beyond the runs fitted"
        if forecast := credible_forecast(law, plan):
            planned = f"{forecast}{'' if corpus == law.corpus else f' (for other text: {law.corpus})'}"
        rows.append({"": "bits per byte", "planned": planned, "outcome": f"{progress.val_bpb:.4f}"})
    return rows


def forecast_values(plan: Plan, tokens: float, corpus: str, law: Law | None) -> dict[str, Any]:
    """The report's values of the loss that the law expects of the planned model after `tokens`.

    Empty without a law and too far beyond its runs; only the "text" the law was fitted to if that is not `corpus`.
    """
    if law is None or law.corpus != corpus:
        return {"text": law.corpus} if law else {}
    forecast = credible_forecast(law, plan, tokens)
    if forecast is None:
        return {}
    return {"text": law.corpus, "bpb": forecast.bpb, "error": forecast.error, "tokens": tokens}


def credible_forecast(law: Law | None, plan: Plan, tokens: float | None = None) -> Forecast | None:
    """The law's forecast for a run, after `tokens` (default: those planned); None without a law, and far beyond the
    runs it was fitted to."""
    forecast = law.forecast(scaling_params(plan.params), tokens or plan.tokens) if law else None
    return forecast if forecast and forecast.extrapolation <= MAX_EXTRAPOLATION else None
