"""The contents of a report as plain values, for the pages and for the terminal: stages, facts, skills, samples."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import format_count, format_seconds
from nanochat.reporting.curves import Record, scoped
from nanochat.reporting.status import Status

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
"""Stage keys of report.json with their titles, in the order of the pipeline."""

# The stage that trained the model which each stage evaluates or continues from.
MODEL_OF = {
    "base_eval": "base_train",
    "chat_sft": "base_train",
    "chat_rl": "chat_sft",
    "chat_eval": "chat_sft",
    "chat_eval_rl": "chat_rl",
}
STARTS_FROM = {"chat_sft": "base", "chat_rl": "sft"}  # as a rule, in the words of --source

# Keys of a stage that are not facts: shown elsewhere on the page, or not at all.
SPECIAL_KEYS = frozenset(
    {
        "seconds",
        "finished_at",
        "updated_at",
        "model",
        "status",
        "checkpoint",
        "weights",
        "command",
        "metrics",
        "samples",
        "tables",
        "intervals",
        "counts",
        "baselines",
        "references",
        "sizes",
        "before",
        "after",
        "progress",
        "num_steps",
        "stopped_by",
        "not_finite",
        "tokenizer_hash",
        "resume_command",
        "gentler_command",
    }
)

FACT_LABELS = {
    "val_bpb": "validation bits per byte",
    "train_bpb": "training bits per byte",
    "num_params": "parameters",
    "ngram_params": "parameters in n-grams",
    "tokens_per_second": "trained tokens per second",
    "bytes_per_token": "bytes per token",
    "vocab_size": "vocabulary",
    "core": "CORE",
    "chatcore": "ChatCORE",
}


@dataclass
class Skill:
    """One task's accuracy with its 95% interval, all in [0, 1]."""

    name: str
    accuracy: float
    low: float
    high: float
    passed: int
    total: int
    baseline: float | None = None  # accuracy of guessing
    reference: tuple[str, float] | None = None  # (name, accuracy) of another model, as published


def stages_of(report: Record) -> list[tuple[str, str, Record]]:
    """(key, title, values) of the stages recorded so far, in order of time; a running one last."""
    found = [(key, title, report[key]) for key, title in STAGES.items() if isinstance(report.get(key), dict)]
    return sorted(found, key=lambda stage: str(stage[2].get("finished_at") or stage[2].get("updated_at") or ""))


STAGE_COLUMNS = ("stage", "run", "time", "finished (UTC)")


def stage_times(report: Record, statuses: Mapping[str, Status]) -> list[tuple[str, str, str, str]]:
    """The STAGE_COLUMNS of each stage. One that has not finished has the time of its last update."""
    rows = []
    for key, title, values in stages_of(report):
        time, at = format_seconds(values.get("seconds") or 0), short_time(values.get("finished_at"))
        if status := statuses.get(key):
            time, at = "running" if status.alive else "dead", f"last update {short_time(values.get('updated_at'))}"
        rows.append((title, run_of(values), time, at))
    return rows


def short_time(stamp: Any) -> str:
    """`2026-01-31T12:00:00+00:00` -> `2026-01-31 12:00:00`."""
    return str(stamp or "").replace("T", " ").removesuffix("+00:00")


def run_of(values: Record) -> str:
    """The name of the run that a stage trained or evaluated; empty if unknown."""
    return str(values.get("model") or "") or (Path(values["metrics"]).parent.name if values.get("metrics") else "")


def mixed_stages(report: Record) -> dict[str, str]:
    """A sentence for each stage, by its key, that belongs to another model than the stage before it."""
    found = {key: (title, values) for key, title, values in stages_of(report)}
    notes = {}
    shown = (report.get("tokenizer") or {}).get("hash")
    used = (report.get("base_train") or {}).get("tokenizer_hash")
    if shown and used and shown != used:
        notes["tokenizer"] = f"The tokenizer shown ({shown[:8]}) is not the model's ({used[:8]})."
    for key, source in MODEL_OF.items():
        if key not in found or source not in found:
            continue
        (title, own), (source_title, other) = found[key], found[source]
        trained = "started_from" in own  # its own run may have another name
        if own.get("started_from_stage", STARTS_FROM.get(key)) != STARTS_FROM.get(key):
            continue  # it trained an earlier model of its own kind on
        name = str(own["started_from"]) if trained else run_of(own)
        if name and run_of(other) and name != run_of(other):
            verb = "started from" if trained else "is of"
            notes[key] = f"{title} {verb} run {name}, {source_title} is of run {run_of(other)}."
        elif own.get("finished_at") and str(own["finished_at"]) < str(other.get("finished_at") or ""):
            notes[key] = f"{title} is older than {source_title}: it belongs to an earlier model."
    return notes


def wilson_interval(passed: float, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), 95% by default; (0, 1) without trials."""
    if total < 1:
        return 0.0, 1.0
    share, spread = passed / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(max(share * (1 - share), 0.0) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def skills_of(values: Record) -> list[Skill]:
    """The tasks of a stage: every name with an entry in `intervals`."""
    skills = []
    for name, (low, high) in values.get("intervals", {}).items():
        passed, total = values.get("counts", {}).get(name, (0, 0))
        baseline = values.get("baselines", {}).get(name)
        references = ((model, table.get(name)) for model, table in values.get("references", {}).items())
        reference = next(((model, share) for model, share in references if share is not None), None)
        skills.append(Skill(name, values.get(name) or 0.0, low, high, passed, total, baseline, reference))
    return skills


def of_usual_split(values: Record, name: str) -> bool:
    """Whether a task of chat_eval was measured on the split it is meant for; others are named `TASK, SPLIT`."""
    return f", {values.get('splits', {}).get(name)}" not in name


@dataclass
class SkillGroup:
    """Stages that measured the same tasks, and a row for each task."""

    titles: list[str]
    rows: list[tuple[str, list[Skill | None]]]  # (task, its skill after each stage)

    @property
    def marks(self) -> list[str]:
        """How each stage's values are marked: what was before hollow, the last full."""
        return [*("before", "between")[: len(self.titles) - 1], "after"]

    @property
    def references(self) -> list[str]:
        """The other models that some task has a published value of."""
        return sorted({skill.reference[0] for _, row in self.rows for skill in row if skill and skill.reference})

    @property
    def has_baseline(self) -> bool:
        return any(skill and skill.baseline is not None for _, row in self.rows for skill in row)


SKILL_STAGES = {"base_eval": "base model", "chat_eval": "after finetuning", "chat_eval_rl": "after RL"}


def skill_groups(report: Record) -> list[SkillGroup]:
    """The skills of all stages that measured some, before and after, in pipeline order; those of chat models first."""
    measured = {title: skills_of(report.get(key) or {}) for key, title in SKILL_STAGES.items()}
    groups: list[dict[str, list[Skill]]] = []
    for title, skills in measured.items():
        names = {skill.name for skill in skills}
        same = (g for g in groups if names & {skill.name for known in g.values() for skill in known})
        if group := next(same, None):
            group[title] = skills
        elif skills:
            groups.append({title: skills})
    return [skill_group(group) for group in reversed(groups)]


def skill_group(stages: dict[str, list[Skill]]) -> SkillGroup:
    """From each stage's skills, by title."""
    by_name = [{skill.name: skill for skill in skills} for skills in stages.values()]
    names = dict.fromkeys(name for found in by_name for name in found)
    return SkillGroup(list(stages), [(name, [found.get(name) for found in by_name]) for name in names])


def facts_of(values: Record) -> list[tuple[str, str]]:
    """(label, text) of a stage's single values, those in FACT_LABELS first."""
    tasks = set(values.get("intervals", {}))
    hidden = SPECIAL_KEYS | tasks | {f"{key}_of" for key in values}
    plain = {k: v for k, v in values.items() if k not in hidden and isinstance(v, (str, int, float))}
    order = [k for k in FACT_LABELS if k in plain] + [k for k in plain if k not in FACT_LABELS]
    labels = {k: scoped(FACT_LABELS.get(k, k.replace("_", " ")), values.get(f"{k}_of")) for k in order}
    return [(labels[k], format_fact(k, plain[k])) for k in order]


def format_fact(key: str, value: Any) -> str:
    """`0.90123` -> `0.9012`, `1234567` -> `1,234,567`; seconds as a duration, `1e-07` for tiny values."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if key.endswith("seconds"):
        return format_seconds(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.3g}"


def format_cell(value: Any) -> str:
    """Text of a table's cell: floats to about three digits, empty for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return "" if value is None else str(value)


def numeric_columns(rows: Sequence[Sequence[Any]], num_columns: int) -> list[bool]:
    """Which columns hold only numbers (or nothing); never the first, which names the row."""
    return [
        column > 0 and all(row[column] is None or re.match(r"[-+.]?\d", str(row[column])) for row in rows)
        for column in range(num_columns)
    ]


# (label, stage, key, format) of the main numbers of the pipeline.
HEADLINE: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("parameters", "base_train", "num_params", format_count),
    ("parameters in n-grams", "base_train", "ngram_params", format_count),
    ("training tokens", "base_train", "tokens", format_count),
    ("bits per byte", "base_train", "val_bpb", "{:.3f}".format),
    ("CORE", "base_eval", "core", "{:.4f}".format),
    ("chat bits per byte", "chat_sft", "val_bpb", "{:.3f}".format),
    ("ChatCORE", "chat_eval", "chatcore", "{:.4f}".format),
    ("ChatCORE after RL", "chat_eval_rl", "chatcore", "{:.4f}".format),
)


def headline(report: Record) -> list[tuple[str, str]]:
    """(label, text) of the main numbers that are recorded, and the total time."""
    found = []
    for label, stage, key, form in HEADLINE:
        values = report.get(stage) or {}
        found.append((scoped(label, values.get(f"{key}_of")), values.get(key), form))
    found.append(("total time", report.get("total_seconds") or None, format_seconds))
    return [(label, form(value)) for label, value, form in found if value is not None]
