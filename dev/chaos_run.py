"""The run that dev/chaos.py breaks: starting, watching and killing it, and comparing its end with an undisturbed run's.

A run is one folder of checkpoints, which successive launchers continue; on two hosts (dev/two_hosts.py) two launchers
at a time.
"""

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.launched import (
    ONE_HOST,
    ROOT,
    environment,
    kill,
    launch_command,
    metrics,
    one_of_two_hosts,
    run_folder,
    workers_of,
)
from dev.two_hosts import TwoHosts
from nanochat.checkpoint_manager import open_checkpoint

STEPS = 300
# Allowed relative difference of average loss and weights from the undisturbed run's; the second where a host was alone
# for a time, so that sums were taken in another order.
TOLERANCE, HOSTS_TOLERANCE = 1e-6, 1e-4
STEP_TIMEOUT_SECONDS = 120.0  # for the next step, on a busy machine
EXTRA = ["--keep-last=3", "--lr-scale=0.1", "--weight-decay=0", "--timeout=30", f"--num-iterations={STEPS}"]


@dataclass
class Expectation:
    """The first start after `position` in the output must continue from `step` or later."""

    kind: str
    position: int
    step: int


@dataclass
class Tally:
    """Counts and costs of the faults, by kind, and the problems found."""

    faults: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # until the next step
    redone: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # steps that were repeated
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    largest_difference: float = 0.0
    largest_on_two_hosts: float = 0.0

    def table(self, kinds: Iterable[str], left_out: dict[str, str]) -> str:
        """A line for each kind; `left_out` maps a kind that was never injected to the reason."""
        lines = [f"{'fault':<10} {'times':>5} {'until the next step':>28} {'steps repeated':>20}"]
        for kind in kinds:
            if kind in left_out:
                lines.append(f"{kind:<10} left out: {left_out[kind]}")
                continue
            times, again = self.seconds[kind] or [0.0], self.redone[kind] or [0]
            row = f"{kind:<10} {self.faults[kind]:>5} {sum(times) / len(times):>12.1f} s, most {max(times):>5.1f} s"
            lines.append(f"{row}{sum(again) / len(again):>10.1f}, most {max(again):>3}")
        return "\n".join(lines)


class Run:
    """A run of two ranks under one launcher, with its base folder on `disk`. Logs to `log`."""

    tolerance = TOLERANCE

    def __init__(self, disk: Path, output: Path, log: Path, seed: int) -> None:
        self.disk, self.base, self.output = disk, disk / "base", output
        self.folder = run_folder(self.base)
        self.log_file = open(log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (open until exit)
        self.options: dict[str, Any] = {  # of every launcher
            "cwd": ROOT,
            "env": environment(self.base),
            "stdout": open(output, "ab"),  # noqa: SIM115 (likewise)
            "stderr": subprocess.STDOUT,
        }
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.damaged: dict[int, int] = {}  # step -> mtime of its manifest, in nanoseconds
        self.expected: list[Expectation] = []
        self.process: subprocess.Popen[bytes] | None = None

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        self.log_file.write(line + "\n")

    def problem(self, text: str) -> None:
        self.tally.problems.append(text)
        self.say(f"PROBLEM: {text}")

    # -----------------------------------------------------------------------------------------------
    # Starting and killing

    def prepare(self) -> None:
        """Make the text and train a tokenizer."""
        self.base.mkdir(parents=True)
        rows = "".join(json.dumps({"text": f"line {i} of {i * i} lines of text"}) + "\n" for i in range(400))
        (self.base / "text.jsonl").write_text(rows)
        tokenizer = [
            sys.executable,
            "-m",
            "scripts.tok_train",
            f"--data={self.base / 'text.jsonl'}",
            "--vocab-size=265",
        ]
        subprocess.run(tokenizer, cwd=ROOT, env=environment(self.base), check=True, stdout=subprocess.DEVNULL)

    def begin(self) -> None:
        """Delete the previous run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.damaged, self.expected = {}, []

    def launch(self) -> None:
        self.process = subprocess.Popen(self.command(ONE_HOST, EXTRA), **self.options)

    def command(self, where: Sequence[str], flags: Sequence[str]) -> list[str]:
        return launch_command(self.base, where, flags, logs=self.output.with_name("launcher"))  # not on the full disk

    def launchers(self) -> "list[subprocess.Popen[bytes]]":
        """The launchers that are running."""
        return [launcher for launcher in (self.process,) if launcher and launcher.poll() is None]

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        return [pid for launcher in self.launchers() for pid in workers_of(launcher)]

    def alive(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def kill_all(self) -> None:
        kill(self.launchers())

    def wait(self) -> int:
        """Wait for the launcher; returns its exit code."""
        assert self.process is not None
        return self.process.wait()

    # -----------------------------------------------------------------------------------------------
    # Watching

    def last_step(self) -> int:
        """The step of the last complete line of metrics.jsonl; 0 if there is none."""
        return max((line["step"] for line in metrics(self.base)[-1:]), default=0)

    def intact(self) -> list[int]:
        """Complete steps that no fault has damaged."""
        steps = []
        for manifest in self.folder.glob("[0-9]*/manifest.json"):
            with suppress(OSError):
                step = int(manifest.parent.name)
                if self.damaged.get(step) != manifest.stat().st_mtime_ns:
                    steps.append(step)
        return sorted(steps)

    def await_steps(self, count: int = 2) -> bool:
        """Wait until the run has taken `count` steps. False if it ended or took too long."""
        began, seen, changes = time.monotonic(), self.last_step(), 0
        while changes < count and self.alive() and time.monotonic() < began + STEP_TIMEOUT_SECONDS:
            time.sleep(0.02)
            now = self.last_step()
            changes, seen = changes + (now != seen), now
        if changes < count and self.alive():
            self.problem(f"no step in {STEP_TIMEOUT_SECONDS:g} s after step {seen}")
            self.kill_all()
        return changes >= count

    def await_end(self) -> None:
        """Wait for the last step, and for the launcher to exit."""
        while self.alive() and self.last_step() < STEPS:
            self.await_steps()
        self.wait()

    # -----------------------------------------------------------------------------------------------
    # Checking

    def expect(self, kind: str) -> None:
        """Require that the next start continues from the latest complete step, or a later one."""
        self.expected.append(Expectation(kind, self.output.stat().st_size, max(self.intact(), default=0)))

    def check_expected(self) -> None:
        """Check each expectation whose start has printed where it resumed; keep the others."""
        output, pending = self.output.read_bytes(), []
        for expected in self.expected:
            found = re.search(rb"resumed at step (\d+)|(starting from the beginning)", output[expected.position :])
            if not found:
                pending.append(expected)
            elif (step := int(found[1] or 0)) < expected.step:
                self.problem(f"{expected.kind}: step {expected.step} was saved, the run resumed from {step}")
        self.expected = pending

    def undisturbed(self) -> None:
        """Train the run to compare with."""
        self.begin()
        began = time.monotonic()
        self.launch()
        if self.wait():
            sys.exit(f"the undisturbed run failed:\n{self.output.read_text()[-3000:]}")
        end = open_checkpoint(self.folder, STEPS)
        self.expected_weights, self.expected_loss = end.model_state(), end.meta["progress"]["smooth_loss"]
        self.say(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.0f} s")

    def compare(self, starts: int) -> None:
        """Compare the finished run with the undisturbed one."""
        self.tally.runs += 1
        found = open_checkpoint(self.folder, STEPS)
        loss, weights = found.meta["progress"]["smooth_loss"], found.model_state()
        difference = max(*self.differences(weights), abs(loss - self.expected_loss) / self.expected_loss)
        self.note_difference(difference)
        self.say(
            f"run {self.tally.runs} ended at step {STEPS}: loss {loss:.6f}, undisturbed {self.expected_loss:.6f}, "
            f"largest relative difference {difference:.1e}; launchers started: {starts}"
        )
        if difference > self.tolerance:
            self.problem(f"run {self.tally.runs} differs by {difference:.1e} from the undisturbed one")

    def differences(self, weights: dict[str, Any]) -> list[float]:
        """The relative difference of each tensor."""
        return [float((weights[n] - w).norm() / w.norm().clamp(min=1e-9)) for n, w in self.expected_weights.items()]

    def note_difference(self, difference: float) -> None:
        self.tally.largest_difference = max(self.tally.largest_difference, difference)


class RunOnTwoHosts(Run):
    """The same on two hosts, one rank each. Shares the tally, the log and the random generator with `other`."""

    tolerance = HOSTS_TOLERANCE

    def __init__(self, other: Run, hosts: TwoHosts) -> None:
        self.__dict__.update(other.__dict__)
        self.hosts = hosts
        self.second: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        self.kill_all()  # one launcher may still be running
        self.process, self.second = self.start(0), self.start(1)

    def start(self, host: int) -> "subprocess.Popen[bytes]":
        # Slow steps, so that a host can return before the other has finished the run.
        flags = [*EXTRA, "--timeout=3", "--total-batch-size=512", "--device-batch-size=1"]
        return self.hosts.popen(host, self.command(one_of_two_hosts(host), flags), **self.options)

    def launchers(self) -> "list[subprocess.Popen[bytes]]":
        return [launcher for launcher in (self.process, self.second) if launcher and launcher.poll() is None]

    def await_steps(self, count: int = 2) -> bool:
        if self.second and self.second.poll() is not None and self.alive():
            self.second = self.start(1)  # as a supervisor would
        return super().await_steps(count)

    def differences(self, weights: dict[str, Any]) -> list[float]:
        """Over all tensors together: a scalar whose gradient is rounding error alone differs with the order of sums."""
        off = math.hypot(*(float((weights[n] - w).norm()) for n, w in self.expected_weights.items()))
        return [off / math.hypot(*(float(w.norm()) for w in self.expected_weights.values()))]

    def note_difference(self, difference: float) -> None:
        self.tally.largest_on_two_hosts = max(self.tally.largest_on_two_hosts, difference)
