"""Plots of a scaling study, as SVG files. matplotlib is imported when a plot is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import format_count
from nanochat.planning.isoflop import Run, Study
from nanochat.planning.law import Law


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """(figure, its axes side by side), sizes in inches; without pyplot, so nothing is global and no window opens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def plot_isoflops(runs: Sequence[Run], study: Study, path: Path) -> None:
    """Left: loss over model size, one curve per budget. Right: the best size over compute, with errors."""
    from matplotlib import colormaps

    optima = study.optima
    figure, (left, right) = new_figure(11.2, 4.2, columns=2)
    colors = [colormaps["viridis"](x) for x in np.linspace(0.1, 0.85, len(optima))]
    for optimum, color in zip(optima, colors):
        of_budget = sorted((r for r in runs if r.budget == optimum.flops), key=lambda r: r.params)
        n = np.array([r.params for r in of_budget], float)
        left.plot(n, [r.bpb for r in of_budget], "o", color=color, label=f"{optimum.flops:.1e} FLOPs")
        x = np.geomspace(n.min(), n.max(), 100)
        if optimum.curve:
            c0, c1, c2 = optimum.curve
            left.plot(x, c0 + c1 * np.log(x) + c2 * np.log(x) ** 2, color=color, lw=1)
        left.plot(optimum.params, optimum.bpb, "*", color=color, ms=13, mec="black", mew=0.5)
    left.set(
        xscale="log",
        xlabel="parameters N (matrices and head)",
        ylabel="validation bits per byte",
        title="Same compute, different sizes",
    )
    short_ticks(left)
    left.legend(fontsize=8, title="★ the law's best", title_fontsize=8)
    flops = np.array([o.flops for o in optima])
    size = np.array([o.params for o in optima])
    error = np.array([o.params_error for o in optima])
    bars = [size * (1 - np.exp(-error)), size * (np.exp(error) - 1)]
    label = "N ∝ C^({:.2f} ± {:.2f})".format(*study.params_exponent)
    right.errorbar(flops, size, yerr=bars, fmt="*", ms=11, color="tab:blue", capsize=4, label=label)
    if minima := [(o.flops, o.parabola[0]) for o in optima if o.parabola]:
        right.plot(*zip(*minima), "x", color="tab:orange", ms=9, label="minima of the parabolas")
    for o in optima:
        right.annotate(
            f"{o.ratio:.2g} tokens/param", (o.flops, o.params), textcoords="offset points", xytext=(8, -12), fontsize=8
        )
    right.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="best N", title="The best size grows")
    short_ticks(right)
    right.margins(x=0.2, y=0.25)
    right.legend(fontsize=8)
    _save(figure, path)


def plot_series(runs: Sequence[Run], law: Law | None, path: Path) -> None:
    """Loss over compute, one point per depth, with the law's forecasts."""
    figure, (axes,) = new_figure(6.0, 4.2)
    runs = sorted(runs, key=lambda run: run.flops)
    axes.plot([r.flops for r in runs], [r.bpb for r in runs], "o-", color="tab:blue", label="measured")
    if law:
        axes.plot(
            [r.flops for r in runs],
            [law.loss(r.params, r.tokens) for r in runs],
            "x--",
            color="tab:orange",
            label="forecast of the fitted law",
        )
    for run in runs:
        axes.annotate(
            f"d{run.depth}: {format_count(run.params)} x {format_count(run.tokens)} tokens",
            (run.flops, run.bpb),
            textcoords="offset points",
            xytext=(8, 6),
            fontsize=8,
        )
    axes.set(
        xscale="log",
        xlabel="training FLOPs",
        ylabel="validation bits per byte",
        title="One dial: the same ratio of tokens to parameters at every depth",
    )
    axes.margins(x=0.25, y=0.15)
    axes.legend(fontsize=8)
    _save(figure, path)


def short_ticks(axes: Any) -> None:
    """Label logarithmic axes at 1, 2 and 5 of each decade, in short numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, position: short_power(value)))
            axis.set_minor_formatter(NullFormatter())


def short_power(value: float) -> str:
    """`2e13`, or `500k` below a billion."""
    return f"{value:.0e}".replace("e+", "e") if value >= 1e9 else format_count(value)


def _save(figure: Any, path: Path) -> None:
    """Write the figure with a grid, on white so that it is readable on a dark page too."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
