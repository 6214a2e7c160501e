"""Curves from a run's metrics.jsonl: which metrics get one, thinned and smoothed for drawing."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from nanochat.common import format_count

Record = dict[str, Any]

# Keys in metrics.jsonl that get a chart each, with its title.
CHARTS = {
    "loss": "Training loss",
    "val_bpb": "Validation bits per byte",
    "reward": "Mean reward",
    "entropy": "Entropy of answers (nats per token, estimated)",
    "answer_tokens": "Tokens per answer",
    "groups_without_signal": "Share of prompts whose answers all scored the same",
    "core": "CORE",
    "tokens_per_second": "Tokens per second",
    "lr": "Learning rate",
    "lr_multiplier": "Learning rate (share of its peak)",
}
NOISY = ("loss", "reward", "entropy", "answer_tokens", "groups_without_signal")
MAX_POINTS = 400  # of a curve; more are not distinguishable on a screen


def scoped(label: str, scope: str | None) -> str:
    """`CORE (18 of 22 tasks)`; the label alone where the scope is empty, for all that the label stands for.

    The scope of a value `core` is kept beside it as `core_of`, in the report and in metrics.jsonl.
    """
    return f"{label} ({scope})" if scope else label


@dataclass
class Curve:
    """A metric over the steps of a run, with a moving average where it is noisy."""

    key: str
    title: str
    steps: list[float]
    values: list[float]
    smooth: list[float] = field(default_factory=list)

    @property
    def last_value(self) -> str:
        """For the caption: `2.345 at step 1,000`."""
        last = (self.smooth or self.values)[-1]
        return f"{format_count(last) if abs(last) >= 1000 else f'{last:.4g}'} at step {self.steps[-1]:,.0f}"


def read_metrics(path: Path) -> list[Record]:
    """The readable lines of a metrics.jsonl; [] if it is missing. A run in progress may leave an incomplete one."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        return [record for line in file if (record := parse_record(line))]


def parse_record(line: bytes) -> Record | None:
    """A line of metrics.jsonl; None if it is damaged or something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def curves_of(values: Record, base_dir: Path) -> list[Curve]:
    """The curves of a stage, from its metrics file: held-out accuracies, then CHARTS."""
    lines = read_metrics(base_dir / values["metrics"]) if values.get("metrics") else []
    if lines and values.get("before"):  # measured before the first step
        lines = [{"step": 0, **values["before"]}, *lines]
    accuracies = sorted({key for line in lines for key in line if key.startswith("accuracy/")})
    titles = {key: f"Held out: {key.removeprefix('accuracy/')}" for key in accuracies} | CHARTS
    curves = (read_curve(lines, key, title) for key, title in titles.items())
    return [curve for curve in curves if curve]


def read_curve(lines: Sequence[Record], key: str, title: str) -> Curve | None:
    """The curve of one metric; None with fewer than two finite values."""
    found = [line for line in lines if is_number(line.get(key))]
    points = [(line["step"], line[key]) for line in found]
    if len(points) < 2:
        return None
    title = scoped(title, found[-1].get(f"{key}_of"))
    steps, values = thin(points)
    return Curve(key, title, steps, values, smooth(values) if key in NOISY else [])


def is_number(value: Any) -> bool:
    """Whether the value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """(steps, values) of at most `limit` points: means of consecutive ones, each at the last step of its group."""
    size = -(-len(points) // limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [sum(value for _, value in group) / len(group) for group in groups]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a thirtieth of the curve: it does not lag."""
    sums = [0.0, *accumulate(values)]
    averages = []
    for i in range(len(values)):
        reach = min(len(values) // 60, i)  # symmetric at the steep start too
        end = min(i + reach + 1, len(values))
        averages.append((sums[end] - sums[i - reach]) / (end - i + reach))
    return averages


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The curve as one line of block characters."""
    _, short = thin(list(enumerate(values)), width)
    low, high = min(short), max(short)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (v - low) / (high - low or 1.0)))] for v in short)
