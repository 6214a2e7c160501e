"""Accelerators and how fast they train: data sheets, prices, and seconds per token."""

from dataclasses import dataclass, replace
from typing import Any

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.runtime import Runtime, device_name
from nanochat.scaling import estimate


@dataclass
class Gpu:
    """One accelerator, or this machine. Peaks in dense FLOP/s, bandwidth in bytes/s, memory as PyTorch can use it."""

    name: str
    memory_bytes: float
    peak_flops: float  # in `dtype`, products accumulated in fp32
    peak_fp8: float | None  # None: no fp8 units
    bandwidth: float
    dollars_per_hour: float | None  # None: unknown
    dtype: str = "bfloat16"
    device_type: str = "cuda"
    fp8: bool = False  # compute matrix products in fp8

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def product_peak(self) -> float:
        """Peak FLOP/s in the format of the matrix products."""
        return self.peak_fp8 if self.fp8 and self.peak_fp8 else self.peak_flops


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


def find_gpu(name: str, fp8: bool = False) -> Gpu:
    """The preset of that name, in any case. Raises UserError if there is none, or fp8 is requested and it has none."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu={name} is unknown: give here (this machine) or one of {', '.join(GPUS)}")
    gpu = GPUS[name.lower()]
    if fp8 and gpu.peak_fp8 is None:
        able = ", ".join(other.name for other in GPUS.values() if other.peak_fp8)
        raise UserError(f"--fp8: {gpu.name} has no fp8 units; drop the flag, or use one of {able}")
    return replace(gpu, fp8=fp8)


def known_gpu(runtime: Runtime) -> Gpu | None:
    """The preset of this machine's GPU, if there is one."""
    if runtime.device.type != "cuda":
        return None
    name = device_name(runtime.device).lower()
    return next((gpu for gpu in GPUS.values() if gpu.name in name), None)


def usual_price(runtime: Runtime) -> float | None:
    """Dollars per hour of this machine's GPU, if it is among the presets; None elsewhere."""
    gpu = known_gpu(runtime)
    return gpu.dollars_per_hour if gpu else None


@dataclass
class Pace:
    """Training speed of one GPU: seconds per token and per optimizer update. `source` says how it is known."""

    token_seconds: float
    update_seconds: float
    source: str

    def step_seconds(self, tokens: int) -> float:
        """Seconds of an optimizer step with this many tokens on this GPU."""
        return self.update_seconds + tokens * self.token_seconds


# One rule for every GPU, width and depth. The matrix products of a step run at a fixed share of the format's dense
# peak. Everything between them (norms, rotary embeddings, activations, residuals, the update) is memory-bound, and
# moves a number of bytes per token that is proportional to the channels. So narrow models reach less of the peak.
# The three numbers are fitted to the published 8xH100 runs (tests/test_planner.py), which they meet within 5%:
# d24 and d26 at 50 to 60% of the bf16 peak, and d12 in about five minutes.
PRODUCT_SHARE = 0.60  # of the dense 16-bit peak
FP8_PRODUCT_SHARE = 0.365  # of the dense fp8 peak; attention, head and the casts around each product stay 16-bit
BYTES_PER_CHANNEL = 150  # per layer and token, forward and backward


def expected_pace(config: GPTConfig, gpu: Gpu) -> Pace:
    """The pace by the rule above."""
    share, kind = (FP8_PRODUCT_SHARE, "fp8") if gpu.fp8 else (PRODUCT_SHARE, gpu.dtype)
    memory_bound = BYTES_PER_CHANNEL * config.n_layer * config.n_embd / gpu.bandwidth
    source = (
        f"matrix products at {share:.1%} of the dense {kind} peak, and {BYTES_PER_CHANNEL} bytes of memory traffic "
        "per channel, layer and token: fitted to published runs on 8xH100"
    )
    source += "" if gpu.name == "h100" else f"; extrapolated to {gpu.name} from its data sheet, not measured"
    return Pace(estimate(config)[0] / (share * gpu.product_peak) + memory_bound, 0.0, source)
