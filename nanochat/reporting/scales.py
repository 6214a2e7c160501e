"""Axes of charts: their range, linear or logarithmic, and ticks at round values with labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.common import format_count, format_seconds

LOG_RATIO = 30.0  # between the largest and the smallest value of a vertical axis that becomes logarithmic
TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 3 * 3600, 6 * 3600, 12 * 3600)
DAY = 24 * 3600
LOG_TIMES = (0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, DAY, 10 * DAY, 100 * DAY)
VERTICAL_TICKS = 6
TINY = 1e-30  # below it a value is as good as zero


@dataclass
class Scale:
    """An axis from `low` to `high`; `unit` is seconds, flops, share, or anything else for plain numbers."""

    low: float
    high: float
    unit: str = ""
    log: bool = False
    max_ticks: int = 5  # about

    def position(self, value: float) -> float:
        """Where the value lies: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) at round values."""
        values = log_values(self) if self.log else linear_values(self)
        return [(value, tick_label(value, self.unit)) for value in values]


def horizontal_scales(points: Sequence[Sequence[float]], unit: str) -> list[Scale]:
    """[linear from 0, logarithmic] over all these points; only the former where nothing is above 0."""
    high = max(max(values) for values in points)
    positive = [value for values in points for value in values if value > 0]
    scales = [Scale(0, high or 1, unit)]
    return [*scales, Scale(min(positive), high, unit, log=True)] if positive and min(positive) < high else scales


def vertical_scale(values: Sequence[float], unit: str, from_zero: bool) -> Scale:
    """Over the values with a margin; logarithmic where they span more than LOG_RATIO."""
    low, high = min(values), max(values)
    if unit == "share":
        return Scale(min(0.0, low), max(1.0, high), unit, max_ticks=VERTICAL_TICKS)
    if low > TINY and high / low > LOG_RATIO and not from_zero:
        return Scale(low / 1.1, high * 1.1, unit, True, VERTICAL_TICKS)
    margin = 0.06 * (high - low or abs(high) or 1.0)
    return Scale(0.0 if from_zero and low >= 0 else low - margin, high + margin, unit, False, VERTICAL_TICKS)


def linear_values(scale: Scale) -> list[float]:
    """Multiples of a round step on the scale."""
    low, high = scale.low, scale.high
    rough = (high - low) / scale.max_ticks
    if scale.unit == "seconds" and rough > 0.5:
        step = next((float(s) for s in TIME_STEPS if s >= rough), math.ceil(rough / DAY) * DAY)
    else:
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_values(scale: Scale) -> list[float]:
    """Powers of ten on the scale, with their doubles and fivefolds where these are few, some where they are many."""
    exponents = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    coarse: list[float] = [10.0**e for e in exponents]
    fine: list[float] = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    if scale.unit == "seconds":
        coarse, fine = list(LOG_TIMES), [*LOG_TIMES[:3], *TIME_STEPS, *LOG_TIMES[8:]]
    for values in (coarse, sorted(set(fine))):
        found = [value for value in values if scale.low <= value <= scale.high * (1 + 1e-9)]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / (scale.max_ticks + 1)) or 1]


def tick_label(value: float, unit: str) -> str:
    """`12000` -> `12k`, `1e15` FLOPs -> `1e15`, `90` seconds -> `1m30s`, a share of `0.25` -> `25%`."""
    if unit == "share":
        return f"{100 * value:.4g}%"
    if unit == "seconds" and value >= 60:
        return format_seconds(value).removesuffix("00s").removesuffix("00m")
    if unit == "seconds":
        return f"{value:.3g}s"
    if unit == "flops":
        return f"{value:.3g}".replace("e+", "e")
    return format_count(value) if abs(value) >= 1000 else f"{value:.6g}"
