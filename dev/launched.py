"""A small base_train run under scripts.launch, for fault injection and tests: its command, metrics, ranks and end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dev.two_hosts import TwoHosts
from nanochat.checkpoint.runs import run_dir
from nanochat.reporting.curves import Record, read_metrics

ROOT = Path(__file__).resolve().parent.parent
TAG = "launched"
FLAGS = [
    "--depth=1",
    "--n-embd=16",
    "--head-dim=8",
    "--max-seq-len=16",
    "--total-batch-size=64",
    "--eval-tokens=64",
    "--eval-every=-1",
    "--sample-every=-1",
    "--device-type=cpu",
    "--save-every=5",
    f"--model-tag={TAG}",
    "--resume",
]
# Two ranks on this machine.
ONE_HOST = [
    "--nnodes=1",
    "--nproc_per_node=2",
    "--master-addr=127.0.0.1",
    "--master-port=0",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
]


def one_of_two_hosts(host: int) -> list[str]:
    """A rank on that host of TwoHosts. A host counts as dead after 3 s, and a start waits 1 s for the other one."""
    quick = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    return [
        "--nnodes=1:2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-id={TAG}",
        f"--rdzv-endpoint={TwoHosts.addresses[0]}:29500",
        f"--local-addr={TwoHosts.addresses[host]}",
        # Both hosts have this machine's name, so is_host says which of them runs the store.
        f"--rdzv-conf={quick},is_host={int(host == 0)}",
    ]


def launch_command(
    base: Path,
    where: Sequence[str],
    flags: Sequence[str] = (),
    script: Sequence[str] = ("-m", "scripts.base_train", "--"),
    logs: Path | None = None,
) -> list[str]:
    """The command of a launcher that trains on BASE/text.jsonl with FLAGS and `flags`. Its logs are in `logs`."""
    launcher = ["--max-restarts=3", "--monitor-interval=0.1", f"--log-dir={logs or base / 'launcher'}"]
    data = f"--data={base / 'text.jsonl'}"
    return [sys.executable, "-m", "scripts.launch", *where, *launcher, *script, *FLAGS, *flags, data]


def environment(base: Path) -> dict[str, str]:
    """The environment of a launcher."""
    settings = {"OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    return {**os.environ, **settings, "PYTHONPATH": str(ROOT)}


def run_folder(base: Path) -> Path:
    """The folder of the run's checkpoints."""
    return run_dir(base, "base", TAG)


def metrics(base: Path) -> list[Record]:
    """The complete lines of metrics.jsonl."""
    with suppress(OSError):  # a resumed run is about to replace the file
        return read_metrics(run_folder(base) / "metrics.jsonl")
    return []


def workers_of(launcher: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> list[int]:
    """Process ids of the ranks below a launcher."""
    found = []
    with suppress(OSError):
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            if b"_train" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def kill(launchers: "Iterable[subprocess.Popen[bytes]]") -> None:
    """Kill launchers and all their ranks, so that none can save or report."""
    running = [launcher for launcher in launchers if launcher.poll() is None]
    for launcher in running:
        launcher.send_signal(signal.SIGSTOP)  # so that it starts no others meanwhile
    for pid in [pid for launcher in running for pid in workers_of(launcher)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for launcher in running:
        launcher.kill()
        launcher.wait()
