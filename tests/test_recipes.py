"""runs/slurm.sh, ssh.sh and sky.yaml start the same launcher on every machine; stand-ins record its arguments."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

RUNS = Path(__file__).parent.parent / "runs"
WANTED = [
    "--nnodes=2",
    "--nproc_per_node=4",
    "--max-restarts=3",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=node1:29500",
    "-m",
    "scripts.base_train",
    "--",
    "--resume",
    "--depth=24",
    "--save-every=250",
]


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def launched(words: list[str]) -> list[str]:
    """What the launcher is given, but for the run's name."""
    start = words.index("scripts.launch") + 1
    return [word for word in words[start:] if not word.startswith("--rdzv-id=")]


def slurm(tmp_path: Path, srun: str) -> dict[str, str]:
    """An environment like a job's, with programs that stand in for SLURM's."""
    program(tmp_path / "bin" / "srun", srun)
    hosts = 'case "$1" in show) printf "node1\\nnode2\\n";; *) echo "scontrol $@";; esac'
    program(tmp_path / "bin" / "scontrol", hosts)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


def test_slurm(tmp_path: Path) -> None:
    environment = slurm(tmp_path, 'printf "%s\\n" "$@"')
    said = subprocess.run(
        ["bash", RUNS / "slurm.sh", *WANTED[-2:]], env=environment, check=True, capture_output=True, text=True
    ).stdout
    found = launched(said.splitlines())
    assert [word for word in found if word != "--shutdown-timeout=100"] == WANTED and "requeue" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_slurm_job_that_is_told_to_stop_goes_back_into_the_queue(tmp_path: Path) -> None:
    environment = slurm(tmp_path, 'trap "echo saved; exit 138" USR1; echo training; while :; do sleep 0.05; done')
    with subprocess.Popen(["bash", RUNS / "slurm.sh"], env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and job.stdout.readline() == "training\n"
        time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=20)
    assert said.splitlines() == ["saved", "scontrol requeue 7"] and job.returncode == 138


def test_ssh() -> None:
    environment = {**os.environ, "DRY_RUN": "1", "HOSTS": "node1 node2", "GPUS": "4"}
    said = subprocess.run(
        ["bash", RUNS / "ssh.sh", *WANTED[-2:]], env=environment, check=True, capture_output=True, text=True
    ).stdout
    lines = [shlex.split(line) for line in said.splitlines()]
    assert [line[:3] for line in lines] == [["ssh", "-tt", "node1"], ["ssh", "-tt", "node2"]]
    assert all(launched(line) == ["--nnodes=1:2", *WANTED[1:]] for line in lines)


def test_ssh_tries_a_lost_host_again_until_the_run_has_ended(tmp_path: Path) -> None:
    # node2's network fails, then the host itself; when it is back, node1 has done the rest.
    script = f"""cd {tmp_path}; echo "$2" >> tried
    case "$2-$(grep -c node2 tried)" in
        node1-*) until [ "$(grep -c node2 tried)" -ge 4 ]; do sleep 0.02; done; touch ended; exit 0;;
        node2-1) exit 75;; node2-2) exit 255;; node2-3) exit 75;;
        *) until [ -e ended ]; do sleep 0.02; done; sleep 0.2; exit 75;;
    esac"""
    program(tmp_path / "bin" / "ssh", script)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOSTS": "node1 node2",
        "PAUSE": "0.01",
    }
    assert subprocess.run(["bash", RUNS / "ssh.sh"], env=environment, timeout=20).returncode == 0
    assert sorted((tmp_path / "tried").read_text().split()) == ["node1", *["node2"] * 4]


def test_ssh_does_not_try_a_mistake_again(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "ssh", "echo tried; exit 2")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOSTS": "node1 node2"}
    done = subprocess.run(["bash", RUNS / "ssh.sh"], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stdout.splitlines() == ["tried"] * 2


def test_ssh_that_is_told_to_stop_tells_all_hosts(tmp_path: Path) -> None:
    told = 'trap "echo told; exit 1" TERM; echo training; for i in {1..400}; do sleep 0.05; done'
    program(tmp_path / "bin" / "ssh", told)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOSTS": "node1 node2"}
    with subprocess.Popen(["bash", RUNS / "ssh.sh"], env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None and [job.stdout.readline() for _ in range(2)] == ["training\n"] * 2
        time.sleep(0.1)
        job.send_signal(signal.SIGINT)
        said, _ = job.communicate(timeout=20)
    assert said.splitlines() == ["told", "told"] and job.returncode != 0


def test_sky(tmp_path: Path) -> None:
    recipe = yaml.safe_load((RUNS / "sky.yaml").read_text())
    program(tmp_path / ".venv" / "bin" / "python", 'printf "%s\\n" "$@"')
    environment = {
        **os.environ,
        **{name: str(value) for name, value in recipe["envs"].items()},
        "SKYPILOT_NODE_IPS": "node1\nnode2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    }
    said = subprocess.run(
        ["bash", "-c", recipe["run"]], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert launched(said.splitlines()) == WANTED
