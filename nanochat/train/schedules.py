"""Learning rate, momentum and weight decay as pure functions of how far the run is.

`step` counts finished optimizer steps, 0 .. num_steps - 1 at the time of the update.
"""

import math
from dataclasses import dataclass

from nanochat.common import UserError


@dataclass
class ScheduleConfig:
    """How rates move over the run."""

    num_steps: int
    warmup_steps: int = 0
    warmdown_ratio: float = 0.5
    final_lr_frac: float = 0.0
    momentum_warmup_steps: int = 300
    momentum_peak: float = 0.95
    momentum_warmdown: bool = False
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"the warm-up cannot be negative, got {self.warmup_steps} steps")
        if not 0 <= self.warmdown_ratio <= 1:
            raise UserError(f"--warmdown-ratio is a share of the run, from 0 to 1, got {self.warmdown_ratio:g}")
        if self.decay_shape not in ("linear", "cosine"):
            raise UserError(f"decay_shape must be linear or cosine, got {self.decay_shape!r}")
        if not 0 <= self.momentum_peak < 1:
            raise UserError(f"momentum_peak must be from 0 to below 1, got {self.momentum_peak:g}")
        if self.final_lr_frac < 0:
            raise UserError(f"--final-lr-frac cannot be negative, got {self.final_lr_frac:g}")


def lr_multiplier(
    step: int, num_steps: int, warmup_steps: int = 0, warmdown_ratio: float = 0.5, final_frac: float = 0.0
) -> float:
    """Trapezoid: linear up over `warmup_steps`, 1, then linear down to `final_frac` over the last
    `warmdown_ratio` of the run. Never negative, also past the horizon."""
    warmdown_steps = round(warmdown_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = num_steps - step
    if left >= warmdown_steps or warmdown_steps == 0:
        return 1.0
    progress = max(left, 0) / warmdown_steps  # 1 at the start of the warmdown, towards 0 at its end
    return progress + (1 - progress) * final_frac


def muon_momentum(
    step: int, num_steps: int, warmup_steps: int = 300, peak: float = 0.95, warmdown_ratio: float = 0.0
) -> float:
    """0.85 -> `peak` over `warmup_steps` (at most a third of the run), then down to 0.90 over the warmdown."""
    warmup_steps = max(1, min(warmup_steps, num_steps // 3))
    up = 0.85 + (peak - 0.85) * min(step / warmup_steps, 1.0)
    warmdown_steps = round(warmdown_ratio * num_steps)
    left = max(num_steps - step, 0)
    if warmdown_steps == 0 or left >= warmdown_steps:
        return up
    return 0.90 + (up - 0.90) * left / warmdown_steps


def decay_multiplier(step: int, num_steps: int, shape: str = "linear") -> float:
    """Weight decay over the run, from 1 to 0: "linear", or "cosine"."""
    progress = min(max(step / max(num_steps, 1), 0.0), 1.0)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    assert shape == "linear", f"unknown shape {shape!r}"
    return 1.0 - progress
