"""Accelerators and how fast they train: data sheets, prices, and seconds per token."""

import re
from dataclasses import dataclass, replace

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


def _preset(
    name: str, gib: float, peak: float, fp8: float | None, tb_s: float, dollars: float | None, dtype: str = "bfloat16"
) -> Gpu:
    return Gpu(name, gib * 2**30, peak * 1e12, fp8 and fp8 * 1e12, tb_s * 1e12, dollars, dtype)


# Peaks and bandwidths from the vendors' data sheets, without sparsity, sums in fp32; prices are typical of cloud offers
# and drift (None: hardly offered). The words of a name are among those of torch.cuda.get_device_name().
GPUS = {
    gpu.name: gpu
    for gpu in (
        #            GiB   TFLOP/s fp8   TB/s  $/h
        _preset("b200", 178, 2250, 4500, 8.0, 5.50),
        _preset("gh200", 94.5, 989, 1979, 4.0, 2.00),
        _preset("h200", 139, 989, 1979, 4.8, 3.50),
        _preset("h200-nvl", 139, 835, 1671, 4.8, 3.20),
        _preset("h100", 79, 989, 1979, 3.35, 3.00),  # SXM
        _preset("h100-nvl", 93, 835, 1671, 3.94, 2.70),
        _preset("h100-pcie", 79, 756, 1513, 2.0, 2.50),
        _preset("a100", 79, 312, None, 2.04, 1.80),  # SXM, 80 GB
        _preset("a100-40gb", 39.4, 312, None, 1.56, 1.30),
        _preset("l40s", 44.4, 362, 733, 0.864, 1.00),
        _preset("l40", 44.4, 181, 362, 0.864, 0.90),
        _preset("pro-6000", 94.5, 504, 1007, 1.79, 1.60),  # RTX PRO 6000 Blackwell
        _preset("6000-ada", 47.4, 364, 728, 0.96, 0.80),  # RTX 6000 Ada Generation
        _preset("a6000", 47.4, 155, None, 0.768, 0.50),  # RTX A6000
        _preset("a10", 22, 125, None, 0.60, 0.75),
        _preset("a10g", 22, 70, None, 0.60, 1.00),
        _preset("l4", 22, 121, 242, 0.30, 0.70),
        _preset("5090", 31.3, 209, 419, 1.79, 0.70),
        _preset("4090", 23.5, 165, 330, 1.01, 0.40),
        _preset("4080", 15.6, 97, 195, 0.717, None),
        _preset("4070", 11.6, 58, 117, 0.504, None),
        _preset("4060", 7.6, 30, 60, 0.272, None),
        _preset("3090", 23.5, 71, None, 0.94, 0.22),
        _preset("3060", 11.6, 25.5, None, 0.36, None),
        _preset("v100", 15.7, 125, None, 0.90, 0.50, dtype="float16"),  # SXM2, 16 GB
        _preset("v100-32gb", 31.7, 125, None, 0.90, 0.60, dtype="float16"),
        _preset("t4", 14.6, 65, None, 0.32, 0.35, dtype="float16"),
    )
}
VARIANTS = {"ti", "super", "d", "laptop", "max", "mobile", "mig"}  # words that make another card of the same number


def match_gpu(name: str) -> Gpu | None:
    """The preset of a card by its product name, such as "NVIDIA H100 PCIe"; None if it is not known.

    All words of a preset's name must be in it; of several presets the one with most words is meant.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    presets = {frozenset(gpu.name.split("-")): gpu for gpu in GPUS.values()}
    best = max((known for known in presets if known <= words), key=len, default=None)
    return presets[best] if best and not words & VARIANTS else None


def find_gpu(name: str, fp8: bool = False) -> Gpu:
    """The preset that `name` means. Raises UserError if there is none, or fp8 is requested and it has none."""
    gpu = match_gpu(name)
    if gpu is None:
        raise UserError(f"--gpu={name} is unknown: give here (this machine) or one of {', '.join(GPUS)}")
    if fp8 and gpu.peak_fp8 is None:
        able = ", ".join(other.name for other in GPUS.values() if other.peak_fp8)
        raise UserError(f"--fp8: {gpu.name} has no fp8 units; drop the flag, or use one of {able}")
    return replace(gpu, fp8=fp8)


def known_gpu(runtime: Runtime) -> Gpu | None:
    """The preset of this machine's GPU, if there is one."""
    return match_gpu(device_name(runtime.device)) if runtime.device.type == "cuda" else None


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
