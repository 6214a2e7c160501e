"""Learning rate, momentum and weight decay as pure functions of the run's progress.

`step` counts finished optimizer steps: 0 .. num_steps - 1 at the time of the update.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from nanochat.common import UserError
from nanochat.common.ranges import Range, check_ranges


@dataclass
class ScheduleConfig:
    """How learning rate, momentum and weight decay change over the run."""

    num_steps: int
    warmup_steps: Annotated[int, Range(0)] = 0
    warmdown_ratio: Annotated[float, Range(0, 1)] = 0.5
    final_lr_frac: Annotated[float, Range(0)] = 0.0
    momentum_warmup_steps: Annotated[int, Range(0)] = 300
    momentum_peak: Annotated[float, Range(0, below=1)] = 0.95
    momentum_warmdown: bool = False
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        check_ranges(self, flags=False)
        if self.decay_shape not in ("linear", "cosine"):
            raise UserError(f"decay_shape must be linear or cosine, got {self.decay_shape!r}")

    @property
    def warmdown_steps(self) -> int:
        """The last steps of the run, over which the rates fall."""
        return round(self.warmdown_ratio * self.num_steps)

    def apply(self, param_groups: list[dict[str, Any]], step: int, unread: float = 1.0) -> float:
        """Set the rates of MuonAdamW's groups for the update after `step` steps; returns the rates' multiplier.

        `unread` is the share of the batch's rows with text of the first epoch. Groups with "reread", a factor for text
        that was read before, get the mean factor of the batch's rows.
        """
        multiplier = lr_multiplier(step, self.num_steps, self.warmup_steps, self.warmdown_ratio, self.final_lr_frac)
        momentum_warmdown = self.warmdown_ratio if self.momentum_warmdown else 0.0
        momentum = muon_momentum(
            step, self.num_steps, self.momentum_warmup_steps, self.momentum_peak, momentum_warmdown
        )
        decay = decay_multiplier(step, self.num_steps, self.decay_shape)
        for group in param_groups:
            group["lr"] = group["initial_lr"] * multiplier * (unread + (1 - unread) * group.get("reread", 1.0))
            if "momentum" in group:
                group["momentum"] = momentum
            if group.get("decay_scheduled"):
                group["weight_decay"] = group["initial_weight_decay"] * decay
        return multiplier


def lr_multiplier(
    step: int, num_steps: int, warmup_steps: int = 0, warmdown_ratio: float = 0.5, final_frac: float = 0.0
) -> float:
    """A trapezoid: linear up over `warmup_steps`, 1, then linear down to `final_frac` over the last
    `warmdown_ratio` of the run. Never negative, also past the horizon.

    A warm-up is cut to a third of the run, or to where the warmdown begins if that is later. Where the two overlap, the
    lower one counts.
    """
    warmdown_steps = round(warmdown_ratio * num_steps)
    warmup_steps = min(warmup_steps, max(num_steps // 3, num_steps - warmdown_steps))
    left, down = max(num_steps - step, 0), 1.0
    if left < warmdown_steps:
        progress = left / warmdown_steps  # 1 at the start of the warmdown, towards 0 at its end
        down = progress + (1 - progress) * final_frac
    return min((step + 1) / warmup_steps, down) if step < warmup_steps else down


def muon_momentum(
    step: int, num_steps: int, warmup_steps: int = 300, peak: float = 0.95, warmdown_ratio: float = 0.0
) -> float:
    """0.85 -> `peak` over `warmup_steps` (at most a third of the run), then down to 0.90 over the warmdown."""
    warmup_steps = max(1, min(warmup_steps, num_steps // 3))
    momentum = 0.85 + (peak - 0.85) * min(step / warmup_steps, 1.0)
    warmdown_steps = round(warmdown_ratio * num_steps)
    left = max(num_steps - step, 0)
    if warmdown_steps == 0 or left >= warmdown_steps:
        return momentum
    return 0.90 + (momentum - 0.90) * left / warmdown_steps


def decay_multiplier(step: int, num_steps: int, shape: str = "linear") -> float:
    """From 1 at the start of the run to 0 at its end; `shape` is "linear" or "cosine"."""
    progress = min(max(step / max(num_steps, 1), 0.0), 1.0)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress
