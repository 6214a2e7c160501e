"""Break a training run again and again, as machines break, and see that it ends as if nothing had happened.

    python -m dev.chaos --minutes=15 --seed=1 --log=chaos.log

`scripts.launch` trains a tiny model in two processes, first undisturbed, then with a fault every few seconds:

    worker     one of the two is killed (SIGKILL)           launcher   the launcher alone is killed
    power      everything is killed at once                  truncate, bitflip
    frozen     a process stands still for a moment                     the same, and a file of the latest
    full       the disk is full for a moment                           checkpoint is damaged meanwhile
    readonly   the run's folder may not be written for a moment

Every third run is on two hosts (dev/two_hosts.py), which meet as `scripts.launch --nnodes=1:2`:

    cut        the cable between them is pulled for a moment     node   a host dies unheard and is started anew

It asserts that each run reaches its last step; that its average loss and its weights are then the undisturbed run's
within TOLERANCE, or, taken together, HOSTS_TOLERANCE where a host was alone for a time; that each restart goes on from
the last completed, undamaged save or a later one; and that no process outlives its launcher. "full" and "readonly"
mount things, in a mount namespace of their own. What this machine does not permit is left out, which the summary says.
Exit code 0 if all that holds, 1 if not.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.two_hosts import NoHosts, TwoHosts
from nanochat.checkpoint_manager import open_checkpoint, run_dir

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY, TOLERANCE = 300, 5, 1e-6
DISK_MEGABYTES = 24
PATIENCE_SECONDS = 120.0  # for a run to take another step, on a busy machine
ORPHAN_SECONDS = 30.0  # for processes without a launcher to end
HOSTS_TOLERANCE = 1e-4
FLAGS = [
    "--depth=1", "--n-embd=16", "--head-dim=8", "--max-seq-len=16", "--total-batch-size=64", "--eval-tokens=64",
    "--eval-every=-1", "--sample-every=-1", "--device-type=cpu", "--model-tag=chaos", "--resume", "--keep-last=3",
    "--lr-scale=0.1", "--weight-decay=0", "--timeout=30", f"--save-every={SAVE_EVERY}", f"--num-iterations={STEPS}",
]  # fmt: skip


@dataclass
class Expectation:
    """After `position` in the output, the next start goes on from `step` or later."""

    kind: str
    position: int
    step: int


@dataclass
class Tally:
    """What came of the faults, by kind."""

    faults: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # until the next step
    redone: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # steps that were done twice
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    largest_difference: float = 0.0
    largest_on_two_hosts: float = 0.0

    def table(self, left_out: dict[str, str]) -> str:
        """A line for each kind."""
        lines = [f"{'fault':<10} {'times':>5} {'until the next step':>28} {'steps done twice':>20}"]
        for kind in FAULTS:
            if kind in left_out:
                lines.append(f"{kind:<10} left out: {left_out[kind]}")
                continue
            times, again = self.seconds[kind] or [0.0], self.redone[kind] or [0]
            row = f"{kind:<10} {self.faults[kind]:>5} {sum(times) / len(times):>12.1f} s, most {max(times):>5.1f} s"
            lines.append(f"{row}{sum(again) / len(again):>10.1f}, most {max(again):>3}")
        return "\n".join(lines)


class Chaos:
    """One run after another in `base`, each broken until it ends. Writes down what it does in `log`."""

    tolerance = TOLERANCE
    kinds: tuple[str, ...] = ("worker", "power", "launcher", "frozen", "full", "readonly", "truncate", "bitflip")

    def __init__(self, folder: Path, disk: Path, log: Path, seed: int) -> None:
        self.base, self.disk, self.run = disk / "base", disk, run_dir(disk / "base", "base", "chaos")
        self.prepared, self.output = folder / "prepared", folder / "output.log"
        self.log_file = open(log, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (open to the end)
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.damaged: dict[int, int] = {}  # step -> when its manifest was written
        self.expected: list[Expectation] = []
        self.left_out: dict[str, str] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        self.log_file.write(line + "\n")

    def problem(self, text: str) -> None:
        self.tally.problems.append(text)
        self.say(f"PROBLEM: {text}")

    # -----------------------------------------------------------------------------------------------
    # Looking

    def command(self, *where: str, flags: Sequence[str] = ()) -> list[str]:
        return [sys.executable, "-m", "scripts.launch", *where, "--max-restarts=3", "--monitor-interval=0.1",
                f"--log-dir={self.output.with_name('launcher')}", "-m", "scripts.base_train", "--", *FLAGS, *flags,
                f"--data={self.base / 'text.jsonl'}"]  # fmt: skip

    def launch(self) -> None:
        command = self.command("--nnodes=1", "--nproc_per_node=2", "--master-addr=127.0.0.1", "--master-port=0",
                               "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")  # fmt: skip
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(self.base), stdout=output,
                                            stderr=subprocess.STDOUT)  # fmt: skip

    def launchers(self) -> "list[subprocess.Popen[bytes]]":
        """Those that run."""
        return [launcher for launcher in (self.process,) if launcher and launcher.poll() is None]

    def alive(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def workers(self) -> list[int]:
        """The training processes below the launchers."""
        found = []
        for pid in (launcher.pid for launcher in self.launchers()):
            with suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                    if b"scripts.base_train" in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
        return found

    def last_step(self) -> int:
        """The last line of metrics.jsonl that is whole; 0 if there is none."""
        with suppress(OSError):
            for line in reversed((self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
                with suppress(ValueError, KeyError):
                    return json.loads(line)["step"]
        return 0

    def intact(self) -> list[int]:
        """Completed steps that were not damaged since."""
        steps = []
        for manifest in self.run.glob("[0-9]*/manifest.json"):
            with suppress(OSError):
                step = int(manifest.parent.name)
                if self.damaged.get(step) != manifest.stat().st_mtime_ns:
                    steps.append(step)
        return sorted(steps)

    def await_steps(self, count: int = 2) -> bool:
        """Wait until the run has taken steps anew; False if it ended, or if the time for that is up."""
        began, seen, changes = time.monotonic(), self.last_step(), 0
        while changes < count and self.alive() and time.monotonic() < began + PATIENCE_SECONDS:
            time.sleep(0.02)
            now = self.last_step()
            changes, seen = changes + (now != seen), now
        if changes < count and self.alive():
            self.problem(f"no step in {PATIENCE_SECONDS:g} s after step {seen}")
            self.kill_all()
        return changes >= count

    # -----------------------------------------------------------------------------------------------
    # Breaking

    def expect(self, kind: str) -> None:
        """From here on, no step that is saved may be lost."""
        self.expected.append(Expectation(kind, self.output.stat().st_size, max(self.intact(), default=0)))

    def check_expected(self) -> None:
        """Compare where each start went on with what was there to go on from."""
        said = self.output.read_bytes()
        waiting = []
        for wanted in self.expected:
            found = re.search(rb"resumed at step (\d+)|(starting from the beginning)", said[wanted.position :])
            if not found:
                waiting.append(wanted)
            elif (step := int(found[1] or 0)) < wanted.step:
                self.problem(f"{wanted.kind}: step {wanted.step} was saved, the run went on from {step}")
        self.expected = waiting

    def kill_all(self) -> None:
        for launcher in self.launchers():
            with suppress(ProcessLookupError):
                os.kill(launcher.pid, signal.SIGSTOP)  # it shall not start others meanwhile
        for pid in self.workers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for launcher in self.launchers():
            launcher.kill()
            launcher.wait()

    def worker(self) -> None:
        found = self.workers()
        if found:
            with suppress(ProcessLookupError):
                os.kill(self.rng.choice(found), signal.SIGKILL)
            self.expect("worker")

    def power(self) -> None:
        self.kill_all()
        self.expect("power")

    def launcher(self) -> None:
        assert self.process is not None
        orphans = self.workers()
        self.process.kill()
        self.process.wait()
        self.expect("launcher")
        end = time.monotonic() + ORPHAN_SECONDS
        while (left := [pid for pid in orphans if is_running(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            self.problem(f"launcher: process {pid} still ran {ORPHAN_SECONDS:g} s after it")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def frozen(self) -> None:
        found = self.workers()
        if found:
            pid = self.rng.choice(found)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.rng.uniform(0.2, 2))
                os.kill(pid, signal.SIGCONT)

    def full(self) -> None:
        ballast = self.disk / "ballast"
        with open(ballast, "wb", buffering=0) as file, suppress(OSError):
            for size in (2**20, 2**12):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        time.sleep(self.rng.uniform(0.3, 2))
        ballast.unlink()

    def readonly(self) -> None:
        subprocess.run(["mount", "--bind", self.run, self.run], check=True)
        remount = ["mount", "-o", "remount,bind,ro", self.run]
        while subprocess.run(remount, stderr=subprocess.DEVNULL).returncode:  # busy while a file is being written
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0.3, 2))
        subprocess.run(["umount", "--lazy", self.run], check=True)

    def truncate(self) -> None:
        self.damage("truncate", lambda size: (self.rng.randrange(size), None))

    def bitflip(self) -> None:
        self.damage("bitflip", lambda size: (self.rng.randrange(size), 1 << self.rng.randrange(8)))

    def damage(self, kind: str, choose: Callable[[int], tuple[int, int | None]]) -> None:
        """Kill all and damage one file of the latest step, if there is an earlier one to go on from."""
        self.kill_all()
        self.check_expected()
        self.expected = []  # what was there to go on from is damaged now
        steps = self.intact()
        if len(steps) > 1:
            path = self.rng.choice([p for p in sorted((self.run / f"{steps[-1]:06d}").iterdir()) if p.stat().st_size])
            at, bit = choose(path.stat().st_size)
            with open(path, "r+b") as file:
                if bit is None:
                    file.truncate(at)
                else:
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ bit]))
            self.damaged[steps[-1]] = (path.parent / "manifest.json").stat().st_mtime_ns
            self.say(f"  {path.parent.name}/{path.name}: {kind} at byte {at}")
        self.expect(kind)

    # -----------------------------------------------------------------------------------------------
    # Runs

    def prepare(self) -> None:
        """A tokenizer and text."""
        self.base.mkdir(parents=True)
        rows = "".join(json.dumps({"text": f"line {i} of {i * i} lines of text"}) + "\n" for i in range(400))
        (self.base / "text.jsonl").write_text(rows)
        tokenizer = [sys.executable, "-m", "scripts.tok_train", f"--data={self.base / 'text.jsonl'}",
                     "--vocab-size=265"]  # fmt: skip
        subprocess.run(tokenizer, cwd=ROOT, env=environment(self.base), check=True, stdout=subprocess.DEVNULL)

    def undisturbed(self) -> None:
        """The run to compare with."""
        shutil.rmtree(self.run, ignore_errors=True)
        began = time.monotonic()
        self.launch()
        assert self.process is not None
        if self.process.wait():
            sys.exit(f"the undisturbed run failed:\n{self.output.read_text()[-3000:]}")
        self.wanted = open_checkpoint(self.run, STEPS)
        self.wanted_weights, self.wanted_loss = self.wanted.model_state(), self.wanted.meta["progress"]["smooth_loss"]
        self.say(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.0f} s")
        shutil.rmtree(self.run)

    def disturb(self, until: float) -> None:
        """One run, broken until it ends; after `until`, left in peace."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.damaged, self.expected = {}, []
        kinds = [kind for kind in self.kinds if kind not in self.left_out]
        weights = [2 if kind in LASTING else 1 for kind in kinds]
        starts = 0
        while True:
            self.launch()
            starts += 1
            while self.alive():
                if self.rng.random() > 0.1 and not self.await_steps():  # now and then while it is starting
                    break
                time.sleep(self.rng.uniform(0, 1.0))
                if time.monotonic() > until:
                    self.await_end()
                elif self.alive() and self.run.is_dir():
                    self.inject(self.rng.choices(kinds, weights)[0])
            self.check_expected()
            assert self.process is not None
            if self.process.wait() == 0:
                self.kill_all()  # a host that has not come back
                break
            if starts > 1000:
                return self.problem("1000 starts and no end")
        self.compare(starts)

    def await_end(self) -> None:
        """No more faults: the run has to reach its end."""
        while self.alive() and self.last_step() < STEPS:
            self.await_steps()
        assert self.process is not None
        self.process.wait()

    def inject(self, kind: str) -> None:
        before, began = self.last_step(), time.monotonic()
        self.tally.faults[kind] += 1
        self.say(f"{kind} (fault {self.tally.faults.total()}) at step {before}")
        FAULTS[kind](self)
        if not self.alive():
            if self.process is not None and self.process.returncode == 0:
                return
            self.launch()
        position = self.output.stat().st_size
        if self.await_steps(1):
            self.tally.seconds[kind].append(time.monotonic() - began)
            if found := re.search(rb"resumed at step (\d+)", self.output.read_bytes()[position:]):
                self.tally.redone[kind].append(max(0, before - int(found[1])))
        self.check_expected()

    def compare(self, starts: int) -> None:
        """With the undisturbed run."""
        self.tally.runs += 1
        found = open_checkpoint(self.run, STEPS)
        loss, weights = found.meta["progress"]["smooth_loss"], found.model_state()
        off = [*self.differences(weights), abs(loss - self.wanted_loss) / self.wanted_loss]
        self.note_difference(max(off))
        said = f"run {self.tally.runs} ended at step {STEPS}: loss {loss:.6f}, undisturbed {self.wanted_loss:.6f}, "
        self.say(f"{said}largest relative difference {max(off):.1e}; the launcher was started {starts} times by itself")
        if max(off) > self.tolerance:
            self.problem(f"run {self.tally.runs} is {max(off):.1e} off the undisturbed one")

    def differences(self, weights: dict[str, Any]) -> list[float]:
        """Each tensor's, relative to its norm."""
        return [float((weights[n] - w).norm() / w.norm().clamp(min=1e-9)) for n, w in self.wanted_weights.items()]

    def note_difference(self, off: float) -> None:
        self.tally.largest_difference = max(self.tally.largest_difference, off)


class OnTwoHosts(Chaos):
    """The same on two hosts, one process each. Shares the tally, the log and the dice with `other`."""

    tolerance = HOSTS_TOLERANCE
    kinds = ("worker", "power", "cut", "node")

    def __init__(self, other: Chaos, hosts: TwoHosts) -> None:
        self.__dict__.update(other.__dict__)
        self.hosts = hosts
        self.second: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        self.kill_all()  # of the hosts' launchers the one that is left
        self.process, self.second = self.start(0), self.start(1)

    def start(self, host: int) -> "subprocess.Popen[bytes]":
        address = TwoHosts.addresses
        quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
        # Steps slow enough for a host to return before the other has done them all.
        flags = ["--timeout=3", "--total-batch-size=512", "--device-batch-size=1"]
        command = self.command("--nnodes=1:2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=chaos",
                               f"--rdzv-endpoint={address[0]}:29500", f"--local-addr={address[host]}",
                               f"--rdzv-conf={quick},is_host={int(host == 0)}", flags=flags)  # fmt: skip
        with open(self.output, "ab") as output:
            return self.hosts.popen(host, command, cwd=ROOT, env=environment(self.base), stdout=output,
                                    stderr=subprocess.STDOUT)  # fmt: skip

    def launchers(self) -> "list[subprocess.Popen[bytes]]":
        return [launcher for launcher in (self.process, self.second) if launcher and launcher.poll() is None]

    def await_steps(self, count: int = 2) -> bool:
        if self.second and self.second.poll() is not None and self.alive():
            self.second = self.start(1)  # as whoever looks after that host would
        return super().await_steps(count)

    def cut(self) -> None:
        self.expect("cut")
        self.hosts.link(1, "down")
        time.sleep(self.rng.uniform(0.5, 20))
        self.hosts.link(1, "up")

    def node(self) -> None:
        self.expect("node")
        self.hosts.link(1, "down")  # nobody hears of it
        first, self.process = self.process, None
        self.kill_all()
        self.process = first
        time.sleep(self.rng.uniform(0, 15))
        self.hosts.link(1, "up")
        self.second = self.start(1)

    def differences(self, weights: dict[str, Any]) -> list[float]:
        """All taken together: a scalar whose gradient is rounding alone goes its own way with any other sum."""
        off = math.hypot(*(float((weights[n] - w).norm()) for n, w in self.wanted_weights.items()))
        return [off / math.hypot(*(float(w.norm()) for w in self.wanted_weights.values()))]

    def note_difference(self, off: float) -> None:
        self.tally.largest_on_two_hosts = max(self.tally.largest_on_two_hosts, off)


FAULTS: dict[str, Callable[[Any], None]] = {
    "worker": Chaos.worker, "power": Chaos.power, "launcher": Chaos.launcher, "frozen": Chaos.frozen,
    "full": Chaos.full, "readonly": Chaos.readonly, "truncate": Chaos.truncate, "bitflip": Chaos.bitflip,
    "cut": OnTwoHosts.cut, "node": OnTwoHosts.node,
}  # fmt: skip


LASTING = ("frozen", "full", "readonly")  # no process starts anew, so there is time for more of them


def environment(base: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def own_mounts(disk: Path) -> str:
    """Put a small disk at `disk`, in a mount namespace that ends with us; else why not."""
    CLONE_NEWNS = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return f"mounting is not permitted ({os.strerror(ctypes.get_errno())})"
    for command in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(disk)]):
        done = subprocess.run(["mount", *command], capture_output=True, text=True)
        if done.returncode:
            return f"mounting is not permitted ({done.stderr.strip()})"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="of faults; what runs then is brought to its end")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the moments of the faults")
    parser.add_argument("--log", type=Path, default=Path("chaos.log"), help="where to write down what happens")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through what cleans up
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        disk = folder / "disk"
        disk.mkdir()
        chaos = Chaos(folder, disk, args.log, args.seed)
        if why := own_mounts(disk):
            chaos.left_out = {"full": why, "readonly": why}
        runs, hosts = [chaos, chaos], None
        try:
            chaos.prepare()
            chaos.undisturbed()
            try:
                hosts = TwoHosts()
                runs.append(OnTwoHosts(chaos, hosts))
                runs[-1].undisturbed()
            except NoHosts as error:
                chaos.left_out |= {"cut": str(error), "node": str(error)}
            began = time.monotonic()
            until = began + 60 * args.minutes
            for run in itertools.cycle(reversed(runs)):
                if time.monotonic() > until:
                    break
                run.disturb(until)
            seconds = time.monotonic() - began
        finally:
            for run in runs:
                run.kill_all()
            if hosts:
                hosts.close()
            shutil.copy(chaos.output, args.log.with_suffix(".output"))
            subprocess.run(["umount", "--lazy", disk], capture_output=True)
    tally = chaos.tally
    chaos.say(f"summary\n{tally.table(chaos.left_out)}\n{tally.faults.total()} faults in {seconds / 60:.1f} minutes, "
              f"{tally.runs} runs ended, largest relative difference {tally.largest_difference:.1e} (allowed "
              f"{TOLERANCE:g}), on two hosts {tally.largest_on_two_hosts:.1e} (allowed {HOSTS_TOLERANCE:g}), "
              f"{len(tally.problems)} problems")  # fmt: skip
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
