"""The first hour on a GPU: run every stage at toy size, the GPU's tests and the benchmarks; print a table of figures.

    bash dev/gpu_check.sh                                     # everything
    bash dev/gpu_check.sh --minutes=9                         # what fits in 9 minutes, the most useful first
    bash dev/gpu_check.sh --minutes=9 --only=speed,memory     # some groups or steps, with the steps that these need

The steps (dev/gpu_check_steps.py) run one after another, each in a process of its own with a time limit, whatever
became of the others. A step that needs the result of another one is left out where that failed. Needs no network and
installs nothing. Without a GPU the same steps run at sizes that suit a CPU.

DIR (--out) keeps STEP.log of every step, profiles, table.md (for dev/GPU.md) and table.json. The table contains earlier
results of the same DIR, so a check can be done in pieces: --only=start,tests,chain, then --only=speed, and so on.
Where only some of it can be kept, leave DIR/base out: it holds the toy models, gigabytes on a GPU.
Exit code 0 if every step that applies to this machine has passed, 1 if not, 130 after Ctrl-C; the table comes anyhow.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dev.gpu_check_run import (
    FAILED,
    INTERRUPTED,
    NOT_HERE,
    PASSED,
    ROOT,
    SKIPPED,
    TIMED_OUT,
    Outcome,
    adopt_orphans,
    main_error,
    run_program,
    warnings,
)
from dev.gpu_check_steps import FIRST, Step, figure, make_steps

Steps = Callable[[dict[str, Any], Path], list[Step]]


class Check:
    """The steps of this machine and their outcomes, which are written to the folder `out` after every step."""

    def __init__(self, out: Path, make: Steps, minutes: float = float("inf")) -> None:
        self.out, self.make = out, make
        self.until = time.monotonic() + 60 * minutes
        self.outcomes: dict[str, Outcome] = {}
        self.interrupted = False
        out.mkdir(parents=True, exist_ok=True)
        if (out / "table.json").exists():
            rows = json.loads((out / "table.json").read_text(encoding="utf-8"))
            self.outcomes = {row["step"]: Outcome(**row) for row in rows}
        self.gone = set[str]()  # steps that passed, but whose results were not kept
        self.gone_file = out / "base" / "gone.json"  # for the next pieces
        if self.gone_file.exists():
            self.gone = set(json.loads(self.gone_file.read_text(encoding="utf-8")))
        elif not self.gone_file.parent.exists():
            self.gone = {needed for step in self.steps.values() for needed in step.needs}
            self.gone_file.parent.mkdir()
            self.write_gone()

    @property
    def machine(self) -> dict[str, Any]:
        """What the first step has found; sizes depend on it."""
        return self.outcomes[FIRST].figures if FIRST in self.outcomes else {}

    @property
    def steps(self) -> dict[str, Step]:
        return {step.name: step for step in self.make(self.machine, self.out)}

    def run(self, chosen: Sequence[str]) -> None:
        """Run the chosen steps but the first one, up to Ctrl-C."""
        names = [name for name in self.choose(chosen) if name != FIRST]
        for number, name in enumerate(names, 2):
            if self.interrupted:
                break
            print(f"[{number}/{len(names) + 1}] {name} ...", flush=True)
            self.attempt(self.steps[name])

    def choose(self, chosen: Iterable[str]) -> list[str]:
        """The steps of these names and groups (none: all), in order, with those that they need and that lack."""
        steps = self.steps
        wanted = {name for name, step in steps.items() if not chosen or {name, step.group} & set(chosen)}
        for name in reversed(steps):  # a step needs earlier ones only
            if name in wanted:
                wanted |= {needed for needed in steps[name].needs if not self.has_passed(needed)}
        return [name for name in steps if name in wanted]

    def has_passed(self, name: str) -> bool:
        return name not in self.gone and name in self.outcomes and self.outcomes[name].result == PASSED

    def attempt(self, step: Step) -> None:
        """Run a step unless something is in its way; keep and print its outcome."""
        left = self.until - time.monotonic()
        if step.not_here:
            outcome = Outcome(step.name, NOT_HERE, note=step.not_here)
        elif lacking := [name for name in step.needs if not self.has_passed(name)]:
            outcome = Outcome(step.name, SKIPPED, note=f"needs {', '.join(lacking)}")
        elif left < step.seconds and step.name != FIRST:
            outcome = Outcome(step.name, SKIPPED, note=f"takes about {step.seconds:.0f} s, {max(left, 0):.0f} s left")
        else:
            outcome = self.run_step(step, min(step.limit, left))
        earlier = self.outcomes.get(step.name)
        if not (outcome.result == SKIPPED and earlier and earlier.result == PASSED):  # an earlier piece's result stays
            self.outcomes[step.name] = outcome
            self.gone.discard(step.name)
        self.write()
        print("  " + describe(outcome), flush=True)

    def run_step(self, step: Step, limit: float) -> Outcome:
        log, started, code, figures = self.out / f"{step.name}.log", time.monotonic(), None, dict[str, Any]()
        environment = {
            **os.environ,
            "NANOCHAT_BASE_DIR": str(self.out / "base"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",  # a program that is killed leaves what it had printed
            "PYTHONFAULTHANDLER": "1",
            "HF_HUB_OFFLINE": "1",
            **step.environment,
        }
        try:
            code = run_program([sys.executable, *step.command], log, limit, environment)
            result = TIMED_OUT if code is None else PASSED if code == 0 else FAILED
        except KeyboardInterrupt:
            result, self.interrupted = INTERRUPTED, True
        seconds, text = time.monotonic() - started, log.read_text(encoding="utf-8", errors="replace")
        note = warnings(text) if result == PASSED else f"{main_error(text)} ({log.name})"
        try:
            figures = step.figures(text)
        except Exception as error:
            if result == PASSED:
                result, note = FAILED, f"no figures in {log.name}: {error!r}"
        if result != PASSED:
            print("".join(f"  | {line}\n" for line in text.splitlines()[-15:]), end="")
            note = f"after {limit:.0f} s: {note}" if result == TIMED_OUT else note
        return Outcome(step.name, result, seconds, figures, note)

    def write_gone(self) -> None:
        self.gone_file.write_text(json.dumps(sorted(self.gone)), encoding="utf-8")

    def write(self) -> None:
        """table.json and table.md."""
        self.write_gone()
        outcomes = [self.outcomes[name] for name in self.steps if name in self.outcomes]
        (self.out / "table.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
        machine = "; ".join(f"{key} {value}" for key, value in self.machine.items() if isinstance(value, str))
        rows = [f"| {o.step} | {o.result} | {o.seconds:.0f} | {figures_and_note(o)} |" for o in outcomes]
        head = [f"Checked on {time.strftime('%Y-%m-%d')}: {machine}", "", "| step | result | s | figures |"]
        (self.out / "table.md").write_text("\n".join([*head, "|---|---|---|---|", *rows]) + "\n", encoding="utf-8")

    def show(self) -> bool:
        """Print the table. True if all steps in it that apply to this machine have passed."""
        print("\n" + (self.out / "table.md").read_text(encoding="utf-8"))
        results = [outcome.result for outcome in self.outcomes.values()]
        counts = {result: results.count(result) for result in dict.fromkeys(results)}
        print(", ".join(f"{count} {result}" for result, count in counts.items()) + f"; logs in {self.out}")
        return counts.keys() <= {PASSED, NOT_HERE}


def figures_and_note(outcome: Outcome) -> str:
    texts = [figure(name, value) for name, value in outcome.figures.items() if value is not None]
    return "; ".join([*texts, *([outcome.note] if outcome.note else [])]).replace("|", "\\|")


def describe(outcome: Outcome) -> str:
    return f"{outcome.step}: {outcome.result}, {outcome.seconds:.0f} s. {figures_and_note(outcome)}"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, make: Steps = make_steps) -> int:
    parser = argparse.ArgumentParser(
        prog="bash dev/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="steps and groups, separated by commas; default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no step that would end later")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: gpu_check in NANOCHAT_BASE_DIR")
    parser.add_argument("--list", action="store_true", help="name the steps and groups of this machine, and exit")
    args = parser.parse_args(argv)
    home = os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat"
    check = Check((args.out or Path(home) / "gpu_check").resolve(), make, args.minutes)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    check.attempt(check.steps[FIRST])  # always: which other steps there are depends on the machine
    known, chosen = check.steps, [name for name in args.only.split(",") if name]
    if unknown := set(chosen) - {*known, *(step.group for step in known.values())}:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; --list names all")
    if args.list:
        for step in known.values():
            print(f"{step.group:8} {step.name:16} {step.seconds:4.0f} s  {step.not_here or shlex.join(step.command)}")
        return 0
    check.run(chosen)
    passed = check.show()
    return 130 if check.interrupted else 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
