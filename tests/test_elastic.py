"""Runs under the launcher that lose a process, are told to stop, or hang: none of them needs a human."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks

from nanochat.checkpoint_manager import list_steps, open_checkpoint, run_dir
from nanochat.runtime import Runtime

ROOT = Path(__file__).parent.parent
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
    "--model-tag=elastic",
    "--resume",
]


def launch(base: Path, *flags: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "scripts.launch",
        "--standalone",
        "--nnodes=1",
        "--nproc_per_node=2",
        "--max-restarts=3",
        f"--log-dir={base / 'launcher'}",
        "-m",
        "scripts.base_train",
        "--",
        *FLAGS,
        f"--data={base / 'text.jsonl'}",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def steps_done(base: Path) -> int:
    path = run_dir(base, "base", "elastic") / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_step(base: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while steps_done(base) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is not None or steps_done(base) < step:
        process.kill()  # else it would be waited for to its last step
        pytest.fail(process.communicate()[0])


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The training processes below the launcher."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in listed if b"scripts.base_train" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_process_is_replaced_and_the_run_goes_on(copied: Path) -> None:
    with launch(copied, "--num-iterations=100") as process:
        wait_for_step(copied, 20, process)
        os.kill(workers(process)[1], signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "resumed at step" in said
    checkpoint = open_checkpoint(run_dir(copied, "base", "elastic"))
    lines = (run_dir(copied, "base", "elastic") / "metrics.jsonl").read_text().splitlines()
    assert checkpoint.step == 100 and [json.loads(line)["step"] for line in lines] == list(range(1, 101))


@pytest.mark.parametrize(("name", "to_all"), [("SIGTERM", False), ("SIGUSR1", True)])
def test_a_launcher_told_to_stop_saves_and_asks_to_be_started_again(name: str, to_all: bool, copied: Path) -> None:
    # A person tells the launcher, which hands it on; SLURM tells all processes, and the launcher hands it on as well.
    signum = getattr(signal, name)
    with launch(copied, "--num-iterations=100000", "--save-every=-1") as process:
        wait_for_step(copied, 20, process)
        for pid in [process.pid, *(workers(process) if to_all else [])]:
            os.kill(pid, signum)
        said, _ = process.communicate(timeout=60)
    done = steps_done(copied)
    assert list_steps(run_dir(copied, "base", "elastic")) == [done] and done >= 20, said
    assert f"{name}: stopped after step {done}" in said and process.returncode == 128 + signum


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell of a parent's death")
def test_processes_whose_launcher_is_killed_save_and_end(copied: Path) -> None:
    with launch(copied, "--num-iterations=100000", "--save-every=-1") as process:
        wait_for_step(copied, 20, process)
        process.kill()
        said, _ = process.communicate(timeout=60)  # until the last process with that pipe has ended
    assert f"SIGTERM: stopped after step {steps_done(copied)}" in said
    assert list_steps(run_dir(copied, "base", "elastic")) == [steps_done(copied)]


def hang(runtime: Runtime) -> str:
    import torch

    from nanochat.distributed.collectives import CollectiveFailed

    if runtime.rank == 1:
        time.sleep(4)
        return "slept"
    try:
        runtime.all_reduce_sum(torch.ones(1), "summing the loss")
        return "went on"
    except CollectiveFailed as error:
        return str(error)


def test_a_hung_collective_ends_and_names_rank_and_operation() -> None:
    first, _ = run_ranks(2, hang, timeout=2)
    assert first.startswith("rank 0: summing the loss failed"), first
