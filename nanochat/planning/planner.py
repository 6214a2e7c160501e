"""What a pretraining run will need and bring, before it is started: memory, time, money, loss.

scaling.py says how many steps of how many tokens a run has. Here those meet a machine (`Gpu`, `Pace`), and the
losses of finished runs (law.py). Every assumption behind a figure is listed with it, in words.

Letters: B batch rows, T time, C channels (n_embd), H query heads, G key/value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat.common import UserError, format_count, format_seconds
from nanochat.flash_attention import query_block
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_head import chunk_tokens
from nanochat.planning.law import Forecast, Law
from nanochat.runtime import Runtime, device_name
from nanochat.scaling import Plan, describe, estimate, scaling_params

OUT_OF_SIGHT = 1000.0  # times the FLOPs of the largest run that the law was fitted to: no forecast from there on
USABLE_MEMORY = 0.9  # the rest goes to the CUDA context, the allocator's gaps and the update's working copies

# ---------------------------------------------------------------------------------------------------
# Machines


@dataclass
class Gpu:
    """One accelerator, or this machine. Peaks are dense FLOP/s, bandwidth bytes/s, memory what PyTorch can have."""

    name: str
    memory_bytes: float
    peak_flops: float  # in `dtype`, products accumulated in fp32
    peak_fp8: float | None  # None: no fp8 units
    bandwidth: float
    dollars_per_hour: float | None
    dtype: str = "bfloat16"

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


def _preset(name: str, gib: float, peak: float, fp8: float | None, tb_s: float, dollars: float, **more: Any) -> Gpu:
    return Gpu(name, gib * 2**30, peak * 1e12, fp8 and fp8 * 1e12, tb_s * 1e12, dollars, **more)


# Peaks and bandwidths from the vendors' data sheets, without sparsity; prices are typical of cloud offers and drift.
GPUS = {
    gpu.name: gpu
    for gpu in (
        #        GiB   TFLOP/s fp8   TB/s  $/h
        _preset("b200", 178, 2250, 4500, 8.0, 5.50),
        _preset("h200", 139, 989, 1979, 4.8, 3.50),
        _preset("h100", 79, 989, 1979, 3.35, 3.00),  # SXM
        _preset("a100", 79, 312, None, 2.04, 1.80),  # SXM, 80 GB
        _preset("l4", 22, 121, 242, 0.30, 0.70),
        _preset("4090", 23.5, 165, 330, 1.01, 0.40),
        _preset("3090", 23.5, 71, None, 0.94, 0.22),
        _preset("v100", 15.7, 125, None, 0.90, 0.50, dtype="float16"),  # SXM2, 16 GB
        _preset("t4", 14.6, 65, None, 0.32, 0.35, dtype="float16"),
    )
}


def find_gpu(name: str) -> Gpu:
    """The preset of that name, in whatever case."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu={name} is not known; it is here (this machine) or one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def usual_price(runtime: Runtime) -> float | None:
    """Dollars per hour of the GPU at hand, if it is one of those; None elsewhere."""
    if runtime.device.type != "cuda":
        return None
    name = device_name(runtime.device).lower()
    return next((gpu.dollars_per_hour for gpu in GPUS.values() if gpu.name in name), None)


# ---------------------------------------------------------------------------------------------------
# Time


@dataclass
class Pace:
    """How fast one GPU trains: seconds per token, and per update of the weights; and where that is known from."""

    token_seconds: float
    update_seconds: float
    source: str

    def step_seconds(self, tokens: int) -> float:
        """One optimizer step in which this GPU sees so many tokens."""
        return self.update_seconds + tokens * self.token_seconds


# One rule for every GPU, width and depth. A step's matrix products run at a fixed share of the format's dense peak;
# everything between them (norms, rotations, activations, residuals, the update) is bound by memory, and moves about
# as many bytes per token as there are channels, whatever the width. So narrow models reach less of the peak.
# The three numbers are fitted to the published 8xH100 runs (tests/test_planner.py), which they meet within 5%:
# d24 and d26 at 50 to 60% of the bf16 peak, and d12 in about five minutes.
PRODUCT_SHARE = 0.60  # of the dense 16-bit peak
FP8_PRODUCT_SHARE = 0.365  # of the dense fp8 peak; attention, head and the casts around each product stay 16-bit
BYTES_PER_CHANNEL = 150  # per layer and token, forward and backward


def expected_pace(config: GPTConfig, gpu: Gpu, fp8: bool = False) -> Pace:
    """The rule above. Raises UserError where the GPU has no fp8."""
    if fp8 and gpu.peak_fp8 is None:
        able = ", ".join(other.name for other in GPUS.values() if other.peak_fp8)
        raise UserError(f"--fp8: {gpu.name} has no fp8 products; leave it out, or take one of {able}")
    flops_per_token, _ = estimate(config)
    rate = FP8_PRODUCT_SHARE * gpu.peak_fp8 if fp8 and gpu.peak_fp8 else PRODUCT_SHARE * gpu.peak_flops
    between = BYTES_PER_CHANNEL * config.n_layer * config.n_embd / gpu.bandwidth
    share, kind = (FP8_PRODUCT_SHARE, "fp8") if fp8 else (PRODUCT_SHARE, gpu.dtype)
    source = (
        f"matrix products at {share:.1%} of the dense {kind} peak, and {BYTES_PER_CHANNEL} bytes a channel, "
        "layer and token through memory: fitted to published runs on 8xH100"
    )
    source += "" if gpu.name == "h100" else f", carried over to {gpu.name} by its data sheet, not measured there"
    return Pace(flops_per_token / rate + between, 0.0, source)


# ---------------------------------------------------------------------------------------------------
# Memory


def activation_bytes(config: GPTConfig, rows: int, element: int, *, fused: bool = False, blocked: bool = False) -> int:
    """Bytes that the forward pass of `rows` rows keeps for the backward pass, `element` bytes per number.

    Tensor by tensor as eager PyTorch keeps them. `fused`: the C kernels of a CPU, which keep one side of a norm and
    of a ReLU squared, not both. `blocked`: the attention of a CPU, which keeps its probabilities. The tests compare
    with what autograd saves; whoever changes what gpt.py keeps changes a line here.
    """
    T, C, both = config.sequence_len, config.n_embd, 1 if fused else 2
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    # Per token, first what there is once: the norm of the embedding, smear and backout, the last norm, and the
    # gradient that the head's loss makes already in the forward pass.
    kept = C * ((both if config.residual_scalars else 1) + 2 * config.smear + config.backout + 2.0)
    for layer, (window, _) in enumerate(config.window_sizes()):
        kept += C * config.residual_scalars  # x, for its lambda's gradient
        kept += both * (2 * C + queries + keys)  # the norms before attention and MLP, and those of q and k
        kept += keys + queries  # v, and what attention made of it
        kept += keys * config.has_value_embed(layer)  # for the gradient of its gate
        kept += both * 4 * C  # ReLU squared
        if blocked:
            span = min(window, T)
            block = query_block(span, element)  # of queries; the keys that only some of them see add half of it
            kept += config.n_head * min(span - span**2 / (2 * T) + block / 2, T)
            kept += 2 * (queries - keys) if config.n_kv_head < config.n_head else 0  # k and v, repeated
    return int(rows * T * kept * element)


def memory_by_kind(config: GPTConfig, gpu: Gpu, num_gpus: int, rows: int, device_type: str = "cuda") -> dict[str, int]:
    """Bytes on each GPU at the peak of the backward pass of a micro-batch of `rows` rows.

    Weights and gradients are fp32 and whole on every GPU; the optimizer's state is shared out (ZeRO-2).
    """
    with torch.device("meta"):
        model = GPT(config)
    counts, element, cpu = model.num_scaling_params(), gpu.element_bytes, device_type == "cpu"
    products = counts["transformer_matrices"] + counts["lm_head"]
    # AdamW keeps two moments per weight; Muon a momentum per weight and a second moment along a matrix's longer side.
    muon = sum(p.numel() + max(p.shape) for p in model.blocks.parameters())
    adamw = 2 * (counts["total"] - counts["transformer_matrices"])
    chunk = min(chunk_tokens(config.vocab_size, device_type), rows * config.sequence_len)
    return {
        "weights": 4 * counts["total"],
        "gradients": 4 * counts["total"],
        "optimizer": math.ceil(4 * (muon + adamw) / num_gpus),
        "weight_casts": 0 if element == 4 else element * products,
        "activations": activation_bytes(config, rows, element, fused=cpu, blocked=device_type != "cuda"),
        # Of a chunk the logits, their capped form and its slope in fp32, and their gradient; on a CPU all in one
        # place. The head's gradient in fp32, and the same multiplied by the loss's.
        "logits": chunk * config.vocab_size * (element if cpu else 12) + 8 * counts["lm_head"],
    }


def choose_rows(own_rows: int, fits: Callable[[int], bool], most: int | None = None) -> int:
    """The largest power of two that divides this GPU's rows of a step, is at most `most`, and fits; at least 1."""
    best = 1
    rows = 2
    while own_rows % rows == 0 and (most is None or rows <= most) and fits(rows):
        best, rows = rows, 2 * rows
    return best


# ---------------------------------------------------------------------------------------------------
# The whole plan


@dataclass
class RunPlan:
    """A pretraining run on a machine, every number of it."""

    config: GPTConfig
    plan: Plan
    gpu: Gpu
    num_gpus: int
    pace: Pace
    device_batch_size: int  # rows
    grad_accum_steps: int
    memory: dict[str, int]  # bytes per GPU, by kind
    dollars_per_gpu_hour: float | None
    fp8: bool = False
    forecast: Forecast | None = None
    wall_seconds: float | None = None  # from the program's start to its end, where that is what was asked for
    assumptions: list[str] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        own_rows = math.ceil(self.plan.total_batch_tokens / self.config.sequence_len / self.num_gpus)
        return self.pace.step_seconds(own_rows * self.config.sequence_len)

    @property
    def seconds(self) -> float:
        return self.plan.num_steps * self.step_seconds

    @property
    def dollars(self) -> float | None:
        hourly = self.dollars_per_gpu_hour
        return None if hourly is None else self.seconds / 3600 * self.num_gpus * hourly

    @property
    def flops(self) -> int:
        return self.plan.tokens * self.plan.flops_per_token

    @property
    def peak_flops(self) -> float:
        """Of one GPU, in the number format of the matrix products."""
        return self.gpu.peak_fp8 if self.fp8 and self.gpu.peak_fp8 else self.gpu.peak_flops

    @property
    def utilisation(self) -> float:
        """Model FLOPs per second as a share of all GPUs' peak."""
        return self.flops / self.seconds / self.num_gpus / self.peak_flops

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= USABLE_MEMORY * self.gpu.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
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
            "model_config": self.config.to_dict(),
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "dtype": self.gpu.dtype,
            "fp8": self.fp8,
            "peak_flops": self.peak_flops,
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
        room = self.gpu.memory_bytes
        kinds = [(f"  {kind.replace('_', ' ')}", gigabytes(size)) for kind, size in self.memory.items()]
        verdict = "" if self.fits else ": DOES NOT FIT"
        hourly = self.dollars_per_gpu_hour
        cost = "not known" if hourly is None else f"${self.dollars:,.2f} at ${hourly:.2f} per GPU hour"
        return [
            *describe(self.config, self.plan),
            ("machine", f"{self.num_gpus} x {self.gpu.name}"),
            ("memory per GPU", f"{gigabytes(self.memory_bytes)} of {gigabytes(room)}{verdict}"),
            *kinds,
            ("rows per micro-batch", str(self.device_batch_size)),
            ("micro-batches per step", str(self.grad_accum_steps)),
            ("tokens per second", format_count(self.plan.tokens / self.seconds)),
            ("share of peak", f"{self.utilisation:.1%} of {self.num_gpus} x {self.peak_flops / 1e12:.3g} TFLOP/s"),
            ("training time", f"{long_time(self.seconds)} ({self.step_seconds:.3g} s a step)"),
            *([("from start to end", long_time(self.wall_seconds))] if self.wall_seconds else []),
            ("cost", cost),
            *([("bits per byte, forecast", str(self.forecast))] if self.forecast else []),
        ]


def gigabytes(size: float) -> str:
    """Bytes in GiB, or MiB where that would read 0."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.2f} MiB"


def long_time(seconds: float) -> str:
    """As everywhere, and in days where hours would be many."""
    return f"{seconds / 86400:,.1f} days" if seconds > 3 * 86400 else format_seconds(seconds)


def plan_run(
    config: GPTConfig,
    plan: Plan,
    gpu: Gpu,
    pace: Pace,
    *,
    num_gpus: int = 1,
    device_batch_size: int = -1,
    most_rows: int | None = None,
    dollars_per_gpu_hour: float = -1.0,
    fp8: bool = False,
    device_type: str = "cuda",
    law: Law | None = None,
) -> RunPlan:
    """Put the steps of `plan` on a machine. -1: the largest device batch that fits, the machine's usual price."""
    if device_batch_size == 0 or device_batch_size < -1:
        raise UserError(f"--device-batch-size must be positive, or -1 to choose it, got {device_batch_size}")
    own_rows = math.ceil(plan.total_batch_tokens / config.sequence_len / num_gpus)

    def memory(rows: int) -> dict[str, int]:
        return memory_by_kind(config, gpu, num_gpus, rows, device_type)

    def fits(rows: int) -> bool:
        return sum(memory(rows).values()) <= USABLE_MEMORY * gpu.memory_bytes

    rows = choose_rows(own_rows, fits, most_rows) if device_batch_size == -1 else min(device_batch_size, own_rows)
    hourly = dollars_per_gpu_hour if dollars_per_gpu_hour >= 0 else gpu.dollars_per_hour
    forecast = law.forecast(scaling_params(plan.params), plan.tokens) if law else None
    if forecast and forecast.beyond > OUT_OF_SIGHT:
        forecast = None
    made = RunPlan(
        config, plan, gpu, num_gpus, pace, rows, math.ceil(own_rows / rows), memory(rows), hourly, fp8, forecast
    )
    made.assumptions = list(assumptions(made, usual_price=dollars_per_gpu_hour < 0))
    return made


def assumptions(made: RunPlan, usual_price: bool) -> Iterable[str]:
    """What the figures rest on, a sentence each."""
    yield f"time: {made.pace.source}"
    yield "time: training steps only; compilation, evaluation, samples and checkpoints come on top"
    if made.num_gpus > 1:
        yield "time: gradients travel while products run, as over NVLink; GPUs joined by PCIe alone take longer"
        yield f"memory: the optimizer's state is shared out over the {made.num_gpus} GPUs (ZeRO-2), nothing else is"
    yield (
        f"memory: fp32 weights and gradients; activations as without torch.compile, with it they are fewer; "
        f"{1 - USABLE_MEMORY:.0%} is left free"
    )
    if not made.fits:
        yield (
            f"memory: this does not fit, not even {made.device_batch_size} row(s) at a time; time and cost are "
            "those of a machine like this with more memory"
        )
    if made.gpu.dtype == "float16":
        yield f"number format: {made.gpu.name} has no fast bfloat16; the figures are for NANOCHAT_DTYPE=float16"
    if made.dollars_per_gpu_hour is None:
        yield "cost: not known for this machine; --dollars-per-gpu-hour sets it"
    elif usual_price:
        yield "cost: a typical cloud price, which drifts; --dollars-per-gpu-hour sets yours"
    if made.forecast is None:
        yield "loss: no forecast: there is no fitted law, or its runs were too small to say anything of this one"
    else:
        yield f"loss: {made.forecast.basis}"
