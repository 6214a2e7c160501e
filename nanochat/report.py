"""Run records: each stage adds its numbers to report.json, from which report.md and report.html are drawn.

$BASE/report/report.json holds
  machine         of the last recorded stage: processor, cores, memory, versions, commit
  plan            [[name, value], ...], the table that pretraining printed before it started
  total_seconds   over all stages
  tokenizer, base_train, contamination, base_eval, chat_sft, chat_rl, chat_eval, chat_eval_rl: one object for each
    recorded stage, with any of
    seconds, finished_at (given, or when it was recorded), updated_at (while running), command, checkpoint, model
    weights       SHA-256 of the file of weights that base_eval measured
    status        "running" until finished; progress: its terminal line; num_steps: by the plan as it is now
    stopped_early, stopped_by, not_finite   of a run that ended before its last step, and why
    resume_command, gentler_command         to resume it, to run it again with lower learning rates
    planned_steps, tokenizer_hash, forecast {"text", "bpb", "error", "tokens"},
    longer {"times", "command", "seconds", "bpb", "error"}: of pretraining; the forecasts only on the law's own text
    KEY_of        what the value KEY was measured on, where its name promises more: "core_of": "18 of 22 tasks"
    val_bpb, tokens, tokens_per_second, num_params, ngram_params and other single values, shown as they are
    TASK          accuracy in [0, 1] by task name, beside
    counts        {TASK: [passed, total]},  intervals {TASK: [low, high]} (95%),  baselines {TASK: guessing},
    references    {MODEL: {TASK: accuracy}} of other models, as published
    started_from, started_from_stage    the run whose model a finetuning stage started from: base, sft or rl
    before        metrics measured before the first step
    metrics       path of the stage's metrics.jsonl, relative to $BASE: the curves
    samples       [{"prompt", "text"}, ...], with "task" and "right" where answers are judged
    tables        {title: [{column: value, ...}, ...]}, e.g. bytes per token by source
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import Field
from typing_extensions import TypedDict

from nanochat.common import UserError, atomic_write, delete_leftovers, free_name, is_writable, warn, write_json
from nanochat.common.files import check_value, read_json
from nanochat.reporting.curves import is_number
from nanochat.reporting.machine import describe_machine
from nanochat.reporting.pages import render, report_context
from nanochat.reporting.view import SPECIAL_KEYS, STAGES, Record, stages_of, wilson_interval

Number = int | float | None
Pair = Annotated[list[int | float], Field(min_length=2, max_length=2)]


class StageValues(TypedDict, total=False):
    """A stage's values that the pages take apart; others are shown as they are."""

    seconds: Number
    finished_at: str
    updated_at: str
    command: str
    status: str
    checkpoint: str
    model: str
    metrics: str
    num_params: Number
    ngram_params: Number
    tokens: Number
    val_bpb: Number
    core: Number
    chatcore: Number
    counts: dict[str, Pair]
    intervals: dict[str, Pair]
    baselines: dict[str, Number]
    references: dict[str, dict[str, Number]]
    before: dict[str, Any]
    splits: dict[str, str]
    sizes: dict[str, int]
    samples: list[dict[str, str | bool | None]]
    tables: dict[str, list[dict[str, str | bool | Number]]]


class ReportFile(TypedDict, total=False):
    machine: dict[str, Any]
    plan: list[Annotated[list[Any], Field(min_length=2, max_length=2)]]
    total_seconds: Number


def report_dir(base_dir: Path) -> Path:
    """Folder of report.json, report.md and report.html."""
    return Path(base_dir) / "report"


def accuracy_values(
    results: Mapping[str, tuple[float, int]], baselines: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Stage values for results by task, given as (passed, total): accuracies, counts, 95% intervals, baselines."""
    clash = sorted(set(results) & SPECIAL_KEYS)
    assert not clash, f"task names reserved by the report: {clash}"
    values: dict[str, Any] = {name: passed / total if total else 0.0 for name, (passed, total) in results.items()}
    values["counts"] = {name: list(pair) for name, pair in results.items()}
    values["intervals"] = {name: list(wilson_interval(*pair)) for name, pair in results.items()}
    return {**values, "baselines": dict(baselines)} if baselines else values


def record_stage(base_dir: Path, stage: str, values: Mapping[str, Any]) -> None:
    """Write a stage's values to report.json and draw the report again. Call on rank 0 only.

    The values replace the stage's earlier ones, or are merged with them if both name the same `checkpoint`, so that
    one task can be evaluated again alone. `plan` moves to the top level. Several processes may record at once. A
    damaged report.json is renamed with a warning; in a read-only base folder nothing is recorded, with a warning.
    Raises OSError if report.json cannot be written.
    """
    assert stage in STAGES, f"unknown stage {stage!r}; known: {', '.join(STAGES)}"
    if Path(base_dir).exists() and not is_writable(base_dir):
        warn(f"the base folder {base_dir} is read-only: these figures are not recorded")
        return
    folder = report_dir(base_dir)
    folder.mkdir(parents=True, exist_ok=True)
    new = to_json(dict(values))
    time_key = "updated_at" if new.get("status") == "running" else "finished_at"
    new.setdefault(time_key, datetime.now(UTC).isoformat(timespec="seconds"))
    with FileLock(folder / ".lock"):
        delete_leftovers(folder.glob(".*.tmp"))
        report = _load_or_set_aside(base_dir)
        if "plan" in new:
            report["plan"] = new.pop("plan")
        report["machine"] = describe_machine()
        report[stage] = _merge(report.get(stage, {}), new)
        report["total_seconds"] = sum(v.get("seconds") or 0.0 for _, _, v in stages_of(report))
        write_json(folder / "report.json", report)
        try:
            _draw(base_dir, report)
        except Exception as error:  # report.json is written; the pages can be drawn later
            warn(
                f"could not draw the report ({error}); its numbers are saved in {folder / 'report.json'}. "
                "Draw it with: python -m scripts.report"
            )


def load_report(base_dir: Path) -> Record:
    """Read report.json. Raises UserError if it is missing or damaged."""
    path = report_dir(base_dir) / "report.json"
    if not path.is_file():
        raise UserError(f"no report in {path.parent}: run a stage first, or set NANOCHAT_BASE_DIR to its base folder")
    try:
        report = read_json(path, ReportFile, extra="allow")
        return report | {
            stage: check_value(report[stage], f"{path}, {stage}", StageValues, extra="allow")
            for stage in STAGES
            if report.get(stage) is not None
        }
    except UserError as error:
        raise UserError(f"{error}; restore it, or delete it to start a new report") from error


def render_report(base_dir: Path) -> Path:
    """Draw report.md and report.html from report.json; returns the path of report.html. Raises as load_report."""
    report = load_report(base_dir)
    with FileLock(report_dir(base_dir) / ".lock"):
        return _draw(base_dir, report)


def _draw(base_dir: Path, report: Record) -> Path:
    folder = report_dir(base_dir)
    values = report_context(report, base_dir)
    for name in ("report.md", "report.html"):
        with atomic_write(folder / name, "w") as file:
            file.write(render(f"{name}.j2", **values).rstrip() + "\n")
    return folder / "report.html"


def _load_or_set_aside(base_dir: Path) -> Record:
    """The report so far. A damaged file is renamed: it must not make a finished stage fail."""
    path = report_dir(base_dir) / "report.json"
    if not path.exists():
        return {}
    try:
        return load_report(base_dir)
    except UserError as error:
        damaged = free_name(path, "damaged")
        os.replace(path, damaged)
        warn(f"{error}; moved to {damaged.name}, starting a new report")
        return {}


def _merge(old: Record, new: Record) -> Record:
    """`new`, with what `old` has besides if both are of the same checkpoint."""
    if not new.get("checkpoint") or old.get("checkpoint") != new["checkpoint"]:
        return new
    nested = {
        k: {**old.get(k, {}), **new.get(k, {})}
        for k in ("counts", "intervals", "baselines", "splits", "sizes", "tables")
    }
    merged = {**old, **new, **{k: v for k, v in nested.items() if v}}
    asked = {sample.get("task") for sample in new.get("samples", ())}
    if samples := [s for s in old.get("samples", ()) if s.get("task") not in asked] + new.get("samples", []):
        merged["samples"] = samples
    if is_number(old.get("seconds")) and is_number(new.get("seconds")):
        merged["seconds"] = old["seconds"] + new["seconds"]
    return merged


def to_json(value: Any) -> Any:
    """The value in JSON types: paths as strings, arrays and tensors as numbers or lists, NaN and infinity as null."""
    text = json.dumps(value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other))
    return json.loads(text, parse_constant=lambda name: None)
