"""What dev/chaos.py does to a run: each fault is a function of the run that suffers it.

One that ends processes says so by `run.expect`: what is saved by then, the next start has to go on from.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dev.chaos_run import Run, RunOnTwoHosts, kill

ORPHAN_SECONDS = 30.0  # for processes without a launcher to end


# ---------------------------------------------------------------------------------------------------
# Processes


def worker(run: Run) -> None:
    """One of the two is killed."""
    if found := run.workers():
        with suppress(ProcessLookupError):
            os.kill(run.rng.choice(found), signal.SIGKILL)
        run.expect("worker")


def power(run: Run) -> None:
    """Everything is killed at once."""
    run.kill_all()
    run.expect("power")


def launcher(run: Run) -> None:
    """The launcher alone is killed; what it has started has to end soon."""
    assert run.process is not None
    orphans = run.workers()
    run.process.kill()
    run.process.wait()
    run.expect("launcher")
    end = time.monotonic() + ORPHAN_SECONDS
    while (left := [pid for pid in orphans if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        run.problem(f"launcher: process {pid} still ran {ORPHAN_SECONDS:g} s after it")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def frozen(run: Run) -> None:
    """A process stands still for a moment."""
    if found := run.workers():
        pid = run.rng.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(run.rng.uniform(0.2, 2))
            os.kill(pid, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------
# The disk


def full(run: Run) -> None:
    """The disk is full for a moment."""
    ballast = run.disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        for size in (2**20, 2**12):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    time.sleep(run.rng.uniform(0.3, 2))
    ballast.unlink()


def readonly(run: Run) -> None:
    """The run's folder may not be written for a moment."""
    subprocess.run(["mount", "--bind", run.folder, run.folder], check=True)
    remount = ["mount", "-o", "remount,bind,ro", run.folder]
    while subprocess.run(remount, stderr=subprocess.DEVNULL).returncode:  # busy while a file is being written
        time.sleep(0.01)
    time.sleep(run.rng.uniform(0.3, 2))
    subprocess.run(["umount", "--lazy", run.folder], check=True)


def truncate(run: Run) -> None:
    """Everything is killed at once, and a file of the latest checkpoint is cut short."""
    damage(run, "truncate", cut_short)


def bitflip(run: Run) -> None:
    """The same, and a bit of one is another."""
    damage(run, "bitflip", flip_bit)


def damage(run: Run, kind: str, spoil: Callable[[Path, random.Random], int]) -> None:
    """Kill all and spoil one file of the latest step, if there is an earlier one to go on from."""
    run.kill_all()
    run.check_expected()
    run.expected = []  # what was there to go on from is damaged now
    steps = run.intact()
    if len(steps) > 1:
        folder = run.folder / f"{steps[-1]:06d}"
        path = run.rng.choice([p for p in sorted(folder.iterdir()) if p.stat().st_size])
        at = spoil(path, run.rng)
        run.damaged[steps[-1]] = (folder / "manifest.json").stat().st_mtime_ns
        run.say(f"  {folder.name}/{path.name}: {kind} at byte {at}")
    run.expect(kind)


def cut_short(path: Path, rng: random.Random) -> int:
    """Leave only the bytes before the one that is returned."""
    at = rng.randrange(path.stat().st_size)
    os.truncate(path, at)
    return at


def flip_bit(path: Path, rng: random.Random) -> int:
    """Change one bit; returns where its byte is."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return at


# ---------------------------------------------------------------------------------------------------
# The network


def cut(run: RunOnTwoHosts) -> None:
    """The cable between the hosts is pulled for a moment."""
    run.expect("cut")
    run.hosts.link(1, "down")
    time.sleep(run.rng.uniform(0.5, 20))
    run.hosts.link(1, "up")


def node(run: RunOnTwoHosts) -> None:
    """A host dies unheard and is started anew."""
    run.expect("node")
    run.hosts.link(1, "down")  # nobody hears of it
    if run.second:
        kill([run.second])
    time.sleep(run.rng.uniform(0, 15))
    run.hosts.link(1, "up")
    run.second = run.start(1)


ON_ONE_HOST: dict[str, Callable[[Any], None]] = {
    "worker": worker,
    "power": power,
    "launcher": launcher,
    "frozen": frozen,
    "full": full,
    "readonly": readonly,
    "truncate": truncate,
    "bitflip": bitflip,
}
ON_TWO_HOSTS: dict[str, Callable[[Any], None]] = {"worker": worker, "power": power, "cut": cut, "node": node}
NEED_MOUNTS = ("full", "readonly")
NEED_HOSTS = ("cut", "node")
LASTING = ("frozen", "full", "readonly")  # no process starts anew, so there is time for more of them
