"""The faults that dev/chaos.py injects. Each is a function of the run.

A fault that ends ranks calls `run.expect`: the next start must continue from what is saved by then.
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

from dev.chaos_run import Run, RunOnTwoHosts
from dev.launched import kill

ORPHAN_SECONDS = 30.0  # for ranks to exit after their launcher


# ---------------------------------------------------------------------------------------------------
# Ranks and launchers


def worker(run: Run) -> None:
    """Kill one rank."""
    if found := run.workers():
        with suppress(ProcessLookupError):
            os.kill(run.rng.choice(found), signal.SIGKILL)
        run.expect("worker")


def power(run: Run) -> None:
    """Kill everything at once, as a power failure would."""
    run.kill_all()
    run.expect("power")


def launcher(run: Run) -> None:
    """Kill the launcher alone; its ranks must exit soon."""
    assert run.process is not None
    orphans = run.workers()
    run.process.kill()
    run.process.wait()
    run.expect("launcher")
    end = time.monotonic() + ORPHAN_SECONDS
    while (left := [pid for pid in orphans if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        run.problem(f"launcher: process {pid} still runs {ORPHAN_SECONDS:g} s after it was killed")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def frozen(run: Run) -> None:
    """Stop a rank for a moment."""
    if found := run.workers():
        pid = run.rng.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(run.rng.uniform(0.2, 2))
            os.kill(pid, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------
# The disk


def full(run: Run) -> None:
    """Fill the disk for a moment."""
    ballast = run.disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        for size in (2**20, 2**12):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    time.sleep(run.rng.uniform(0.3, 2))
    ballast.unlink()


def readonly(run: Run) -> None:
    """Mount the run's folder read-only for a moment."""
    subprocess.run(["mount", "--bind", run.folder, run.folder], check=True)
    remount = ["mount", "-o", "remount,bind,ro", run.folder]
    while subprocess.run(remount, stderr=subprocess.DEVNULL).returncode:  # busy while a file is being written
        time.sleep(0.01)
    time.sleep(run.rng.uniform(0.3, 2))
    subprocess.run(["umount", "--lazy", run.folder], check=True)


def truncate(run: Run) -> None:
    """Kill everything at once, and truncate a file of the latest checkpoint."""
    damage(run, "truncate", truncate_file)


def bitflip(run: Run) -> None:
    """Kill everything at once, and flip a bit in a file of the latest checkpoint."""
    damage(run, "bitflip", flip_bit)


def damage(run: Run, kind: str, change: Callable[[Path, random.Random], int]) -> None:
    """Kill everything and `change` one file of the latest step, if there is an earlier one to continue from."""
    run.kill_all()
    run.check_expected()
    run.expected = []  # the step they refer to may be the damaged one
    steps = run.intact()
    if len(steps) > 1:
        folder = run.folder / f"{steps[-1]:06d}"
        path = run.rng.choice([p for p in sorted(folder.iterdir()) if p.stat().st_size])
        at = change(path, run.rng)
        run.damaged[steps[-1]] = (folder / "manifest.json").stat().st_mtime_ns
        run.say(f"  {folder.name}/{path.name}: {kind} at byte {at}")
    run.expect(kind)


def truncate_file(path: Path, rng: random.Random) -> int:
    """Truncate to a random size, which is returned."""
    at = rng.randrange(path.stat().st_size)
    os.truncate(path, at)
    return at


def flip_bit(path: Path, rng: random.Random) -> int:
    """Flip one bit; returns its byte offset."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return at


# ---------------------------------------------------------------------------------------------------
# The network


def cut(run: RunOnTwoHosts) -> None:
    """Cut the network between the hosts for a moment."""
    run.expect("cut")
    run.hosts.link(1, "down")
    time.sleep(run.rng.uniform(0.5, 20))
    run.hosts.link(1, "up")


def node(run: RunOnTwoHosts) -> None:
    """Kill a host while the network is cut, so that nothing reports it, and start it again."""
    run.expect("node")
    run.hosts.link(1, "down")
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
NO_RESTART = ("frozen", "full", "readonly")  # take less time, so they are chosen twice as often
