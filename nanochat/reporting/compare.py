"""Two or more runs side by side, as one page: what they were, how they ended, and their curves over each other."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from nanochat.common import UserError, atomic_write, format_count, format_seconds, read_json
from nanochat.reporting.html import PAGE_COLOURS, esc, inline_svg, short_number, table
from nanochat.reporting.view import CHARTS, Record, is_number, read_metrics, smooth, thin

# Colours told apart on light and dark, also by people who do not see all of them (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
REFRESH_SECONDS = 15


@dataclass
class RunRecord:
    """What a run left in its folder."""

    name: str
    settings: Record  # the flags it was started with
    num_steps: int
    lines: list[Record]  # of metrics.jsonl

    @property
    def done(self) -> bool:
        return bool(self.lines) and self.lines[-1]["step"] >= self.num_steps

    def last(self, key: str) -> Any:
        """The latest value of a metric, or None."""
        return next((line[key] for line in reversed(self.lines) if is_number(line.get(key))), None)


def read_run(base_dir: Path, name: str) -> RunRecord:
    """The run `name`: a base run's tag, sft/TAG, rl/TAG, or the path of a run's folder."""
    kind, _, tag = name.rpartition("/")
    path = base_dir / FOLDERS.get(kind or "base", kind) / tag
    if not (path / "metrics.jsonl").is_file() and (Path(name) / "metrics.jsonl").is_file():
        path = Path(name)
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        there = sorted(p.parent.name for p in (base_dir / FOLDERS["base"]).glob("*/metrics.jsonl"))
        raise UserError(
            f"no run {name!r} in {path.parent}; base runs there: {', '.join(there) or 'none'}; others are "
            "sft/TAG, or a folder"
        )
    plan = read_json(path / "plan.json") if (path / "plan.json").is_file() else {}
    lines = read_metrics(metrics)
    saved = sorted(path.glob("[0-9]*/meta.json"))
    steps = read_json(saved[-1])["plan"]["num_steps"] if saved else plan.get("num_steps", 0)
    return RunRecord(name, plan.get("user_config", {}), steps, lines)


def write_comparison(base_dir: Path, names: Sequence[str]) -> Path:
    """report/compare.html over these runs; its path. It refreshes itself while one of them is at work."""
    if len(names) < 2:
        raise UserError("--compare takes at least two runs, such as --compare d4 d4.old1")
    if len(names) > len(COLOURS):
        raise UserError(f"--compare takes at most {len(COLOURS)} runs, got {len(names)}")
    runs = [read_run(base_dir, name) for name in names]
    path = base_dir / "report" / "compare.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(render_comparison(runs))
    return path


def outcome_rows(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): what came of each run, and how far it is from the first."""
    first = runs[0].last("val_bpb")
    rows = []
    for run in runs:
        bpb = run.last("val_bpb")
        apart = None if None in (bpb, first) or run is runs[0] else f"{bpb - first:+.4f}"
        rows.append(
            [
                run.name,
                f"{run.last('step') or 0:,} of {run.num_steps:,}",
                format_count(run.last("tokens") or 0),
                format_seconds(run.last("seconds") or 0),
                format_count(run.last("tokens_per_second") or 0),
                None if bpb is None else f"{bpb:.4f}",
                apart,
                None if run.last("core") is None else f"{run.last('core'):.4f}",
            ]
        )
    return ["run", "steps", "tokens", "training time", "tokens/s", "bits per byte", "against the first", "CORE"], rows


def differing_settings(runs: Sequence[RunRecord]) -> list[list[Any]]:
    """The flags in which the runs differ: name, then each run's value."""
    names = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(run.settings.get(key) for run in runs)] for key in names if key not in ("resume", "model_tag")]
    return [row for row in rows if len({str(value) for value in row[1:]}) > 1]


def render_comparison(runs: Sequence[RunRecord]) -> str:
    """The page."""
    page = Template(resources.files("nanochat.reporting").joinpath("report.html").read_text(encoding="utf-8"))
    colours = dict(zip((run.name for run in runs), COLOURS))
    parts = ['<div class="top"><h1>Runs compared</h1></div>', "<h2>Outcome</h2>", legend(colours)]
    parts.append(f'<div class="card scroll">{table(*outcome_rows(runs))}</div>')
    differing = differing_settings(runs)
    if differing:
        shown = table(["flag", *(run.name for run in runs)], differing)
        parts.append(f'<h2>What was set differently</h2><div class="card scroll">{shown}</div>')
    charts = []
    for key, title in CHARTS.items():
        points = {run.name: [(x["step"], x[key]) for x in run.lines if is_number(x.get(key))] for run in runs}
        series = {name: found for name, found in points.items() if len(found) >= 2}
        if series:
            drawn = draw_overlay(title, series, colours, smoothed=key == "loss")
            charts.append(f'<figure class="card"><figcaption>{esc(title)}</figcaption>{drawn}</figure>')
    if charts:
        parts.append(f'<h2>Curves</h2>{legend(colours)}<div class="grid">{"".join(charts)}</div>')
    running = not all(run.done for run in runs)
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if running else ""
    return page.substitute(title="nanochat: runs compared", refresh=refresh, body="\n".join(parts))


def legend(colours: Mapping[str, str]) -> str:
    """Which colour is which run."""
    items = (
        f'<span class="run"><span style="color:{colour}">●</span> {esc(name)}</span>'
        for name, colour in colours.items()
    )
    return f"<p>{''.join(items)}</p>"


def draw_overlay(
    title: str, series: Mapping[str, list[tuple[float, float]]], colours: Mapping[str, str], smoothed: bool
) -> str:
    """All runs' curves in one drawing, inline SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ink = next(drawn for drawn, shown in PAGE_COLOURS.items() if shown == "currentColor")
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        tails: list[float] = []
        for name, points in series.items():
            steps, values = thin(points)
            values = smooth(values) if smoothed else values
            tails += values[len(values) // 10 :]
            axes.plot(
                steps,
                values,
                color=colours[name],
                linewidth=1.6,
                marker="o" if len(values) <= 40 else None,
                markersize=3,
            )
        if smoothed:  # the first plunge would squeeze what follows
            margin = 0.05 * (max(tails) - min(tails) or 1.0)
            axes.set_ylim(min(tails) - margin, max(tails) + margin)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=ink, alpha=0.18, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(out.getvalue(), title)
