"""The report as one self-contained page: no scripts, no outside files, light, dark, phone and paper.

Everything that comes from a run, model text above all, passes through `esc` on its way into the page.
"""

import html
import io
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from nanochat.common import format_count, format_seconds
from nanochat.reporting.view import (
    STAGE_COLUMNS,
    Curve,
    Record,
    Skill,
    before_and_after,
    curves_of,
    facts_of,
    format_cell,
    headline,
    is_running,
    mixed_runs,
    skills_of,
    stage_times,
    stages_of,
)

REFRESH_SECONDS = 15  # while a stage is at work
FOOTER = "Drawn from report.json beside this page. To draw it again: python -m scripts.report"


def render_html(report: Record, base_dir: Path) -> str:
    """The whole page."""
    page = Template(resources.files("nanochat.reporting").joinpath("report.html").read_text(encoding="utf-8"))
    sections = [
        header(report),
        skills_section(report),
        curves_section(report, base_dir),
        samples_section(report),
        stages_section(report),
        setting_section(report),
        commands_section(report),
        f'<footer class="quiet">{FOOTER}</footer>',
    ]
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if is_running(report) else ""
    return page.substitute(title="nanochat report", refresh=refresh, body="\n".join(s for s in sections if s))


def esc(value: Any) -> str:
    """Text for the page: numbers short, everything escaped, safe in attributes too."""
    return html.escape(format_cell(value), quote=True)


def card(title: str, inside: str) -> str:
    """A titled box; `inside` is markup already."""
    return f'<div class="card"><h3>{esc(title)}</h3>{inside}</div>'


def header(report: Record) -> str:
    machine = report.get("machine") or {}
    where = " · ".join(str(machine[key]) for key in ("gpus", "processor", "commit") if machine.get(key))
    running = [title for _, title, values in stages_of(report) if values.get("status") == "running"]
    live = f'<p class="live">{esc(running[0])} is under way</p>' if running else ""
    numbers = [f"<b>{esc(text)}</b><span>{esc(label)}</span>" for label, text in headline(report)]
    cards = "".join(f'<div class="card">{number}</div>' for number in numbers)
    top = f'<div class="top"><h1>nanochat report</h1><p class="quiet">{esc(where)}</p>{live}</div>'
    notes = "".join(f'<p class="quiet">{esc(note)}</p>' for note in mixed_runs(report))
    return top + (f'<div class="cards">{cards}</div>' if cards else "") + notes


# ---------------------------------------------------------------------------------------------------
# Skills


def skills_section(report: Record) -> str:
    groups = [(title, skills_of(values)) for _, title, values in stages_of(report)]
    groups = [(title, skills) for title, skills in groups if skills]
    if not groups:
        return ""
    cards = "".join(card(title, "".join(map(skill_row, skills))) for title, skills in groups)
    note = "Share answered right; the whisker is the 95% Wilson interval"
    if any(s.baseline is not None for _, skills in groups for s in skills):
        note += ", the dashed line is guessing, or always giving the same answer"
    if others := sorted({s.reference[0] for _, skills in groups for s in skills if s.reference}):
        note += f", the diamond is {esc(' or '.join(others))} as published"
    return f'<h2>Skills</h2><p class="quiet">{note}.</p>{cards}'


def skill_row(s: Skill) -> str:
    """One bar with its whisker, and its numbers in words."""
    guess = "" if s.baseline is None else f'<s style="left:{percent(s.baseline)}"></s>'
    other = "" if s.reference is None else f'<b style="left:{percent(s.reference[1])}"></b>'
    bar = (
        f'<div class="bar" role="img" aria-label="{s.accuracy:.1%}"><i style="width:{percent(s.accuracy)}"></i>'
        f'<u style="left:{percent(s.low)};width:{percent(s.high - s.low)}"></u>{guess}{other}</div>'
    )
    words = f"{s.low:.1%} – {s.high:.1%}" + (f" · {s.passed:,} of {s.total:,}" if s.total else "")
    return (
        f'<div class="skill"><div class="name">{esc(s.name)}</div>{bar}'
        f'<div class="value">{s.accuracy:.1%}</div><div class="range">{words}</div></div>'
    )


def percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


# ---------------------------------------------------------------------------------------------------
# Curves


def curves_section(report: Record, base_dir: Path) -> str:
    parts = []
    for _, title, values in stages_of(report):
        curves = curves_of(values, base_dir)
        if curves:
            figures = "".join(f'<figure class="card">{caption(c)}{draw_curve(c)}</figure>' for c in curves)
            parts.append(f'<h3 class="loose">{esc(title)}</h3><div class="grid">{figures}</div>')
    return f"<h2>Curves</h2>{''.join(parts)}" if parts else ""


def caption(curve: Curve) -> str:
    last = curve.smooth[-1] if curve.smooth else curve.values[-1]
    text = format_count(last) if abs(last) >= 1000 else f"{last:.4g}"
    return f"<figcaption>{esc(curve.title)}<span>{text} at step {curve.steps[-1]:,.0f}</span></figcaption>"


# Drawn in these colours, which then become the page's own, so that one drawing serves light and dark.
INK, SERIES, SECOND = "#010203", "#010204", "#010205"
PAGE_COLOURS = {INK: "currentColor", SERIES: "var(--series)", SECOND: "var(--second)"}


def draw_curve(curve: Curve) -> str:
    """The curve as an inline SVG with real text and a transparent ground."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure  # without pyplot: no global figure, no window system
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if curve.smooth:
            axes.plot(curve.steps, curve.values, color=SERIES, linewidth=0.9, alpha=0.35)
            axes.plot(curve.steps, curve.smooth, color=SERIES, linewidth=1.7)
        else:
            dots = "o" if len(curve.values) <= 40 else None
            axes.plot(curve.steps, curve.values, color=SERIES, linewidth=1.7, marker=dots, markersize=3)
        frame_values(axes, curve)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=INK, alpha=0.18, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(out.getvalue(), curve.title)


def frame_values(axes: Any, curve: Curve) -> None:
    """Rates start at zero; a loss is framed by what follows its first plunge, so that the long tail can be read."""
    if min(curve.values) >= 0 and not curve.smooth and curve.title != "Validation bits per byte":
        axes.set_ylim(0, max(curve.values) * 1.08 or 1)
    elif len(curve.values) >= 50:
        later = curve.values[len(curve.values) // 50 :]
        margin = 0.05 * (max(later) - min(later) or 1.0)
        axes.set_ylim(min(later) - margin, max(later) + margin)


def short_number(value: float, position: int = 0) -> str:
    """`12000` -> `12k`."""
    return format_count(value) if abs(value) >= 1000 else f"{value:.6g}"


def inline_svg(svg: str, title: str) -> str:
    """matplotlib's file as part of a page: no prologue, no metadata, the page's colours, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's own typeface
    for drawn, shown in PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg.replace("<svg", f'<svg role="img" aria-label="{esc(title)}"', 1).strip()


# ---------------------------------------------------------------------------------------------------
# Text and tables


def samples_section(report: Record) -> str:
    cards = []
    for heading, samples in before_and_after(report):
        said = [f'<p class="prompt">{esc(s.get("prompt"))}</p><p>{esc(s.get("text"))}</p>' for s in samples]
        cards.append(card(heading, "".join(f'<div class="say">{pair}</div>' for pair in said)))
    return f'<h2>In its own words</h2><div class="grid">{"".join(cards)}</div>' if cards else ""


def stages_section(report: Record) -> str:
    found = stages_of(report)
    if not found:
        return ""
    total = format_seconds(report.get("total_seconds") or 0)
    foot = f'<tfoot><tr><td>Total</td><td></td><td class="num">{total}</td><td></td></tr></tfoot>'
    times = f'<div class="card scroll">{table(STAGE_COLUMNS, stage_times(report), foot)}</div>'
    cards = []
    for _, title, values in found:
        facts = facts_of(values)
        inside = facts_table(facts) if facts else ""
        for name, lines in (values.get("tables") or {}).items():
            columns = list(dict.fromkeys(column for line in lines for column in line))
            drawn = table(columns, [[line.get(c) for c in columns] for line in lines])
            inside += f'<h3 class="loose">{esc(name)}</h3><div class="scroll">{drawn}</div>'
        if inside:
            cards.append(card(title, inside))
    return f'<h2>Stages</h2>{times}<p></p><div class="grid">{"".join(cards)}</div>'


def setting_section(report: Record) -> str:
    """Plan and machine, side by side."""
    plan = [(str(name), str(value)) for name, value in report.get("plan") or []]
    machine = [(name, str(value)) for name, value in (report.get("machine") or {}).items() if value is not None]
    cards = "".join(card(title, facts_table(rows)) for title, rows in (("Plan", plan), ("Machine", machine)) if rows)
    return f'<h2>Plan and machine</h2><div class="grid">{cards}</div>' if cards else ""


def commands_section(report: Record) -> str:
    commands = [values["command"] for _, _, values in stages_of(report) if values.get("command")]
    return f"<h2>Commands</h2><pre>{esc(chr(10).join(commands))}</pre>" if commands else ""


def facts_table(rows: list[tuple[str, str]]) -> str:
    lines = "".join(f'<tr><th scope="row">{esc(name)}</th><td>{esc(value)}</td></tr>' for name, value in rows)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def table(columns: Any, rows: Any, foot: str = "") -> str:
    """A table whose columns of numbers (all but the first that start with a digit) stand right."""

    def is_numeric(column: int) -> bool:
        return column > 0 and all(row[column] is None or re.match(r"[-+.]?\d", str(row[column])) for row in rows)

    numeric = [is_numeric(i) for i in range(len(columns))]

    def cells(tag: str, line: Any) -> str:
        return "".join(f"<{tag}{' class=num' if right else ''}>{esc(c)}</{tag}>" for c, right in zip(line, numeric))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody>{foot}</table>"
