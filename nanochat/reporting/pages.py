"""report.html and report.md, from the templates in templates/: self-contained pages, complete without scripts.

Everything that comes from a run, model text above all, is untrusted. The HTML templates escape every value; in
Markdown the filters `markdown` and `fence` do. The page's policy admits its own script and style by their hashes, and
nothing else.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nanochat.common import format_seconds
from nanochat.reporting.charts import AXIS_NAMES, Chart
from nanochat.reporting.curves import Record, curves_of, read_metrics, sparkline, task_words
from nanochat.reporting.samples import sample_groups
from nanochat.reporting.status import Status, status_of
from nanochat.reporting.verdict import Verdict, verdict_of
from nanochat.reporting.view import (
    STAGE_COLUMNS,
    STAGES,
    facts_of,
    format_cell,
    headline,
    numeric_columns,
    short_time,
    skill_groups,
    stage_times,
    stages_of,
)

REFRESH_SECONDS = 15  # of a page that shows a running stage


TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, *, refresh: bool = False, **values: Any) -> str:
    """The named template with these values; `refresh` makes the page reload itself."""
    return _environment().get_template(template).render(refresh=REFRESH_SECONDS if refresh else None, **values)


def hash_source(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def chart_values(charts: Sequence[Chart]) -> dict[str, Any]:
    """The values of the templates' chart parts. Numbers the charts."""
    for number, chart in enumerate(charts):
        chart.number = number
    axes = {axis: name for axis, name in AXIS_NAMES.items() if any(axis in chart.x for chart in charts)}
    return {"axes": axes, "chart_data": {"axes": axes, "charts": [chart.data() for chart in charts]}}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nanochat.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "charts.js"))
    policy = f"default-src 'none'; style-src {hash_source(style)}; script-src {hash_source(script)}; base-uri 'none'"
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": policy}
    environment.filters |= {
        "bar": lambda share: "█" * round(20 * share) + "░" * (20 - round(20 * share)),
        "cell": format_cell,
        "fence": fence,
        "markdown": escape_markdown,
        "numeric_columns": numeric_columns,
        "percent": "{:.1%}".format,
        "sparkline": sparkline,
        "task_words": task_words,
        "width": lambda share: f"{100 * min(1.0, max(0.0, share)):.2f}%",
    }
    return environment


def report_context(report: Record, base_dir: Path) -> dict[str, Any]:
    """The values of report.html.j2 and report.md.j2; an empty one leaves its section out. Curves are in base_dir."""
    stages = stages_of(report)
    machine = {name: value for name, value in (report.get("machine") or {}).items() if value is not None}
    details = []
    for _, title, values in stages:
        tables = []
        for name, lines in (values.get("tables") or {}).items():
            columns = list(dict.fromkeys(column for line in lines for column in line))
            tables.append((name, columns, [[line.get(column) for column in columns] for line in lines]))
        details.append((title, facts_of(values), tables))
    curves = [(title, *stage_charts(key, values, base_dir)) for key, title, values in stages]
    skills = skill_groups(report)
    verdict, statuses = judge(report, base_dir)
    return {
        "refresh": any(status.alive for status in statuses.values()),
        "progress": progress_lines(report, statuses),
        "verdict": verdict,
        "hardware": " · ".join(str(machine[key]) for key in ("gpus", "processor", "commit") if machine.get(key)),
        "headline": headline(report),
        "skills": skills,
        "curves": [(title, charts, minor) for title, charts, minor in curves if charts or minor],
        **chart_values([chart for _, charts, minor in curves for chart in [*charts, *minor]]),
        "samples": sample_groups(report),
        "time_columns": STAGE_COLUMNS,
        "times": stage_times(report, statuses),
        "total_time": format_seconds(report.get("total_seconds") or 0),
        "details": [(title, facts, tables) for title, facts, tables in details if facts or tables],
        "plan": report.get("plan") or [],
        "machine": list(machine.items()),
        "commands": [values["command"] for _, _, values in stages if values.get("command")],
    }


def stage_charts(stage: str, values: Record, base_dir: Path) -> tuple[list[Chart], list[Chart]]:
    """(charts of a stage, those that are folded)."""
    charts = [Chart(curve.key, [curve]) for curve in curves_of(values, base_dir)]
    # The loss of a policy gradient says nothing by its height.
    minor = [chart for chart in charts if chart.metric.minor or (stage == "chat_rl" and chart.key == "loss")]
    return [chart for chart in charts if chart not in minor], minor


def judge(report: Record, base_dir: Path) -> tuple[Verdict, dict[str, Status]]:
    """The verdict on a report whose runs are in base_dir, and the status of each stage that has not finished."""
    runs: dict[str, list[Record]] = {}
    statuses = {}
    for key, _, values in stages_of(report):
        runs[key] = read_metrics(base_dir / values["metrics"]) if values.get("metrics") else []
        if status := status_of(values, runs[key], base_dir):
            statuses[key] = status
    return verdict_of(report, runs, statuses), statuses


def progress_lines(report: Record, statuses: Mapping[str, Status]) -> list[str]:
    """For each stage that is being trained its line on the terminal, and when that was written."""
    return [
        f"{STAGES[key]}: {values.get('progress') or 'running'} (at {short_time(values.get('updated_at'))} UTC)"
        for key, status in statuses.items()
        if status.alive and (values := report[key])
    ]


def escape_markdown(value: Any) -> str:
    """Text for a cell of a Markdown table, on one line and without HTML."""
    text = format_cell(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split())


def fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
