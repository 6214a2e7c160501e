"""Draw report.md and report.html again from what the stages recorded, and print a short summary.

python -m scripts.report
python -m scripts.report --compare d4 d4.old1    # two or more runs side by side, in report/compare.html
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.common import get_base_dir
from nanochat.report import load_report, render_report
from nanochat.reporting.compare import write_comparison
from nanochat.reporting.view import (
    STAGE_COLUMNS,
    Record,
    headline,
    mixed_runs,
    skills_of,
    stage_times,
    stages_of,
)
from scripts._cli import parse, run


@dataclass
class ReportConfig:
    """Draw the report of the base folder ($NANOCHAT_BASE_DIR) again and print a summary."""

    base_dir: Path | None = None
    """Another base folder than $NANOCHAT_BASE_DIR."""
    compare: list[str] = field(default_factory=list)
    """Runs to put side by side instead: tags of base runs, sft/TAG, rl/TAG, or folders."""


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(ReportConfig, argv)
    base_dir = config.base_dir or get_base_dir()
    if config.compare:
        print(write_comparison(base_dir, config.compare))
        return 0
    page = render_report(base_dir)
    print_summary(load_report(base_dir), Console())
    print(page)
    return 0


def print_summary(report: Record, console: Console) -> None:
    """Headline, time by stage and skills with their intervals."""
    if headline(report):
        console.print(" · ".join(f"{label} [bold]{escape(text)}[/bold]" for label, text in headline(report)))
    for note in mixed_runs(report):
        console.print(escape(note))
    times = Table(*STAGE_COLUMNS, box=None, header_style="dim")
    for row in stage_times(report):
        times.add_row(*map(escape, row))
    console.print(times)
    for _, title, values in stages_of(report):
        if not (skills := skills_of(values)):
            continue
        table = Table(escape(title), "accuracy", "95% interval", "guessing", "right", box=None, header_style="dim")
        for s in skills:
            guessing = "" if s.baseline is None else f"{s.baseline:.1%}"
            table.add_row(
                escape(s.name), f"{s.accuracy:.1%}", f"{s.low:.1%} – {s.high:.1%}", guessing, f"{s.passed}/{s.total}"
            )
        console.print(table)


if __name__ == "__main__":
    run(main)
