"""runs/slurm.sh, ssh.sh and sky.yaml start the same launcher on every machine; stand-ins record its arguments."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nanochat.scaling import make_plan, scaling_params
from nanochat.train.pretraining import PretrainConfig, plan_arguments
from scripts import _cli

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
    depth = next(i for i, word in enumerate(WANTED) if word.startswith("--depth"))
    assert launched(said.splitlines()) == [*WANTED[:depth], "--data=climbmix", *WANTED[depth:]]


def test_runcpu_reads_minutes_and_folders_as_they_are_written(tmp_path: Path) -> None:
    """Minutes with leading zeros; and a run that was begun in a folder with brackets keeps its own minutes."""
    record = f'[[ "$2" = print* ]] && exec {sys.executable} "$@"; echo "$*" >> {tmp_path}/commands'
    program(tmp_path / ".venv" / "bin" / "python", record)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    shutil.copytree(RUNS, tmp_path / "runs")
    base = tmp_path / "models [old]"
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}

    def minutes(flag: str) -> str:
        command = ["bash", tmp_path / "runs" / "runcpu.sh", flag]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return (base / ".done" / "minutes").read_text().strip()

    assert minutes("--minutes=010") == "10.0"
    assert "--minutes=3.6" in (tmp_path / "commands").read_text()
    assert minutes("--minutes=20") == "20.0", "nothing was saved"
    (base / "base_checkpoints" / "cpu" / "000500").mkdir(parents=True)
    assert minutes("--minutes=40") == "20.0"


@pytest.mark.parametrize(
    ("script", "preset", "depths"),
    [
        ("speedrun.sh", "", {24}),
        ("miniseries.sh", "h100", set(range(10, 21))),
        ("miniseries.sh", "cpu", {1, 2, 3}),
        ("scaling_laws.sh", "h100", set(range(8, 21, 2))),
        ("scaling_laws.sh", "cpu", {1, 2, 3, 4, 5}),
    ],
)
def test_every_command_of_a_script_parses_and_plans(tmp_path: Path, script: str, preset: str, depths: set[int]) -> None:
    """Stand-ins record the commands. One recipe for all sizes of a study, the field's where the field trains; and the
    text is downloaded to the folder where the runs look for it."""
    record = f'echo "$NANOCHAT_BASE_DIR|$(basename "$0") $*" >> {tmp_path}/commands'
    for name in ("python", "torchrun"):
        program(tmp_path / ".venv" / "bin" / name, record)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/.venv/bin:$PATH\n")
    shutil.copytree(RUNS, tmp_path / "runs")
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    command = ["bash", tmp_path / "runs" / script, *preset.split()]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    folders, commands = zip(*(line.split("|") for line in (tmp_path / "commands").read_text().splitlines()))
    assert len({folder for folder, words in zip(folders, commands) if "pip" not in words}) == 1
    assert (preset == "cpu") != any("nanochat.dataset --set climbmix" in words for words in commands)
    configs = [
        _cli.parse(PretrainConfig, shlex.split(words.partition("scripts.base_train")[2]))
        for words in commands
        if "scripts.base_train" in words
    ]
    plans = [make_plan(c.network(32768)(c.depth), **plan_arguments(c, c.recipe)) for c in configs]
    assert {config.depth for config in configs} == depths and all(plan.num_steps > 10 for plan in plans)
    assert {config.data for config in configs} == {"starter" if preset == "cpu" else "climbmix"}
    assert {config.recipe for config in configs} == {"small" if preset == "cpu" else "later"}
    if script == "speedrun.sh":  # the published run: tokens of ratio 8, batch and rates of the later recipe
        (config,), (plan,) = configs, plans
        assert config.fp8 and plan.total_batch_tokens == 2**20 and plan.lr_scale == pytest.approx(2**0.5)
        assert plan.tokens == pytest.approx(8 * scaling_params(plan.params), rel=0.001)


def test_every_script_is_valid_bash() -> None:
    for path in RUNS.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)
