"""Line charts over steps as inline SVG, for the report and for compared runs.

One SVG serves the light and the dark page: it is drawn in placeholder colours, which are then replaced by the CSS
colours of the page. matplotlib is imported when a chart is drawn.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from nanochat.common import format_count

INK, SERIES = "#010203", "#010204"  # placeholders
PAGE_COLOURS = {INK: "currentColor", SERIES: "var(--series)"}
MAX_MARKERS = 40  # points of a curve that still get a marker each


@dataclass
class Line:
    """One curve of a chart. `colour` is a hex colour, or a placeholder."""

    steps: Sequence[float]
    values: Sequence[float]
    colour: str = SERIES
    width: float = 1.7
    alpha: float = 1.0
    markers: bool = True  # on curves of few points


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """(figure, its axes side by side), sizes in inches; without pyplot, so nothing is global and no window opens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def draw_chart(title: str, lines: Sequence[Line], limits: tuple[float, float] | None = None) -> Markup:
    """The lines over their steps as an inline SVG: real text, transparent background, a label for screen readers.

    `limits` of the value axis; None: what the lines need.
    """
    import matplotlib
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style):
        figure, (axes,) = new_figure(4.6, 2.7)
        for line in lines:
            marker = "o" if line.markers and len(line.values) <= MAX_MARKERS else None
            look: Any = {"color": line.colour, "linewidth": line.width, "alpha": line.alpha}
            axes.plot(line.steps, line.values, marker=marker, markersize=3, **look)
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=INK, alpha=0.18, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(short_number))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(out.getvalue(), title)


def limits_around(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with a margin of 5%."""
    margin = 0.05 * (max(values) - min(values) or 1.0)
    return min(values) - margin, max(values) + margin


def short_number(value: float, position: int = 0) -> str:
    """`12000` -> `12k`. `position` is matplotlib's, unused."""
    return format_count(value) if abs(value) >= 1000 else f"{value:.6g}"


def inline_svg(svg: str, title: str) -> Markup:
    """matplotlib's SVG file as an element of a page: no prologue or metadata, no fixed size, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's own typeface
    for drawn, shown in PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip())
