"""The command line of every script: `parse` flags into a config dataclass, `run` main and exit with its code.

Exit codes: 0 done, 1 failed, 2 a user error (one line, no traceback), 130 interrupted.
"""

import contextlib
import difflib
import errno
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

import tyro

from nanochat.common import UserError, debug_enabled, first_line, is_out_of_memory, visible
from nanochat.common.output import failsafe_output
from nanochat.common.ranges import check_ranges
from nanochat.distributed.collectives import CollectiveFailed

Config = TypeVar("Config")
EXPECTED_ERRNOS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG)

MAX_INTEGER = 2**63  # the largest seed; no count comes near it
NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclass
class ModelConfig:
    """Flags of the scripts that load a model."""

    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Step of its checkpoint; -1 takes the last."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""


def parse(config: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Build `config` from the command line and check its ranges. A leading `--`, as torchrun users type it, is skipped.

    Raises UserError, in one line, for unknown flags and bad values.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--"]:
        args = args[1:]
    args = join_repeated(args, "--data")
    if "--data=" in args:  # the default instead would learn from other text
        raise UserError("--data= is empty: is a shell variable unset? Leave the flag out for the default; see --help")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = tyro.cli(config, args=args, description=config.__doc__, prog=program_name())
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{unknown_flag(config, args) or one_line(stderr.getvalue())}; see --help") from None
    for name, value in vars(parsed).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise UserError(f"--{name.replace('_', '-')} is out of range: {value}")
    check_ranges(parsed)
    return parsed


def program_name() -> str:
    """The command as the user typed it: `python -m scripts.base_train`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec and spec.name.startswith("scripts.") and spec.name != "scripts.stages":
        return f"python -m {spec.name}"
    return " ".join(["nanochat", *sys.argv[1:2]])


def join_repeated(args: list[str], flag: str) -> list[str]:
    """The arguments with all values of a flag in one, separated by commas.

    The flag may be repeated, where the parser would keep the last, or have several values, as the shell makes of
    `--data *.txt`.
    """
    values, others = [], list[str]()
    follows = False  # the flag itself came before, without a value or with one
    for arg in args:
        follows = arg == flag or (follows and not arg.startswith("-"))
        if arg.startswith(f"{flag}="):
            values.append(arg.removeprefix(f"{flag}="))
        elif follows and arg != flag:
            values.append(arg)
        elif not follows:
            others.append(arg)
    return [f"{flag}={','.join(values)}", *others] if len(values) > 1 else args


def unknown_flag(config: type[Any], args: Sequence[str]) -> str:
    """What is wrong with the first flag that `config` does not have, or that takes no value; "" if there is none."""
    names = ["help", *(f.name.replace("_", "-") for f in fields(config))]
    switches = [f.name.replace("_", "-") for f in fields(config) if isinstance(f.default, bool)]
    names += [f"no-{name}" for name in switches]
    for arg in args:
        name, equals, _ = arg.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if equals and name in switches:
            return f"--{name} takes no value: give --{name} or --no-{name}"
        if arg.startswith("--") and name not in names:
            close = difflib.get_close_matches(name, names, 1, 0.7) or [n for n in names if n.startswith(name)][:1]
            return f"there is no flag --{name}" + (f"; did you mean --{close[0]}?" if close else "")
    return ""


# The parser's messages, and ours.
MESSAGES = (
    (
        r".*Error parsing \S*?(--[\w-]+): invalid literal for int\(\) with base 10: ('.*?')$",
        r"\1 takes a whole number, got \2",
    ),
    (r".*Error parsing \S*?(--[\w-]+): could not convert string to float: ('.*?')$", r"\1 takes a number, got \2"),
    (r".*Missing value for argument '\S*?(--[\w-]+)'.*", r"\1 needs a value (with a leading dash: \1=-...)"),
    (r".*[Ii]nvalid choice '(.*?)' for argument '\S*?(--[\w-]+)'\. Expected one of \((.*)\)", r"\2 takes \3, got '\1'"),
    (r".*Unrecognized options:", "unrecognized:"),
    (r".*Required options:? Missing from [^:]*: ([A-Z]+) .*", r"\1 is missing"),
    (r"^Value error (Error parsing \w+: )?", ""),
)


def one_line(box: str) -> str:
    """The parser's framed, wrapped message without its frame, in plain words."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │╭╮╰╯─|") for line in box.splitlines()]
    words = " ".join(line for line in lines if line.strip("-+"))  # the frame is of these where there is no UTF-8
    words = re.sub(r" (Argument helptext:|For full helptext,|Perhaps you meant:).*$", "", words).rstrip(".")
    for theirs, ours in MESSAGES:
        words = re.sub(theirs, ours, words)
    return words


def run(main: Callable[[], int | None], memory_flags: str = "") -> None:
    """Call `main` and exit with the right code. Expected errors become one line; NANOCHAT_DEBUG=1 shows tracebacks.

    `memory_flags` names the script's flags to lower where memory is too small.
    A reader of the output that leaves, as `| head` does, ends the output and not the work.
    """
    with failsafe_output():
        try:
            code = main() or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            code = 130
        except Exception as error:
            code, text = describe(error, memory_flags)
            if debug_enabled() or not code:
                raise
            print(f"error: {visible(text)}", file=sys.stderr, flush=True)
    sys.exit(code)


def describe(error: Exception, memory_flags: str = "") -> tuple[int, str]:
    """(exit code, line) of an expected error; code 0 for a bug, which deserves its traceback."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, RuntimeError) and (named := NOT_DETERMINISTIC.search(str(error))):
        return 2, f"--deterministic: PyTorch has no deterministic form of {named[1]} on this device; leave the flag out"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return 2, "a path begins with ~ and there is no such home folder; write it out"
    if isinstance(error, OverflowError):
        return 2, f"some number on the command line is too large to calculate with ({error})"
    if isinstance(error, CollectiveFailed | FloatingPointError):  # the latter: a model whose weights are not finite
        return 1, str(error)
    if is_out_of_memory(error):
        lower = f"; lower {memory_flags}" if memory_flags else ""
        return 1, f"not enough memory for these sizes: {first_line(error)}{lower}"
    if isinstance(error, OSError) and error.errno in EXPECTED_ERRNOS:
        return 1, str(error)
    return 0, ""
