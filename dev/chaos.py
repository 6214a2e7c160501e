"""Fault injection: break training runs at random, and check that they end as an undisturbed one does.

    python -m dev.chaos --minutes=15 --seed=1 --log=chaos.log

`scripts.launch` trains a tiny model on two ranks, first undisturbed, then with a fault every few seconds
(dev/chaos_faults.py): ranks and launchers are killed or frozen, the disk fills up, checkpoints are damaged. Every third
run is on two hosts (dev/two_hosts.py) under `scripts.launch --nnodes=1:2`; the network is cut, or one of them dies.

It checks that each run reaches its last step; that its average loss and weights then match the undisturbed run's within
TOLERANCE, or HOSTS_TOLERANCE over all weights where a host was alone for a time; that each restart continues from the
last complete, undamaged save or a later one; and that no rank outlives its launcher (dev/chaos_run.py). Some faults
mount file systems, in a mount namespace of their own. Faults that this machine does not permit are left out, and the
summary says why. Exit code 0 if all checks hold, else 1.
"""

import argparse
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dev.chaos_faults import NEED_HOSTS, NEED_MOUNTS, NO_RESTART, ON_ONE_HOST, ON_TWO_HOSTS
from dev.chaos_run import HOSTS_TOLERANCE, TOLERANCE, Run, RunOnTwoHosts
from dev.two_hosts import NoHosts, TwoHosts

DISK_MEGABYTES = 24


def disturb(run: Run, faults: dict[str, Callable[[Any], None]], until: float) -> None:
    """Start a run and inject faults until it ends; none after the time `until`."""
    weights = [2 if kind in NO_RESTART else 1 for kind in faults]
    run.begin()
    for starts in range(1, 1001):
        run.launch()
        while run.alive():
            if run.rng.random() > 0.1 and not run.await_steps():  # one in ten faults comes during the start
                break
            time.sleep(run.rng.uniform(0, 1.0))
            if time.monotonic() > until:
                run.await_end()
            elif run.alive() and run.folder.is_dir():
                kind = run.rng.choices([*faults], weights)[0]
                inject(run, kind, faults[kind])
        run.check_expected()
        if run.wait() == 0:
            run.kill_all()  # a second host that has not rejoined
            return run.compare(starts)
    run.problem("not finished after 1000 starts")


def inject(run: Run, kind: str, fault: Callable[[Any], None]) -> None:
    """Inject one fault, start a new launcher if that one ended, and record the time and the steps it cost."""
    tally, before, began = run.tally, run.last_step(), time.monotonic()
    tally.faults[kind] += 1
    run.say(f"{kind} (fault {tally.faults.total()}) at step {before}")
    fault(run)
    if not run.alive():
        if run.wait() == 0:
            return
        run.launch()
    position = run.output.stat().st_size
    if run.await_steps(1):
        tally.seconds[kind].append(time.monotonic() - began)
        if found := re.search(rb"resumed at step (\d+)", run.output.read_bytes()[position:]):
            tally.redone[kind].append(max(0, before - int(found[1])))
    run.check_expected()


def own_mounts(disk: Path) -> str:
    """Mount a small disk at `disk`, in a mount namespace of this process. Returns "" or the reason why not."""
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
    parser.add_argument(
        "--minutes", type=float, default=15, help="of faults; the run under way then is finished without"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and the times of the faults")
    parser.add_argument("--log", type=Path, default=Path("chaos.log"), help="log file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cleanup below runs
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        disk = Path(name) / "disk"
        disk.mkdir()
        left_out: dict[str, str] = {}  # kind -> reason
        if reason := own_mounts(disk):
            left_out |= dict.fromkeys(NEED_MOUNTS, reason)
        alone, hosts = Run(disk, Path(name) / "output.log", args.log, args.seed), None
        broken = [(alone, ON_ONE_HOST), (alone, ON_ONE_HOST)]  # taken in turn
        try:
            alone.prepare()
            alone.undisturbed()
            try:
                hosts = TwoHosts()
                broken.insert(0, (RunOnTwoHosts(alone, hosts), ON_TWO_HOSTS))
                broken[0][0].undisturbed()
            except NoHosts as error:
                left_out |= dict.fromkeys(NEED_HOSTS, str(error))
            began = time.monotonic()
            until = began + 60 * args.minutes
            for run, faults in itertools.cycle(broken):
                if time.monotonic() > until:
                    break
                disturb(run, {kind: fault for kind, fault in faults.items() if kind not in left_out}, until)
            seconds = time.monotonic() - began
        finally:
            for run, _ in broken:
                run.kill_all()
            if hosts:
                hosts.close()
            shutil.copy(alone.output, args.log.with_suffix(".output"))
            subprocess.run(["umount", "--lazy", disk], capture_output=True)
    tally = alone.tally
    alone.say(
        f"summary\n{tally.table(ON_ONE_HOST | ON_TWO_HOSTS, left_out)}\n"
        f"{tally.faults.total()} faults in {seconds / 60:.1f} minutes, {tally.runs} runs finished, largest relative "
        f"difference {tally.largest_difference:.1e} (allowed {TOLERANCE:g}), on two hosts "
        f"{tally.largest_on_two_hosts:.1e} (allowed {HOSTS_TOLERANCE:g}), "
        f"{len(tally.problems)} problems"
    )
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
