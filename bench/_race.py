"""Training runs against each other: a pair of them at the same time, each on its own half of the machine."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench._run import ROOT, worktree
from nanochat.common import UserError, json_hash
from nanochat.tokenizer import MIN_VOCAB_SIZE

# Run a command on some cores only: before its threads exist, and without a fork of this process's.
PINNED = (
    "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); os.execv(sys.argv[2], sys.argv[2:])"
)
SAME_FOR_BOTH = ("--minutes", "--data", "--eval-tokens", "--seed", "--model-tag")  # else no race at equal terms
GRACE_SECONDS = 900.0  # that a run may take beyond its minutes before it counts as hanging


@dataclass(frozen=True)
class Side:
    """One side of a race, written as words: `@REVISION` for other code, `--flag=value` of base_train, `vocab=N`,
    and changes to the recipe such as `backout=False`. No words: the working tree with the common flags."""

    text: str
    revision: str = ""
    flags: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    vocab_size: int = 0  # 0: the common one

    @classmethod
    def parse(cls, text: str) -> "Side":
        """Raises UserError for a word that is none of these."""
        revision, vocab_size, flags, changes = "", 0, list[str](), list[str]()
        try:
            words = shlex.split(text)
        except ValueError as error:  # an open quote
            raise UserError(f"{text}: {error}") from error
        for word in words:
            if word.startswith("@") and len(word) > 1:
                revision = word[1:]
            elif word.startswith("--") and "=" in word:
                if word.partition("=")[0].replace("_", "-") in SAME_FOR_BOTH:
                    raise UserError(f"{word}: both sides have the same; --minutes and --data are flags of bench.recipe")
                flags.append(word)
            elif word.startswith("vocab=") and word[6:].isdigit() and int(word[6:]) >= MIN_VOCAB_SIZE:
                vocab_size = int(word[6:])
            elif "=" in word and not word.startswith(("-", "vocab=")):
                changes += word.split(",")
            else:
                raise UserError(
                    f"{word!r} is neither @REVISION, --flag=value, vocab=N nor a change such as backout=False"
                )
        return cls(" ".join(text.split()), revision, tuple(flags), tuple(changes), vocab_size)

    def plus(self, other: "Side") -> "Side":
        """This side changed further by `other`, which wins where both set the same."""
        return Side.parse(f"{self.text} {other.text}")

    def command(self, common: Sequence[str]) -> list[str]:
        """base_train's flags: the common ones, this side's in their place, and the recipe with all changes."""
        given = dict(flag.split("=", 1) for flag in (*common, *self.flags))
        changes = {change.partition("=")[0]: change for change in self.changes}  # the last of each name
        given["--recipe"] = ",".join([given.get("--recipe", "default"), *changes.values()])
        return [f"{name}={value}" for name, value in given.items()]


@dataclass
class Race:
    """What all runs have in common. Use as a context: it holds the checked-out revisions and the tokenizers."""

    minutes: float
    common: Sequence[str]  # flags of base_train
    data: str
    vocab_size: int
    chars: int  # the tokenizers are trained on
    eval_bytes: int
    together: bool  # both sides at once, each on half of the cores
    _open: ExitStack = field(default_factory=ExitStack)
    _trees: dict[str, Path] = field(default_factory=dict)
    _tokenizers: dict[str, tuple[Path, float]] = field(default_factory=dict)

    def __enter__(self) -> "Race":
        self.folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-race-")))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def pair(self, a: Side, b: Side, seed: int) -> tuple[float | str, float | str]:
        """Bits per byte of both sides from one seed; of one that failed, its error's last line instead.

        At odd seeds they take each other's cores, so that a difference between cores cancels out.
        """
        for side in (a, b):
            self._tokenizer(side)  # outside of the time
        if not self.together:
            return self._finish(self._start(a, seed, None)), self._finish(self._start(b, seed, None))
        halves = cpu_halves()
        if seed % 2:
            halves.reverse()
        runs = list[Started]()
        try:
            for side, half in zip((a, b), halves):
                runs.append(self._start(side, seed, half))
            return self._finish(runs[0]), self._finish(runs[1])
        finally:
            for run in runs:
                run.kill()

    def _tree(self, side: Side) -> Path:
        if side.revision and side.revision not in self._trees:
            self._trees[side.revision] = self._open.enter_context(worktree(side.revision))
        return self._trees.get(side.revision, ROOT)

    def _tokenizer(self, side: Side) -> tuple[Path, float]:
        """(folder, bytes per token) of the side's vocabulary, trained with its code the first time."""
        size, tree = side.vocab_size or self.vocab_size, self._tree(side)
        key = f"{size}-{json_hash([side.revision])[:8]}"
        if key not in self._tokenizers:
            base = self.folder / key
            flags = [f"--vocab-size={size}", f"--max-chars={self.chars}", f"--data={self.data}"]
            command = [sys.executable, "-P", "-m", "scripts.tok_train", *flags]
            done = subprocess.run(command, env=self._environment(tree, base), capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{side.text or 'A'}: tok_train {' '.join(flags)} failed: {last_words(done.stderr)}")
            try:
                report = json.loads((base / "report" / "report.json").read_text())
                self._tokenizers[key] = base / "tokenizer", report["tokenizer"]["bytes_per_token"]
            except (OSError, KeyError) as error:
                raise UserError(
                    f"{side.text}: that revision is too old to be raced (no report of tok_train)"
                ) from error
            # Its C kernels, once for all runs and outside of their time; a revision without them has none to build.
            build = [sys.executable, "-P", "-c", "from nanochat.cpu.kernels import library; library()"]
            subprocess.run(build, env=self._environment(tree, base), capture_output=True)
        return self._tokenizers[key]

    def _start(self, side: Side, seed: int, cpus: set[int] | None) -> "Started":
        tokenizer, bytes_per_token = self._tokenizer(side)
        base = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(tokenizer, base / "tokenizer")
        common = [f"--minutes={self.minutes:g}", "--eval-every=-1", "--sample-every=-1", *self.common]
        common.append(f"--data={self.data}")
        # As many tokens as the same text has, whatever the vocabulary.
        common.append(f"--eval-tokens={max(1, round(self.eval_bytes / bytes_per_token))}")
        command = [sys.executable, "-P", "-m", "scripts.base_train", *side.command(common)]
        command += [f"--seed={seed}", "--model-tag=race"]
        env = self._environment(self._tree(side), base)
        return Started(command, env, base, cpus, time.monotonic() + 60 * self.minutes + GRACE_SECONDS)

    def _environment(self, tree: Path, base: Path) -> dict[str, str]:
        """For a process with the code of `tree` and the base folder `base`, run with -P: not the code in the current
        folder, which stays, so that relative paths in flags mean what they mean to the user."""
        kernels = {"NANOCHAT_KERNELS_DIR": str(self.folder / "kernels")} | os.environ
        return {**kernels, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(tree)}

    def _finish(self, run: "Started") -> float | str:
        """Wait for a run's end; its final bits per byte, or why there are none."""
        try:
            return run.result()
        finally:
            run.kill()
            shutil.rmtree(run.base, ignore_errors=True)


class Started:
    """A training run in a process group of its own."""

    def __init__(
        self, command: list[str], env: dict[str, str], base: Path, cpus: set[int] | None, deadline: float
    ) -> None:
        self.base, self.deadline = base, deadline
        self.log = open(base / "log.txt", "w+")  # noqa: SIM115
        pinned = [sys.executable, "-c", PINNED, ",".join(map(str, cpus)), *command] if cpus else command
        self.process = subprocess.Popen(
            pinned,
            env=env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def result(self) -> float | str:
        try:
            code = self.process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "hangs"
        if code:
            self.log.seek(0)
            return f"exit code {code}: {last_words(self.log.read())}"
        report = json.loads((self.base / "report" / "report.json").read_text())
        bpb = report["base_train"]["val_bpb"]
        return float(bpb) if bpb is not None and math.isfinite(bpb) else f"val_bpb is {bpb}"

    def kill(self) -> None:
        """End the run and whatever it started, if it is still going."""
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:  # Windows
                self.process.kill()
        self.process.wait()
        self.log.close()


def last_words(text: str) -> str:
    """The last line that says something."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1][:200]


def cpu_halves() -> list[set[int]]:
    """The CPUs this process may use, in two halves of the same size; where there are two cores or more, the threads of
    one core are in the same half."""
    cpus = sorted(os.sched_getaffinity(0), key=lambda cpu: (core_of(cpu), cpu))
    half = len(cpus) // 2
    return [set(cpus[:half]), set(cpus[half : 2 * half])]


def core_of(cpu: int) -> int:
    """The first of the CPUs (hardware threads) that share a core with this one; itself where Linux does not say."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")  # such as 0,4 or 0-1
    try:
        return int(re.split("[,-]", path.read_text())[0])
    except (OSError, ValueError):
        return cpu


def can_run_together() -> bool:
    """Whether two runs can be given half of the machine each: several cores, no GPU to share, and Linux."""
    return hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1 and not torch.cuda.is_available()


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Turn SIGTERM, and SIGHUP unless it is ignored, into KeyboardInterrupt, so that the runs end with this process."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
    before = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
