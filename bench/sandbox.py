"""Programs per second in the sandbox, warm and cold, at each available level: `python -m bench.sandbox`.

If HumanEval is available (NANOCHAT_DATASETS_DIR), its 164 reference solutions must pass and empty bodies fail.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import _run
from bench._common import Flags
from bench._run import Result
from nanochat.common import UserError
from nanochat.execution import close_all, execute_code
from nanochat.runtime import Runtime
from nanochat.sandbox.levels import LEVELS, why_unavailable
from scripts import _cli
from tasks.humaneval import HumanEval

PROGRAM = "def double(x):\n    return 2 * x\n\nprint(double(21))\n"
TESTS = "for x in range(10):\n    assert double(x) == x + x\n"


@dataclass
class SandboxFlags(Flags):
    """Duration of each measurement, and the number of HumanEval problems."""

    problems: int = 164
    """Problems of HumanEval; 0: none."""


def measure(flags: SandboxFlags, runtime: Runtime) -> Result:
    values: dict[str, Any] = {}
    rows: list[Sequence[str]] = []
    for level in LEVELS:
        if reason := why_unavailable(level):
            rows.append((level, reason, "", ""))
            continue
        rates = {
            "warm": rate(level, flags.seconds),
            "tested": rate(level, flags.seconds, tested=True),
            "cold": rate(level, flags.seconds, cold=True),
        }
        values |= {f"{level}_{name}_per_second": value for name, value in rates.items()}
        rows.append((level, *(f"{value:.0f}" for value in rates.values())))
    title = "programs per second, one at a time"
    if flags.problems:
        values |= human_eval(flags.problems)
        title += (
            f"; HumanEval: {values['humaneval_references_pass']} of {values['humaneval_problems']} references "
            f"pass, {values['humaneval_stubs_fail']} empty bodies fail, {values['humaneval_seconds']:.1f} s"
            if "humaneval_problems" in values
            else "; HumanEval is not available"
        )
    return Result(title, ("level", "warm", "warm, with tests", "cold"), rows, values)


def rate(level: str, seconds: float, tested: bool = False, cold: bool = False) -> float:
    """Programs per second; at least three are run. `cold`: each in a new sandbox."""
    count, tests, entry_point = 0, TESTS if tested else "", "double" if tested else ""
    execute_code(PROGRAM, level=level)
    began = time.perf_counter()
    while count < 3 or time.perf_counter() - began < seconds:
        if cold:
            close_all()
        result = execute_code(PROGRAM, level=level, tests=tests, entry_point=entry_point)
        assert result.success and result.stdout == "42\n", result
        count += 1
    return count / (time.perf_counter() - began)


def human_eval(problems: int) -> dict[str, Any]:
    """How many reference solutions pass and empty bodies fail; {} without the data set."""
    try:
        task = HumanEval()
    except UserError:
        return {}
    total, began = min(problems, len(task)), time.perf_counter()
    items = [task[i] for i in range(total)]
    passed = sum(task.evaluate(item, item["messages"][1]["content"]) for item in items)
    failed = sum(not task.evaluate(item, "    pass\n") for item in items)
    return {
        "humaneval_problems": total,
        "humaneval_references_pass": passed,
        "humaneval_stubs_fail": failed,
        "humaneval_seconds": time.perf_counter() - began,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("sandbox", SandboxFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
