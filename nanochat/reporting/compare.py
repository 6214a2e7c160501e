"""Two or more runs side by side, as one page: outcomes, differing flags, and curves in shared charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from nanochat.common import UserError, atomic_write, format_count, format_seconds, warn
from nanochat.common.files import read_json
from nanochat.reporting.charts import Chart
from nanochat.reporting.curves import METRICS, Record, is_number, read_curve, read_metrics, scoped, with_flops
from nanochat.reporting.pages import chart_values, render

MAX_RUNS = 6  # colours and dashes of the style sheet, chosen to differ also for the colour-blind and in grey
FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


@dataclass
class RunRecord:
    """Flags and metrics of a run, read from its folder."""

    name: str
    flags: Record  # of the command that started it
    num_steps: int
    metrics: list[Record]  # lines of metrics.jsonl
    measured_on: Record  # what its validation set depends on, as far as it is known, see validation_set

    def last_core(self) -> str | None:
        """The latest CORE, with what it is the mean of."""
        found = next((line for line in reversed(self.metrics) if is_number(line.get("core"))), None)
        return scoped(f"{found['core']:.4f}", found.get("core_of")) if found else None

    def differs(self, other: "RunRecord", *items: str) -> list[str]:
        """Which of the items of `measured_on`, all by default, are known of both runs and differ."""
        mine, others = self.measured_on, other.measured_on
        return [item for item in items or mine if None not in (mine[item], others[item]) and mine[item] != others[item]]

    def last(self, key: str) -> Any:
        """The latest value of a metric, or None."""
        return next((line[key] for line in reversed(self.metrics) if is_number(line.get(key))), None)


def read_run(base_dir: Path, name: str) -> RunRecord:
    """The run `name`: a base run's tag, sft/TAG, rl/TAG, or the path of a run's folder."""
    kind, _, tag = name.rpartition("/")
    folder = base_dir / FOLDERS.get(kind or "base", kind)
    path = folder / tag
    if not (path / "metrics.jsonl").is_file() and (Path(name) / "metrics.jsonl").is_file():
        path = Path(name)
    if not (path / "metrics.jsonl").is_file():
        known = sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))
        raise UserError(
            f"no run {name!r}; those in {folder}: {', '.join(known) or 'none'}; "
            "base runs are named by their tag, SFT and RL runs sft/TAG and rl/TAG, others by their folder"
        )
    plan = read_object(path / "plan.json")
    saved = [meta for found in sorted(path.glob("[0-9]*/meta.json")) if (meta := read_object(found)).get("plan")]
    meta, flags = saved[-1] if saved else {}, plan.get("user_config", {})
    steps = (meta.get("plan") or plan).get("num_steps", 0)
    metrics = with_flops(read_metrics(path / "metrics.jsonl"))
    return RunRecord(name, flags, steps, metrics, validation_set(path, meta, flags))


def validation_set(path: Path, meta: Record, flags: Record) -> Record:
    """What the bits per byte of the run in the folder `path` depend on besides its weights; None for what is unknown.

    `meta` is of its last checkpoint, empty before the first.
    """
    stages = {folder: stage for stage, folder in FOLDERS.items()}
    shards = read_object(path / "corpus.json").get("val") or []  # of base runs
    tokens = flags.get("eval_tokens")
    if tokens == -1:  # the default, which depends on the device
        tokens = f"default of {meta['runtime']['device']}" if meta.get("runtime") else None
    return {
        "stage": meta.get("stage") or stages.get(path.parent.name),
        "data": sorted(str(shard["digest"]) for shard in shards) or meta.get("data"),
        "tokenizer": meta.get("tokenizer_hash"),
        "tokens": tokens,
        "context": meta.get("model_config", {}).get("sequence_len"),
    }


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
    """report/compare.html over these runs; returns its path."""
    if len(names) < 2:
        raise UserError("--compare takes at least two runs, such as --compare d4 d4.old1")
    if len(names) > MAX_RUNS:
        raise UserError(f"--compare takes at most {MAX_RUNS} runs, got {len(names)}")
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
        if difference and run.differs(runs[0]):
            difference = "another validation set"
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
    charts = [chart for key in METRICS if (chart := compare_metric(key, runs))]
    names = [run.name for run in runs]
    return render(
        "compare.html.j2",
        runs=names,
        outcome_columns=columns,
        outcomes=outcomes,
        notes=[note for run in runs[1:] if (note := validation_note(run, runs[0]))],
        differing=differing_flags(runs),
        charts=[chart for chart in charts if not chart.metric.minor],
        minor=[chart for chart in charts if chart.metric.minor],
        **chart_values(charts),
    )


def validation_note(run: RunRecord, first: RunRecord) -> str:
    """`d8 was measured on another validation set than d4 (tokenizer, tokens): ...`; empty if it was not."""
    items = run.differs(first)
    return (
        f"{run.name} was measured on another validation set than {first.name} ({', '.join(items)} differ"
        f"{'s' if len(items) == 1 else ''}): their bits per byte cannot be compared."
        if items
        else ""
    )


def compare_metric(key: str, runs: Sequence[RunRecord]) -> Chart | None:
    """One metric of all runs that can be compared to the first in it; None if no run has it."""
    # Losses are per token: of one tokenizer. CORE may be the mean of fewer tasks.
    items = {"val_bpb": (), "loss": ("stage", "tokenizer")}
    curves = [read_curve(run.metrics, key, run.name) for run in runs]
    first = next((i for i, curve in enumerate(curves) if curve), None)
    if first is None:
        return None
    left_out = []
    for i, (run, curve) in enumerate(zip(runs, curves)):
        other = curve is not None and key in items and run.differs(runs[first], *items[key])
        if other or (key == "core" and curve and curve.title != curves[first].title):  # type: ignore[union-attr]
            left_out.append(run.name)
            curves[i] = None
    what = {"val_bpb": "measured on another validation set", "loss": "of another tokenizer or stage"}
    note = f"Not drawn, {what.get(key, 'of other tasks')}: {', '.join(left_out)}." if left_out else ""
    return Chart(key, curves, note)
