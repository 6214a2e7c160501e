"""The command line of every script: `parse` flags into a config dataclass, `run` main and exit with its code.

Exit codes: 0 done, 1 failed, 2 a user error (one line, no traceback), 130 interrupted.
"""

import contextlib
import errno
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from nanochat.common import UserError, debug_enabled, first_line, on_terminal, say
from nanochat.distributed.collectives import CollectiveFailed
from nanochat.ranges import check_ranges

Config = TypeVar("Config")
EXPECTED_ERRNOS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG)
LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0  # between lines about progress, on a terminal and elsewhere

MAX_INTEGER = 2**63  # the largest seed; no count comes near it
# PyTorch's messages on a CPU, on a GPU, and for sizes beyond any memory.
OUT_OF_MEMORY = re.compile("allocate memory|out of memory|size calculation overflowed", re.IGNORECASE)


def parse(config: type[Config], argv: Sequence[str] | None = None, description: str | None = None) -> Config:
    """Build `config` from the command line and check its ranges. A leading `--`, as torchrun users type it, is skipped.

    Raises UserError, in one line, for unknown flags and bad values.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--"]:
        args = args[1:]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = tyro.cli(config, args=args, description=description or config.__doc__, prog=program_name())
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(one_line(stderr.getvalue())) from None
    for name, value in vars(parsed).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise UserError(f"--{name.replace('_', '-')} is out of range: {value}")
    check_ranges(parsed)
    return parsed


class ProgressLine:
    """A line about progress, rewritten in place on a terminal and printed now and then elsewhere."""

    def __init__(self, line: Callable[[], str]) -> None:
        self.line, self.live, self.shown_at = line, on_terminal(), time.monotonic()

    def show(self, last: bool = False) -> None:
        """Show the line if it is time to, or the last time."""
        if last or time.monotonic() - self.shown_at > (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self.shown_at = time.monotonic()
            say(f"\r\x1b[K{self.line()}" if self.live else self.line(), end="" if self.live and not last else "\n")


def program_name() -> str:
    """The command as the user typed it: `python -m scripts.base_train`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec and spec.name.startswith("scripts.") else "nanochat"


def one_line(box: str) -> str:
    """The parser's framed, wrapped message without its frame."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │╭╮╰╯─|") for line in box.splitlines()]
    words = " ".join(line for line in lines if line)
    words = re.sub(r"^Value error (Error parsing \w+: )?", "", words)
    words = words.replace("Unrecognized options Unrecognized", "unrecognized")
    words = words.replace("Invalid choice invalid", "invalid")
    return re.sub(r" (Argument helptext:|For full helptext,).*$", "", words).rstrip(".") + "; see --help"


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with the right code. Expected errors become one line; NANOCHAT_DEBUG=1 shows tracebacks."""
    try:
        code = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # the reader of the output left, as `| head` does
        # Nothing may be left to flush at exit, where it would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code, text = describe(error)
        if debug_enabled() or not code:
            raise
        print(f"error: {text}", file=sys.stderr, flush=True)
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.exit(code)


def describe(error: Exception) -> tuple[int, str]:
    """(exit code, line) of an expected error; code 0 for a bug, which deserves its traceback."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OverflowError):
        return 2, f"some number on the command line is too large to calculate with ({error})"
    if isinstance(error, CollectiveFailed | FloatingPointError):  # the latter: a model whose weights are not finite
        return 1, str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return 1, f"not enough memory for these sizes: {first_line(error)}"
    if isinstance(error, OSError) and error.errno in EXPECTED_ERRNOS:
        return 1, str(error)
    return 0, ""
