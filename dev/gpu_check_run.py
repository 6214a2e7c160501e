"""Run one step of the GPU check: a program under a time limit that leaves no process behind."""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, TIMED_OUT, INTERRUPTED = "passed", "failed", "timed out", "interrupted"
SKIPPED, NOT_HERE = "skipped", "not here"  # lack of time, or of an earlier result; does not apply to this machine
TRACEBACK_SECONDS = 5.0  # for a hung program to write where it hangs
EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b|FAILED ")


@dataclass
class Outcome:
    """What became of a step. `figures` are numbers or text by name; `note` says why it did not pass."""

    step: str
    result: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def run_program(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> int | None:
    """Run `command` in the repository, its output in `log`. Returns its exit code, or None if the limit ended it.

    All processes that it started are gone afterwards, also after an exception such as KeyboardInterrupt. A program
    that ran out of time first gets SIGABRT, on which Python writes the stacks of its threads (PYTHONFAULTHANDLER).
    """
    with log.open("wb") as file:
        program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=dict(environment),
            start_new_session=True,  # a process group to kill; Ctrl-C reaches this program only
        )
    try:
        return program.wait(limit)
    except subprocess.TimeoutExpired:
        signal_group(program.pid, signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            program.wait(TRACEBACK_SECONDS)
        return None
    finally:
        signal_group(program.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a broken driver cannot be killed
            program.wait(10)
        kill_orphans()


def signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def adopt_orphans() -> None:
    """On Linux, become the parent of processes whose own parent exits: kill_orphans finds those of other groups."""
    PR_SET_CHILD_SUBREAPER = 36  # from prctl.h
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_orphans() -> None:
    """Kill what is left of a finished step, which adopt_orphans has made children of this process."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    for _ in range(100):  # killing one may hand over its own children
        try:
            pids = [int(pid) for pid in children.read_text().split()]
        except OSError:  # not on this system
            return
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def main_error(text: str) -> str:
    """The line of a log that says best what went wrong: our own error, else the last exception, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    exceptions = [line for line in lines if EXCEPTION.match(line)]
    return [*(lines or ["no output"])[-1:], *exceptions[-1:], *ours[:1]][-1][:200]


def warnings(text: str) -> str:
    """The first two of our own warnings in a log: a fast path that does not work, for example, is only warned of."""
    lines = dict.fromkeys(line for line in text.splitlines() if line.startswith("warning: "))
    return "; ".join(line[:200] for line in [*lines][:2])
