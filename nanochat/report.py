"""Run records: each stage leaves its numbers in report.json, and report.md and report.html are drawn from it.

$BASE/report/report.json holds
  machine         where the last recorded stage ran: processor, cores, memory, versions, commit
  plan            [[name, value], ...], the table pretraining printed before it started
  total_seconds   over all stages
  tokenizer, base_train, contamination, base_eval, chat_sft, chat_rl, chat_eval, chat_eval_rl: one object for each
    stage recorded, with any of
    seconds, finished_at, updated_at (while at work), command, status ("running" while at work), checkpoint, model
    val_bpb, tokens, tokens_per_second, num_params and other single values, shown as they are
    TASK          accuracy in [0, 1] by task name, beside
    counts        {TASK: [passed, total]},  intervals {TASK: [low, high]} (95%),  baselines {TASK: guessing}
    started_from  the run whose model a finetuning stage went on from
    metrics       path of the stage's metrics.jsonl, relative to $BASE: the curves
    samples       [{"prompt", "text"}, ...]
    tables        {title: [{column: value, ...}, ...]}, e.g. bytes per token by source
"""

import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from nanochat.common import UserError, atomic_write, format_seconds, read_json, warn, write_json
from nanochat.reporting.view import (
    SPECIAL_KEYS,
    STAGE_COLUMNS,
    STAGES,
    Record,
    before_and_after,
    curves_of,
    facts_of,
    format_cell,
    headline,
    mixed_runs,
    skills_of,
    sparkline,
    stage_times,
    stages_of,
    wilson_interval,
)


def report_dir(base_dir: Path) -> Path:
    """Where report.json, report.md and report.html are."""
    return Path(base_dir) / "report"


def accuracy_values(
    results: Mapping[str, tuple[float, int]], baselines: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Results by task as (passed, total) -> the stage values that hold them: accuracies, counts, intervals."""
    clash = sorted(set(results) & SPECIAL_KEYS)
    assert not clash, f"task names that a report keeps for itself: {clash}"
    values: dict[str, Any] = {name: passed / total if total else 0.0 for name, (passed, total) in results.items()}
    values["counts"] = {name: list(pair) for name, pair in results.items()}
    values["intervals"] = {name: list(wilson_interval(*pair)) for name, pair in results.items()}
    return {**values, "baselines": dict(baselines)} if baselines else values


def record_stage(base_dir: Path, stage: str, values: Mapping[str, Any]) -> None:
    """Put a stage's values into report.json and draw the report again. Call on the main process only.

    The values replace the stage's earlier ones, or join them if both name the same `checkpoint` (so one task
    can be evaluated again alone). `plan` moves to the top level. Safe when several processes record at once.
    A damaged report.json is put aside with a warning. Raises OSError if report.json cannot be written.
    """
    assert stage in STAGES, f"unknown stage {stage!r}; known: {', '.join(STAGES)}"
    folder = report_dir(base_dir)
    folder.mkdir(parents=True, exist_ok=True)
    new = to_json(values)
    new["updated_at" if new.get("status") == "running" else "finished_at"] = datetime.now(UTC).isoformat(
        timespec="seconds"
    )
    with FileLock(folder / ".lock"):
        report = _read_or_put_aside(folder / "report.json")
        if "plan" in new:
            report["plan"] = new.pop("plan")
        report["machine"] = describe_machine()
        report[stage] = _joined(report.get(stage) or {}, new)
        report["total_seconds"] = sum(v.get("seconds") or 0.0 for _, _, v in stages_of(report))
        write_json(folder / "report.json", report)
        try:
            _draw(Path(base_dir), report)
        except Exception as error:  # the numbers are safe; the pages can be drawn again
            warn(
                f"could not draw the report ({error}); the numbers are in {folder / 'report.json'}, "
                "and `python -m scripts.report` draws it again"
            )


def load_report(base_dir: Path) -> Record:
    """The recorded values. Raises UserError if there are none or the file is damaged."""
    path = report_dir(base_dir) / "report.json"
    if not path.is_file():
        raise UserError(f"no report in {path.parent}: run a stage first, or set NANOCHAT_BASE_DIR to where it ran")
    report = read_json(path)
    if not isinstance(report, dict):
        raise UserError(f"{path} does not hold a report; delete it and run a stage again")
    return report


def render_report(base_dir: Path) -> Path:
    """Draw report.md and report.html again from report.json; returns the page's path. Raises as load_report."""
    report = load_report(base_dir)
    with FileLock(report_dir(base_dir) / ".lock"):
        return _draw(Path(base_dir), report)


def _draw(base_dir: Path, report: Record) -> Path:
    from nanochat.reporting.html import render_html

    folder = report_dir(base_dir)
    for name, draw in (("report.md", render_markdown), ("report.html", render_html)):
        with atomic_write(folder / name, "w") as file:
            file.write(draw(report, base_dir))
    return folder / "report.html"


def _read_or_put_aside(path: Path) -> Record:
    """What is recorded so far. A finished stage must not fail because an older record is damaged."""
    if not path.exists():
        return {}
    try:
        report = read_json(path)
        if isinstance(report, dict):
            return report
        reason = "it does not hold a report"
    except UserError as error:
        reason = str(error)
    aside = path.with_suffix(".damaged.json")
    os.replace(path, aside)
    warn(f"{reason}; moved to {aside.name}, starting a new report")
    return {}


def _joined(old: Record, new: Record) -> Record:
    if not new.get("checkpoint") or old.get("checkpoint") != new["checkpoint"]:
        return new
    nested = {k: {**old.get(k, {}), **new.get(k, {})} for k in ("counts", "intervals", "baselines", "splits", "tables")}
    return {**old, **new, **{k: v for k, v in nested.items() if v}}


def to_json(value: Any) -> Any:
    """The value in JSON's own types: paths as text, numpy and torch scalars as numbers, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return to_json(value.tolist()) if hasattr(value, "tolist") else str(value)


# ---------------------------------------------------------------------------------------------------
# The machine


def describe_machine() -> Record:
    """Processor, cores, memory, GPUs, versions and the code's commit, for the record."""
    import torch

    from nanochat.runtime import device_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = memory_bytes()
    return {
        "processor": device_name(torch.device("cpu")),
        "cores": cores,
        "memory": f"{memory / 2**30:.1f} GiB" if memory else None,
        "gpus": ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus))) or None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nanochat": package_version(),
        "commit": git_commit(),
    }


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its control group's limit if that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def package_version() -> str | None:
    try:
        return metadata.version("nanochat")
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Short hash of the checkout this code is in, "+changes" if it was edited; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+changes"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() if said.returncode == 0 else None


# ---------------------------------------------------------------------------------------------------
# report.md


def render_markdown(report: Record, base_dir: Path) -> str:
    """The report as text. What the model said stands in code fences, so nothing in it can act."""
    parts = ["# nanochat report", " · ".join(f"{label} **{text}**" for label, text in headline(report))]
    parts += [_cell(note) for note in mixed_runs(report)]
    if any(skills_of(values) for _, _, values in stages_of(report)):
        parts += ["## Skills", _skills_markdown(report)]
    curves = [(title, c) for _, title, values in stages_of(report) for c in curves_of(values, base_dir)]
    if curves:
        rows = [(f"{title}: {c.title}", sparkline(c.values), c.values[0], c.values[-1]) for title, c in curves]
        parts += ["## Curves", _table(("", "over the steps", "first", "last"), rows)]
    for heading, samples in before_and_after(report):
        parts += [f"## {heading}", *(_fence(str(s.get("prompt", "")), str(s.get("text", ""))) for s in samples)]
    parts += ["## Stages", _times_markdown(report)]
    for _, title, values in stages_of(report):
        facts, tables = facts_of(values), values.get("tables") or {}
        parts += [f"### {title}"] if facts or tables else []
        parts += [_table(("", ""), facts)] if facts else []
        for name, table in tables.items():
            columns = list(dict.fromkeys(c for row in table for c in row))
            parts += [f"**{_cell(name)}**", _table(columns, [[row.get(c) for c in columns] for row in table])]
    if report.get("plan"):
        parts += ["## Plan", _table(("", ""), report["plan"])]
    if report.get("machine"):
        parts += ["## Machine", _table(("", ""), [(k, v) for k, v in report["machine"].items() if v is not None])]
    commands = [values["command"] for _, _, values in stages_of(report) if values.get("command")]
    parts += ["## Commands", _fence("\n".join(commands))] if commands else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _skills_markdown(report: Record) -> str:
    rows = []
    for _, title, values in stages_of(report):
        for s in skills_of(values):
            bar = "█" * round(20 * s.accuracy) + "░" * (20 - round(20 * s.accuracy))
            interval = f"{s.low:.1%} – {s.high:.1%}"
            rows.append((title, s.name, bar, f"{s.accuracy:.1%}", interval, f"{s.passed}/{s.total}"))
    return _table(("model", "task", "", "accuracy", "95% interval", "right"), rows)


def _times_markdown(report: Record) -> str:
    total = format_seconds(report.get("total_seconds") or 0)
    return _table(STAGE_COLUMNS, [*stage_times(report), ("**total**", "", total, "")])


def _table(columns: Any, rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = format_cell(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split())


def _fence(prompt: str, text: str = "") -> str:
    """A code block that no backticks inside can close."""
    body = f"> {prompt}\n{text}" if text else prompt
    ticks = "```"
    while ticks in body:
        ticks += "`"
    return f"{ticks}text\n{body}\n{ticks}"
