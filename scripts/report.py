"""Draw report.md and report.html again from what the stages recorded, and print a short summary.

python -m scripts.report
python -m scripts.report --compare d4 d4.old1    # two or more runs side by side, in report/compare.html
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import get_base_dir, is_writable, say, visible
from nanochat.report import load_report, render_report, report_dir
from nanochat.reporting.compare import write_comparison
from nanochat.reporting.console import print_table
from nanochat.reporting.pages import judge, progress_lines
from nanochat.reporting.view import (
    STAGE_COLUMNS,
    Record,
    headline,
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
    base_dir = config.base_dir or get_base_dir(to_write=False)
    if config.compare:
        print(write_comparison(base_dir, config.compare))
        return 0
    print_summary(load_report(base_dir), base_dir)
    if is_writable(report_dir(base_dir)):
        print(render_report(base_dir))
    else:
        print(f"{report_dir(base_dir)} is read-only: its pages are as they were drawn last")
    return 0


def print_summary(report: Record, base_dir: Path) -> None:
    """Verdict, headline, time by stage and skills with their intervals."""
    verdict, statuses = judge(report, base_dir)
    for line in [*progress_lines(report, statuses), *verdict.lines()]:
        say(visible(line))
    if found := headline(report):
        say(" · ".join(f"{label} {text}" for label, text in found))
    print_table("", stage_times(report, statuses), STAGE_COLUMNS)
    for _, title, values in stages_of(report):
        rows = [
            (
                s.name,
                f"{s.accuracy:.1%}",
                f"{s.low:.1%} – {s.high:.1%}",
                "" if s.baseline is None else f"{s.baseline:.1%}",
                f"{s.passed}/{s.total}",
            )
            for s in skills_of(values)
        ]
        if rows:
            print_table("", rows, (title, "accuracy", "95% interval", "guessing", "right"))


if __name__ == "__main__":
    run(main)
