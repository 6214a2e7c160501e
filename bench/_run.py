"""Run a benchmark once, or alternately with another revision of the code (--against), and print its result."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from bench._common import Flags, circumstances
from nanochat.common import UserError, say, warn
from nanochat.reporting.console import print_table
from nanochat.runtime import Runtime
from nanochat.train.commands import flag_words
from scripts import _cli

ROOT = Path(__file__).resolve().parent.parent  # the working tree

AnyFlags = TypeVar("AnyFlags", bound=Flags)


@dataclass
class Result:
    """A table to read, and its numbers as JSON."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    values: dict[str, Any]

    def show(self) -> None:
        """Print the table, then the numbers as one line of JSON."""
        print_table(self.title, self.rows, self.columns)
        say(json.dumps(self.values, allow_nan=False))


def run(
    name: str, flags_type: type[AnyFlags], measure: Callable[[AnyFlags, Runtime], Result], argv: Sequence[str] | None
) -> int:
    """The main() of benchmark `name`."""
    flags = _cli.parse(flags_type, argv)
    if flags.against:
        compare(name, flags).show()
        return 0
    with Runtime.create(flags.device_type, flags.dtype) as runtime:
        result = measure(flags, runtime)
        result.values = {**circumstances(flags, runtime), **result.values}
        result.show()
    return 0


# ---------------------------------------------------------------------------------------------------
# --against


def compare(name: str, flags: Flags) -> Result:
    """Run benchmark `name` alternately in the working tree and in revision flags.against; medians and their ratios."""
    defaults = asdict(type(flags)())
    given = flag_words(changed_flags(flags))
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    with worktree(flags.against) as there:
        if not (there / "bench" / f"{name}.py").exists():
            raise UserError(f"--against={flags.against}: that revision has no bench/{name}.py to compare with")
        for done in range(flags.rounds):
            say(f"round {done + 1} of {flags.rounds}")
            ours.append(last_line(name, given, ROOT))
            theirs.append(last_line(name, given, there))
    for key in sorted({*defaults, "device", "threads"} & ours[0].keys() & theirs[0].keys()):
        if ours[0][key] != theirs[0][key]:
            warn(f"the two differ in {key}: {ours[0][key]} here, {theirs[0][key]} at {flags.against}")
    settings = {*defaults, "threads"}
    here, before = middle(ours, settings), middle(theirs, settings)
    ratios = {key: here[key] / before[key] for key in here if before.get(key)}
    rows = [(key, f"{before[key]:.5g}", f"{here[key]:.5g}", f"{ratio:.3f}") for key, ratio in ratios.items()]
    return Result(
        f"bench.{name}, medians of {flags.rounds}",
        ["", flags.against, "working tree", "ratio"],
        rows,
        {"against": flags.against, "rounds": flags.rounds, "working_tree": here, "revision": before, "ratio": ratios},
    )


def changed_flags(flags: Flags) -> dict[str, Any]:
    """The flags of one run that are not as by default."""
    defaults = asdict(type(flags)())
    return {k: v for k, v in asdict(flags).items() if k not in ("against", "rounds") and v != defaults[k]}


def middle(results: list[dict[str, Any]], but: set[str]) -> dict[str, float]:
    """The median of every number that all results have, except those named in `but`."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    return {
        key: median(r[key] for r in results)
        for key in results[0]
        if key not in but and all(is_number(r.get(key)) for r in results)
    }


def last_line(name: str, flags: list[str], tree: Path) -> dict[str, Any]:
    """Run benchmark `name` in its own process on the modules of `tree`; returns its JSON."""
    # Python looks for modules in the current folder first, before what is installed.
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", *flags], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"bench.{name} failed in {tree}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check `revision` out into a temporary folder; removed on exit."""
    commit = commit_of(revision)
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        path = Path(folder) / "tree"
        try:
            added = git("worktree", "add", "--detach", "--quiet", str(path), commit)
            if added.returncode:
                raise UserError(f"git cannot check out {revision!r}: {added.stderr.strip().splitlines()[-1]}")
            yield path
        finally:
            git("worktree", "remove", "--force", str(path))


def commit_of(revision: str) -> str:
    """The hash of a revision's commit, the same as long as this program runs. UserError if there is none."""
    return _commit_of(revision, ROOT)


@functools.cache
def _commit_of(revision: str, root: Path) -> str:
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise UserError(f"there is no git revision {revision!r} in {root}")
    return found.stdout.strip()


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """Run git on the working tree's repository."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("comparing revisions needs git, which is not installed") from error
