"""Training curves as PNG files, for a model card."""

from pathlib import Path
from typing import Any

from nanochat.formats.history import Stage
from nanochat.planning.study_plots import new_figure
from nanochat.reporting.curves import Curve, metric_of

PANEL_WIDTH, HEIGHT, DPI = 3.6, 2.7, 120  # inches and dots per inch


def draw_curves(stages: list[Stage], folder: Path) -> list[tuple[str, str]]:
    """Write curves-base.png and so on, one for each stage with metrics; returns (file, what it shows) of each."""
    drawn = []
    for number, stage in enumerate(stages):
        panels = panels_of(stage.curves())
        if not panels:
            continue
        repeated = [other.name for other in stages[:number]].count(stage.name)
        name = f"curves-{stage.name}{repeated + 1 if repeated else ''}.png"
        plot_panels(panels, folder / name)
        shown = (f"{curve.title} {curve.values[0]:.3g} to {curve.last:.3g}" for curves in panels for curve in curves)
        drawn.append((name, f"{stage.title}: {', '.join(shown)}"))
    return drawn


def panels_of(curves: list[Curve]) -> list[list[Curve]]:
    """The curves of each panel: accuracies share one."""
    accuracies = [curve for curve in curves if curve.key.startswith("accuracy/")]
    others = [[curve] for curve in curves if curve not in accuracies]
    return [accuracies, *others] if accuracies else others


def plot_panels(panels: list[list[Curve]], path: Path) -> None:
    """Draw the panels side by side."""
    figure, all_axes = new_figure(PANEL_WIDTH * len(panels), HEIGHT, len(panels))
    for axes, curves in zip(all_axes, panels):
        for number, curve in enumerate(curves):
            plot_curve(axes, curve, f"C{number}")
        metric = metric_of(curves[0].key)
        axes.set(xlabel="step", ylabel=metric.unit, title=curves[0].title if len(curves) == 1 else "Held-out tasks")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        if metric.range == "share":
            from matplotlib.ticker import PercentFormatter

            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if len(curves) > 1:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})


def plot_curve(axes: Any, curve: Curve, color: str) -> None:
    """One curve: pale behind its moving average, or with dots where there are few points."""
    if curve.smooth:
        axes.plot(curve.steps, curve.values, color=color, alpha=0.25, lw=0.8)
    marker = "o" if len(curve.values) <= 20 else ""
    axes.plot(curve.steps, curve.smooth or curve.values, marker=marker, ms=3, color=color, lw=1.4, label=curve.title)
