"""Two hosts under `scripts.launch --nnodes=1:2`: one is cut off and returns, then dies and is started again.

The hosts are network namespaces joined by a veth pair (dev/two_hosts.py). While host 1 is away, host 0 continues alone
from the last save; losses and weights at the end match the undisturbed run's.
"""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from dev.launched import FLAGS, ROOT, environment, kill, launch_command, metrics, one_of_two_hosts, run_folder
from dev.two_hosts import NoHosts, TwoHosts
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.runtime import Runtime

STEPS = 60
TRAIN = ["--lr-scale=0.1", "--weight-decay=0", "--timeout=2", f"--num-iterations={STEPS}"]


class Run:
    """The run on both hosts, which pauses at the steps in `holds` ("RANKS-STEP", see held_train.py)."""

    def __init__(self, hosts: TwoHosts, base: Path, holds: list[str]) -> None:
        self.hosts, self.base = hosts, base
        for name in ("hold", "held"):
            (base / name).mkdir()
        for name in holds:
            (base / "hold" / name).touch()
        self.launchers = [self.launch(0), self.launch(1)]

    def launch(self, host: int) -> "subprocess.Popen[bytes]":
        script = [str(ROOT / "tests" / "held_train.py")]
        command = launch_command(self.base, one_of_two_hosts(host), TRAIN, script)
        with open(self.base / f"host{host}.log", "ab") as output:
            return self.hosts.popen(host, command, env=environment(self.base), stdout=output, stderr=subprocess.STDOUT)

    def output(self, host: int) -> str:
        return (self.base / f"host{host}.log").read_text()

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            if (
                self.launchers[1].poll() == 75
            ):  # the network was cut for too long: start it again, as a supervisor would
                self.launchers[1] = self.launch(1)
            assert time.monotonic() < deadline, f"timed out: {what}\n{self.output(0)}\n{self.output(1)}"
            time.sleep(0.02)

    def wait_for(self, hold: str) -> None:
        self.wait((self.base / "held" / hold).exists, f"pausing at {hold}")

    def release(self, hold: str) -> None:
        (self.base / "hold" / hold).unlink()


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as made:
            yield made
    except NoHosts as error:
        pytest.skip(f"no network namespaces: {error}")


def undisturbed(runtime: Runtime, base: str) -> None:
    from scripts import base_train

    os.environ |= {"NANOCHAT_BASE_DIR": base, "NANOCHAT_DTYPE": "float32"}
    assert base_train.main([*FLAGS, *TRAIN, f"--data={base}/text.jsonl"]) == 0


def result(base: Path) -> tuple[list[float], dict[str, Any]]:
    """The loss of every step, and the final weights."""
    lines = metrics(base)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines], open_checkpoint(run_folder(base), STEPS).model_state()


def test_a_host_that_is_cut_off_or_dies_and_returns(hosts: TwoHosts, copied: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(copied, straight)
    run = Run(hosts, copied, ["2-22", "1-31", "2-42", "1-47"])
    try:
        run.wait_for("2-22")
        run.wait((run_folder(copied) / "000020" / "manifest.json").exists, "step 20 is saved")
        hosts.link(1, "down")
        run.release("2-22")
        run.wait_for("1-31")
        ended = re.search(r"error: rank 1: (\w+) .*failed", run.output(0))
        assert ended and ended[1] in ("summing", "counting", "gathering"), run.output(0)
        assert "resumed at step 20 " in run.output(0)
        assert run.launchers[1].poll() in (None, 75)  # it waits for the network, up to a limit
        hosts.link(1, "up")
        run.wait_for("2-42")  # host 0 was told to stop in step 32, which it finished
        assert "resumed at step 32 " in run.output(1), "rank 0 should be on host 1 again"
        hosts.link(1, "down")  # so that nothing reports its death
        kill([run.launchers[1]])
        run.release("2-42")
        run.wait_for("1-47")
        hosts.link(1, "up")
        run.launchers[1] = run.launch(1)
        run.wait(lambda: all(t.poll() is not None for t in run.launchers), "the end")
        assert [t.returncode for t in run.launchers] == [0, 0], run.output(0) + run.output(1)
    finally:
        kill(run.launchers)
    run_ranks(2, undisturbed, str(straight))
    (losses, weights), (expected_losses, expected) = result(copied), result(straight)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    difference = math.hypot(*(float((weights[name] - tensor).norm()) for name, tensor in expected.items()))
    assert difference <= 1e-5 * math.hypot(*(float(tensor.norm()) for tensor in expected.values()))
