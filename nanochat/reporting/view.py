"""What a report shows, as plain values: stages, facts, skills, curves. Both the text and the page draw from here."""

import json
import math
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from nanochat.common import format_count, format_seconds

Record = dict[str, Any]

STAGES = {
    "tokenizer": "Tokenizer",
    "base_train": "Pretraining",
    "contamination": "Benchmark items in the training text",
    "base_eval": "Base model",
    "chat_sft": "Supervised finetuning",
    "chat_rl": "Reinforcement learning",
    "chat_eval": "Chat model",
    "chat_eval_rl": "Chat model after reinforcement learning",
}
"""Stage keys of report.json in the order of the pipeline, with their titles."""

# Which stage's model each stage looks at or goes on from.
MODEL_OF = {
    "base_eval": "base_train",
    "chat_sft": "base_train",
    "chat_rl": "chat_sft",
    "chat_eval": "chat_sft",
    "chat_eval_rl": "chat_rl",
}

# Keys of a stage that are shown in a place of their own, or only steer the report.
SPECIAL_KEYS = frozenset(
    {
        "seconds",
        "finished_at",
        "updated_at",
        "model",
        "status",
        "checkpoint",
        "command",
        "metrics",
        "samples",
        "tables",
        "intervals",
        "counts",
        "baselines",
        "references",
        "before",
        "after",
    }
)

FACT_LABELS = {
    "val_bpb": "validation bits per byte",
    "train_bpb": "training bits per byte",
    "num_params": "parameters",
    "tokens_per_second": "tokens per second",
    "bytes_per_token": "bytes per token",
    "vocab_size": "vocabulary",
    "core": "CORE",
    "chatcore": "ChatCORE",
    "mfu": "share of machine peak",
}

# Keys in metrics.jsonl that get a chart each, with its title.
CHARTS = {
    "loss": "Training loss",
    "val_bpb": "Validation bits per byte",
    "reward": "Mean reward",
    "entropy": "Entropy of answers (nats per token, estimated)",
    "answer_tokens": "Tokens per answer",
    "groups_without_signal": "Share of prompts whose answers were all as good",
    "core": "CORE",
    "tokens_per_second": "Tokens per second",
    "lr": "Learning rate",
    "lr_multiplier": "Learning rate (share of its peak)",
}
NOISY = ("loss", "reward", "entropy", "answer_tokens", "groups_without_signal")
MAX_POINTS = 400  # of a curve; more cannot be told apart on a screen


@dataclass
class Skill:
    """One task's accuracy with its 95% interval, all in [0, 1]."""

    name: str
    accuracy: float
    low: float
    high: float
    passed: int
    total: int
    baseline: float | None = None  # what guessing gets
    reference: tuple[str, float] | None = None  # another model's name and accuracy


@dataclass
class Curve:
    """One quantity over the steps of a stage. `smooth` is an average for noisy ones."""

    title: str
    steps: list[float]
    values: list[float]
    smooth: list[float] = field(default_factory=list)


def stages_of(report: Record) -> list[tuple[str, str, Record]]:
    """(key, title, values) of the stages recorded so far, in pipeline order."""
    return [(key, title, report[key]) for key, title in STAGES.items() if isinstance(report.get(key), dict)]


def is_running(report: Record) -> bool:
    """True while some stage is still at work, so that the page should look again."""
    return any(values.get("status") == "running" for _, _, values in stages_of(report))


STAGE_COLUMNS = ("stage", "run", "time", "finished (UTC)")


def stage_times(report: Record) -> list[tuple[str, str, str, str]]:
    """The STAGE_COLUMNS of each stage. Of one under way it is said when it was last heard of: it may be dead."""
    rows = []
    for _, title, values in stages_of(report):
        time, at = format_seconds(values.get("seconds") or 0), short_time(values.get("finished_at"))
        if values.get("status") == "running":
            time, at = "running", f"last heard of {short_time(values.get('updated_at'))}"
        rows.append((title, run_of(values), time, at))
    return rows


def short_time(stamp: Any) -> str:
    """`2026-01-31T12:00:00+00:00` -> `2026-01-31 12:00:00`."""
    return str(stamp or "").replace("T", " ").removesuffix("+00:00")


def run_of(values: Record) -> str:
    """The name of the run that a stage is about; empty if it is about none, or says nothing."""
    return str(values.get("model") or "") or (Path(values["metrics"]).parent.name if values.get("metrics") else "")


def mixed_runs(report: Record) -> list[str]:
    """What a reader must know where the stages are not those of one model: a sentence each."""
    found, notes = {key: (title, values) for key, title, values in stages_of(report)}, []
    for key, source in MODEL_OF.items():
        if key not in found or source not in found:
            continue
        (title, own), (source_title, other) = found[key], found[source]
        trained = "started_from" in own  # into a run that may have a name of its own
        name = str(own["started_from"]) if trained else run_of(own)
        if name and run_of(other) and name != run_of(other):
            says = "started from" if trained else "is of"
            notes.append(f"{title} {says} the run {name}, {source_title} is of {run_of(other)}.")
        elif own.get("finished_at") and str(own["finished_at"]) < str(other.get("finished_at") or ""):
            notes.append(f"{title} is older than {source_title}: it is of an earlier model.")
    return notes


def wilson_interval(passed: float, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927), 95% by default; (0, 1) when nothing was tried."""
    if total < 1:
        return 0.0, 1.0
    share, spread = passed / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(max(share * (1 - share), 0.0) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def skills_of(values: Record) -> list[Skill]:
    """The tasks of a stage: every name that has an interval."""
    skills = []
    for name, (low, high) in values.get("intervals", {}).items():
        passed, total = values.get("counts", {}).get(name, (0, 0))
        baseline = values.get("baselines", {}).get(name)
        known = ((model, table.get(name)) for model, table in values.get("references", {}).items())
        reference = next(((model, share) for model, share in known if share is not None), None)
        skills.append(Skill(name, values.get(name) or 0.0, low, high, passed, total, baseline, reference))
    return skills


def facts_of(values: Record) -> list[tuple[str, str]]:
    """(label, text) of a stage's single values, known ones first."""
    tasks = set(values.get("intervals", {}))
    plain = {
        k: v for k, v in values.items() if k not in SPECIAL_KEYS and k not in tasks and isinstance(v, (str, int, float))
    }
    order = [k for k in FACT_LABELS if k in plain] + [k for k in plain if k not in FACT_LABELS]
    return [(FACT_LABELS.get(k, k.replace("_", " ")), format_fact(k, plain[k])) for k in order]


def format_fact(key: str, value: Any) -> str:
    """`0.90123` -> `0.9012`, `1234567` -> `1,234,567`; seconds as a duration, long decimals short."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "mfu":
        return f"{value:.1%}"
    if key.endswith("seconds") and isinstance(value, (int, float)):
        return format_seconds(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.3g}"
    return str(value)


def format_cell(value: Any) -> str:
    """A table's cell: decimals cut to what tells them apart, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return "" if value is None else str(value)


def headline(report: Record) -> list[tuple[str, str]]:
    """The handful of numbers a reader wants first, as (label, text)."""
    train, core, sft, chat, last = (
        report.get(key) or {} for key in ("base_train", "base_eval", "chat_sft", "chat_eval", "chat_eval_rl")
    )
    found = [
        ("parameters", format_count(train["num_params"]) if train.get("num_params") else ""),
        ("tokens read", format_count(train["tokens"]) if train.get("tokens") else ""),
        ("bits per byte", f"{train['val_bpb']:.3f}" if train.get("val_bpb") else ""),
        ("CORE", f"{core['core']:.4f}" if core.get("core") is not None else ""),
        ("chat bits per byte", f"{sft['val_bpb']:.3f}" if sft.get("val_bpb") else ""),
        ("ChatCORE", f"{chat['chatcore']:.4f}" if chat.get("chatcore") is not None else ""),
        ("ChatCORE after RL", f"{last['chatcore']:.4f}" if last.get("chatcore") is not None else ""),
        ("total time", format_seconds(report["total_seconds"]) if report.get("total_seconds") else ""),
    ]
    return [(label, text) for label, text in found if text]


def before_and_after(report: Record) -> list[tuple[str, list[Record]]]:
    """(heading, samples) of what the model said at each stage that kept some; a sample is {"prompt", "text"}."""
    headings = {
        "base_train": "While pretraining",
        "base_eval": "Before: the base model continues a text",
        "chat_sft": "After finetuning",
        "chat_rl": "After reinforcement learning",
        "chat_eval": "After finetuning: held-out questions",
        "chat_eval_rl": "After reinforcement learning: held-out questions",
    }
    found = [(headings.get(key, title), values.get("samples") or []) for key, title, values in stages_of(report)]
    return [(heading, samples) for heading, samples in found if samples]


# ---------------------------------------------------------------------------------------------------
# Curves


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl; a line cut short, as a live run may show, ends the reading. [] if missing."""
    lines: list[Record] = []
    if not path.is_file():
        return lines
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                lines.append(value)
    return lines


def curves_of(values: Record, base_dir: Path) -> list[Curve]:
    """The stage's curves that have at least two points, from its metrics file."""
    if not values.get("metrics"):
        return []
    lines = read_metrics(base_dir / values["metrics"])
    curves = []
    accuracies = sorted({key for line in lines for key in line if key.startswith("accuracy/")})
    first = values.get("before") or {}  # measured before the first step
    lines = [{"step": 0, **first}, *lines] if first else lines
    for key, title in {**{key: f"Held out: {key.removeprefix('accuracy/')}" for key in accuracies}, **CHARTS}.items():
        points = [(line["step"], line[key]) for line in lines if key in line and is_number(line[key])]
        if len(points) >= 2:
            steps, numbers = thin(points)
            curves.append(Curve(title, steps, numbers, smooth(numbers) if key in NOISY else []))
    return curves


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points, each the mean of a run of neighbours; the last step is kept as it is."""
    size = -(-len(points) // limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    steps = [group[-1][0] for group in groups]
    return steps, [sum(value for _, value in group) / len(group) for group in groups]


def smooth(values: list[float]) -> list[float]:
    """Mean of each value and its neighbours, about a thirtieth of the curve; on both sides, so it does not lag."""
    sums = [0.0, *accumulate(values)]
    out = []
    for i in range(len(values)):
        reach = min(len(values) // 60, i)  # no less to the right at the steep start than to the left
        end = min(i + reach + 1, len(values))
        out.append((sums[end] - sums[i - reach]) / (end - i + reach))
    return out


def sparkline(values: list[float], width: int = 40) -> str:
    """The curve in one line of text."""
    _, short = thin(list(enumerate(values)), width)
    low, high = min(short), max(short)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (v - low) / (high - low or 1.0)))] for v in short)
