"""Curves from a run's metrics.jsonl: which metrics get one, over which axes, thinned and smoothed for drawing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeGuard

Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    unit: str = ""  # of the vertical axis
    range: Literal["data", "zero", "share"] = "zero"  # what the curve needs, that and zero, or 0 to 100%
    noisy: bool = False  # drawn pale behind its moving average
    minor: bool = False  # folded: of interest only when something else looks wrong


# Keys in metrics.jsonl that get a chart each. Accuracies have their task in the key: see metric_of.
METRICS = {
    "val_bpb": Metric("Validation", "bits per byte", "data"),
    "loss": Metric("Training loss", "nats per token", "data", noisy=True),
    "core": Metric("CORE", "", "data"),
    "reward": Metric("Mean reward", "reward per answer", noisy=True),
    "groups_without_signal": Metric(
        "Prompts without signal", "prompts whose answers scored alike", "share", noisy=True
    ),
    "entropy": Metric("Entropy of answers", "nats per token, estimated", "data", noisy=True),
    "answer_tokens": Metric("Length of answers", "tokens", noisy=True),
    "tokens_per_second": Metric("Speed", "tokens per second", minor=True),
    "lr": Metric("Learning rate", "", minor=True),
    "lr_multiplier": Metric("Learning rate", "of its peak", "share", minor=True),
}
AXES = ("step", "tokens", "flops", "seconds")  # keys of what a curve can be drawn over
MAX_POINTS = 240  # of a curve; more are not distinguishable in a small chart


def metric_of(key: str) -> Metric:
    """How to show the metric `key`; an accuracy is `accuracy/TASK`."""
    return METRICS.get(key) or Metric(task_words(key.removeprefix("accuracy/")), "held out, right", "share")


# What our own tasks ask for; benchmarks are known by their names.
TASK_WORDS = {
    "SpellingBee": "Letter counting",
    "SimpleSpelling": "Spelling",
    "WordProblems1": "Word problems (1 step)",
    "WordProblems2": "Word problems (2 steps)",
    "WordProblems3": "Word problems (3 steps)",
    "Identity": "Saying who it is",
    "Unanswerable": "Declining what cannot be known",
    "Answerable": "Not declining what can be known",
    "Stories": "Five-sentence stories that keep their names",
    "GSM8K": "Grade-school mathematics (GSM8K)",
    "HumanEval": "Writing programs (HumanEval)",
    "MMLU": "Exam questions (MMLU)",
    "ARC-Easy": "Science, easy (ARC)",
    "ARC-Challenge": "Science, hard (ARC)",
}


def task_words(name: str) -> str:
    """`WordProblems1`, also written `WordProblems/1` -> `Word problems (1 step)`; others as they are named."""
    return TASK_WORDS.get(name.replace("/", ""), name)


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
    axes: dict[str, list[float]]  # of AXES those that every point has: step at least
    values: list[float]
    smooth: list[float] = field(default_factory=list)
    group: int = 1  # consecutive values of the run whose mean is one point
    run: str = ""  # its name, where several are compared

    @property
    def steps(self) -> list[float]:
        return self.axes["step"]

    @property
    def last(self) -> float:
        """The last value, averaged where there is an average."""
        return (self.smooth or self.values)[-1]

    @property
    def averaged(self) -> int:
        """Over how many steps the moving average goes; 0 without one."""
        return (2 * reach_of(self.values) + 1) * self.group if self.smooth else 0


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


def with_flops(lines: Sequence[Record]) -> list[Record]:
    """The lines with `flops`, the sum of their `step_flops` so far; unchanged if one lacks them, as in older runs."""
    if not all(is_number(line.get("step_flops")) for line in lines):
        return list(lines)
    return [line | {"flops": total} for line, total in zip(lines, accumulate(line["step_flops"] for line in lines))]


def curves_of(values: Record, base_dir: Path) -> list[Curve]:
    """The curves of a stage, from its metrics file: held-out accuracies, then METRICS."""
    lines = with_flops(read_metrics(base_dir / values["metrics"])) if values.get("metrics") else []
    if lines and values.get("before"):  # measured before the first step
        lines = [dict.fromkeys(AXES, 0) | values["before"], *lines]
    keys = [*sorted({key for line in lines for key in line if key.startswith("accuracy/")}), *METRICS]
    curves = (read_curve(lines, key) for key in keys)
    return [curve for curve in curves if curve]


def read_curve(lines: Sequence[Record], key: str, run: str = "") -> Curve | None:
    """The curve of one metric; None with fewer than two finite values."""
    found = [line for line in lines if is_number(line.get(key)) and is_number(line["step"])]
    if len(found) < 2:
        return None
    metric = metric_of(key)
    axes = {axis: [line[axis] for line in found] for axis in AXES if all(is_number(line.get(axis)) for line in found)}
    size = -(-len(found) // MAX_POINTS)
    values = thin([line[key] for line in found], size)
    return Curve(
        key,
        scoped(metric.title, found[-1].get(f"{key}_of")),
        {axis: last_of_each(points, size) for axis, points in axes.items()},
        values,
        smooth(values) if metric.noisy else [],
        size,
        run,
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number, of float32's range."""
    return isinstance(value, (int, float)) and abs(value) < 2.0**128  # false for NaN


def thin(values: Sequence[float], size: int) -> list[float]:
    """Means of each `size` consecutive values, the last of fewer."""
    return [sum(group) / len(group) for i in range(0, len(values), size) if (group := values[i : i + size])]


def last_of_each(values: Sequence[float], size: int) -> list[float]:
    """The last of each `size` consecutive values, as `thin` groups them."""
    return [values[min(i + size, len(values)) - 1] for i in range(0, len(values), size)]


def reach_of(values: Sequence[float]) -> int:
    """How many points to either side the moving average takes in: about a thirtieth of the curve in all."""
    return len(values) // 60


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a thirtieth of the curve: it does not lag."""
    sums = [0.0, *accumulate(values)]
    averages = []
    for i in range(len(values)):
        reach = min(reach_of(values), i)  # symmetric at the steep start too
        end = min(i + reach + 1, len(values))
        averages.append((sums[end] - sums[i - reach]) / (end - i + reach))
    return averages


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The curve as one line of block characters."""
    short = thin(values, -(-len(values) // width))
    low, high = min(short), max(short)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (v - low) / (high - low or 1.0)))] for v in short)
