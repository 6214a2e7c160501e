"""Two or more runs side by side, as one page: outcomes, differing flags, and curves in shared charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from markupsafe import Markup

from nanochat.common import UserError, atomic_write, format_count, format_seconds, warn
from nanochat.files import read_json
from nanochat.reporting.charts import Line, draw_chart, limits_around
from nanochat.reporting.curves import CHARTS, Record, is_number, read_curve, read_metrics, scoped
from nanochat.reporting.pages import render

# Readable on light and dark, also for the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


@dataclass
class RunRecord:
    """Flags and metrics of a run, read from its folder."""

    name: str
    flags: Record  # of the command that started it
    num_steps: int
    metrics: list[Record]  # lines of metrics.jsonl

    @property
    def done(self) -> bool:
        return bool(self.metrics) and self.metrics[-1]["step"] >= self.num_steps

    def last_core(self) -> str | None:
        """The latest CORE, with what it is the mean of."""
        found = next((line for line in reversed(self.metrics) if is_number(line.get("core"))), None)
        return scoped(f"{found['core']:.4f}", found.get("core_of")) if found else None

    def last(self, key: str) -> Any:
        """The latest value of a metric, or None."""
        return next((line[key] for line in reversed(self.metrics) if is_number(line.get(key))), None)


def read_run(base_dir: Path, name: str) -> RunRecord:
    """The run `name`: a base run's tag, sft/TAG, rl/TAG, or the path of a run's folder."""
    kind, _, tag = name.rpartition("/")
    path = base_dir / FOLDERS.get(kind or "base", kind) / tag
    if not (path / "metrics.jsonl").is_file() and (Path(name) / "metrics.jsonl").is_file():
        path = Path(name)
    if not (path / "metrics.jsonl").is_file():
        known = sorted(p.parent.name for p in (base_dir / FOLDERS["base"]).glob("*/metrics.jsonl"))
        raise UserError(
            f"no run {name!r} in {path.parent}; base runs there: {', '.join(known) or 'none'}; "
            "SFT and RL runs are sft/TAG and rl/TAG, or give a folder"
        )
    plan = read_object(path / "plan.json")
    saved = [meta for found in sorted(path.glob("[0-9]*/meta.json")) if (meta := read_object(found).get("plan"))]
    steps = (saved[-1] if saved else plan).get("num_steps", 0)
    return RunRecord(name, plan.get("user_config", {}), steps, read_metrics(path / "metrics.jsonl"))


def read_object(path: Path) -> Record:
    """A JSON object of a run's folder; empty if it is missing, or, with a warning, if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return read_json(path, dict[str, Any])
    except UserError as error:  # damaged, or the run has deleted this step meanwhile
        warn(str(error))
        return {}


def write_comparison(base_dir: Path, names: Sequence[str]) -> Path:
    """report/compare.html over these runs; returns its path. It reloads itself while one of them is running."""
    if len(names) < 2:
        raise UserError("--compare takes at least two runs, such as --compare d4 d4.old1")
    if len(names) > len(COLOURS):
        raise UserError(f"--compare takes at most {len(COLOURS)} runs, got {len(names)}")
    runs = [read_run(base_dir, name) for name in names]
    path = base_dir / "report" / "compare.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"), atomic_write(path, "w") as file:  # as record_stage
        file.write(render_comparison(runs))
    return path


def outcome_rows(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): the last metrics of each run, and its loss relative to the first run's."""
    first = runs[0].last("val_bpb")
    rows = []
    for run in runs:
        bpb = run.last("val_bpb")
        difference = None if None in (bpb, first) or run is runs[0] else f"{bpb - first:+.4f}"
        rows.append(
            [
                run.name,
                f"{run.last('step') or 0:,} of {run.num_steps:,}",
                format_count(run.last("tokens") or 0),
                format_seconds(run.last("seconds") or 0),
                format_count(run.last("tokens_per_second") or 0),
                None if bpb is None else f"{bpb:.4f}",
                difference,
                run.last_core(),
            ]
        )
    return ["run", "steps", "tokens", "training time", "tokens/s", "bits per byte", "vs. the first", "CORE"], rows


def differing_flags(runs: Sequence[RunRecord]) -> list[list[Any]]:
    """A row for each flag in which the runs differ: its name, then each run's value."""
    names = list(dict.fromkeys(key for run in runs for key in run.flags))
    rows = [[key, *(run.flags.get(key) for run in runs)] for key in names if key not in ("resume", "model_tag")]
    return [row for row in rows if len({str(value) for value in row[1:]}) > 1]


def render_comparison(runs: Sequence[RunRecord]) -> str:
    """The HTML page."""
    columns, outcomes = outcome_rows(runs)
    charts = ((title, draw_metric(key, title, runs)) for key, title in CHARTS.items())
    return render(
        "compare.html.j2",
        refresh=not all(run.done for run in runs),
        colours=dict(zip((run.name for run in runs), COLOURS)),
        outcome_columns=columns,
        outcomes=outcomes,
        differing=differing_flags(runs),
        charts=[(title, svg) for title, svg in charts if svg],
    )


def draw_metric(key: str, title: str, runs: Sequence[RunRecord]) -> Markup | None:
    """One metric of all runs as an inline SVG, None if no run has it. The training loss is smoothed."""
    lines = []
    for run, colour in zip(runs, COLOURS):
        if curve := read_curve(run.metrics, key, title):
            lines.append(Line(curve.steps, curve.smooth if key == "loss" else curve.values, colour))
    if not lines:
        return None
    limits = None
    if key == "loss":  # without the steep start, which would flatten the rest
        limits = limits_around([value for line in lines for value in line.values[len(line.values) // 10 :]])
    return draw_chart(title, lines, limits)
