"""Runs under the launcher in which a rank dies or hangs, or that get a stop signal."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from dev.launched import ONE_HOST, ROOT, environment, launch_command, metrics, run_folder, workers_of
from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.distributed.collectives import CollectiveFailed
from nanochat.runtime import Runtime


def launch(base: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        launch_command(base, ONE_HOST, flags),
        cwd=ROOT,
        env=environment(base),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(base: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(metrics(base)) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if process.poll() is not None or len(metrics(base)) < step:
        process.kill()  # communicate() would wait until the run ends
        pytest.fail(process.communicate()[0])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_after_a_rank_is_killed_the_run_continues_to_its_end(copied: Path) -> None:
    with launch(copied, "--num-iterations=100") as process:
        wait_for_step(copied, 20, process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resumed at step" in output
    assert open_checkpoint(run_folder(copied)).step == 100
    assert [line["step"] for line in metrics(copied)] == list(range(1, 101))


@pytest.mark.parametrize(("name", "to_all"), [("SIGTERM", False), ("SIGUSR1", True)])
def test_a_stop_signal_saves_and_exits_128_plus_its_number(name: str, to_all: bool, copied: Path) -> None:
    # A person signals the launcher, which forwards it; SLURM signals all processes, and the launcher forwards it too.
    signum = getattr(signal, name)
    with launch(copied, "--num-iterations=100000", "--save-every=-1") as process:
        wait_for_step(copied, 20, process)
        for pid in [process.pid, *(workers_of(process) if to_all else [])]:
            os.kill(pid, signum)
        output, _ = process.communicate(timeout=60)
    done = len(metrics(copied))
    assert list_steps(run_folder(copied)) == [done] and done >= 20, output
    assert re.search(rf"{name}: .*step {done}\b", output) and process.returncode == 128 + signum


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_ranks_whose_launcher_is_killed_save_and_exit(copied: Path) -> None:
    with launch(copied, "--num-iterations=100000", "--save-every=-1") as process:
        wait_for_step(copied, 20, process)
        process.kill()
        output, _ = process.communicate(timeout=60)  # until the last rank has closed the pipe
    done = len(metrics(copied))
    assert re.search(rf"SIGTERM: .*step {done}\b", output) and list_steps(run_folder(copied)) == [done]


def hang(runtime: Runtime, done: str) -> str:
    if runtime.rank == 1:
        while not Path(done).exists():
            time.sleep(0.01)
        return ""
    try:
        runtime.all_reduce_sum(torch.ones(1), "summing the loss")
        return "no time-out"
    except CollectiveFailed as error:
        return str(error)
    finally:
        Path(done).touch()


def test_a_collective_that_times_out_names_rank_and_operation(tmp_path: Path) -> None:
    message, _ = run_ranks(2, hang, str(tmp_path / "done"), timeout=2)
    assert message.startswith("rank 0: summing the loss failed"), message
