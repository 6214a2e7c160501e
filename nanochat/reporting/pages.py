"""report.html and report.md, from the templates in templates/: self-contained pages without scripts or outside files.

Everything that comes from a run, model text above all, is untrusted. The HTML templates escape every value; in
Markdown the filters `markdown` and `fence` do.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nanochat.common import format_seconds
from nanochat.reporting.charts import Line, draw_chart, limits_around
from nanochat.reporting.curves import Curve, Record, curves_of, sparkline
from nanochat.reporting.view import (
    STAGE_COLUMNS,
    facts_of,
    format_cell,
    headline,
    mixed_runs,
    numeric_columns,
    running_stages,
    samples_by_stage,
    skills_of,
    stage_times,
    stages_of,
)

REFRESH_SECONDS = 15  # of a page that shows a running stage


def render(template: str, *, refresh: bool, **values: Any) -> str:
    """The named template with these values; `refresh` makes the page reload itself."""
    return _environment().get_template(template).render(refresh=REFRESH_SECONDS if refresh else None, **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nanochat.reporting"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bar": lambda share: "█" * round(20 * share) + "░" * (20 - round(20 * share)),
        "cell": format_cell,
        "chart": draw_curve,
        "fence": fence,
        "markdown": escape_markdown,
        "numeric_columns": numeric_columns,
        "percent": "{:.1%}".format,
        "sparkline": sparkline,
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
    skills = [(title, skills_of(values)) for _, title, values in stages]
    curves = [(title, curves_of(values, base_dir)) for _, title, values in stages]
    running = running_stages(report)
    return {
        "refresh": bool(running),
        "running": running,
        "hardware": " · ".join(str(machine[key]) for key in ("gpus", "processor", "commit") if machine.get(key)),
        "headline": headline(report),
        "notes": mixed_runs(report),
        "skills": [(title, found) for title, found in skills if found],
        "curves": [(title, found) for title, found in curves if found],
        "samples": samples_by_stage(report),
        "time_columns": STAGE_COLUMNS,
        "times": stage_times(report),
        "total_time": format_seconds(report.get("total_seconds") or 0),
        "details": [(title, facts, tables) for title, facts, tables in details if facts or tables],
        "plan": report.get("plan") or [],
        "machine": list(machine.items()),
        "commands": [values["command"] for _, _, values in stages if values.get("command")],
    }


def draw_curve(curve: Curve) -> Markup:
    """The curve as an inline SVG; a noisy one pale behind its average."""
    if curve.smooth:
        pale = Line(curve.steps, curve.values, width=0.9, alpha=0.35, markers=False)
        lines = [pale, Line(curve.steps, curve.smooth, markers=False)]
    else:
        lines = [Line(curve.steps, curve.values)]
    limits: tuple[float, float] | None = None
    if min(curve.values) >= 0 and not curve.smooth and curve.key != "val_bpb":
        limits = 0, max(curve.values) * 1.08 or 1
    elif len(curve.values) >= 50:  # without the steep start, which would flatten the rest
        limits = limits_around(curve.values[len(curve.values) // 50 :])
    return draw_chart(curve.title, lines, limits)


def escape_markdown(value: Any) -> str:
    """Text for a cell of a Markdown table, on one line and without HTML."""
    text = format_cell(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(text.split())


def fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text}\n{ticks}"
