"""Two hosts under `scripts.launch --nnodes=1:2`: one is cut off and returns, dies and is started anew; nobody helps.

The hosts are network namespaces joined by a cable of their own (dev/two_hosts.py). While host 1 is away, host 0 goes
on alone from the last save; the end is the undisturbed run's.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from dev.two_hosts import NoHosts, TwoHosts
from nanochat.checkpoint_manager import open_checkpoint, run_dir
from nanochat.runtime import Runtime

ROOT = Path(__file__).parent.parent
STEPS = 60
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
    "--model-tag=net",
    "--resume",
    "--lr-scale=0.1",
    "--weight-decay=0",
    "--timeout=2",
    f"--num-iterations={STEPS}",
]
# As in the recipes but for the figures: a host counts as dead after 3 s, and a start waits 1 s for more hosts.
LAUNCHER = [
    sys.executable,
    "-m",
    "scripts.launch",
    "--nnodes=1:2",
    "--nproc_per_node=1",
    "--max-restarts=3",
    "--rdzv-backend=c10d",
    "--rdzv-id=net",
    f"--rdzv-endpoint={TwoHosts.addresses[0]}:29500",
    "--monitor-interval=0.1",
]
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


class Run:
    """The run on both hosts, which stands still where it is bid to, and what each host said."""

    def __init__(self, hosts: TwoHosts, base: Path, bids: list[str]) -> None:
        self.hosts, self.base, self.folder = hosts, base, run_dir(base, "base", "net")
        for name in ("hold", "held"):
            (base / name).mkdir()
        for bid in bids:
            (base / "hold" / bid).touch()
        self.launchers = [self.launch(0), self.launch(1)]

    def launch(self, host: int) -> "subprocess.Popen[bytes]":
        # Both hosts bear this machine's name, so which of them keeps the store must be said.
        where = [
            f"--local-addr={TwoHosts.addresses[host]}",
            f"--rdzv-conf={QUICK},is_host={int(host == 0)}",
            f"--log-dir={self.base / 'launcher'}",
        ]
        command = [*LAUNCHER, *where, str(ROOT / "tests" / "held_train.py"), *FLAGS, f"--data={self.base}/text.jsonl"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "NANOCHAT_BASE_DIR": str(self.base),
            "NANOCHAT_DTYPE": "float32",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.base / f"host{host}.log", "ab") as output:
            return self.hosts.popen(host, command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def said(self, host: int) -> str:
        return (self.base / f"host{host}.log").read_text()

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            if self.launchers[1].poll() == 75:  # the network was away for too long: as its supervisor would
                self.launchers[1] = self.launch(1)
            assert time.monotonic() < deadline, f"not within three minutes: {what}\n{self.said(0)}\n{self.said(1)}"
            time.sleep(0.02)

    def wait_for(self, bid: str) -> None:
        self.wait((self.base / "held" / bid).exists, f"so many processes at that step: {bid}")

    def let_go(self, bid: str) -> None:
        (self.base / "hold" / bid).unlink()

    def kill(self, host: int) -> None:
        """All of a host's processes at once, as a power cut would."""
        launcher = self.launchers[host]
        with suppress(OSError):
            os.kill(launcher.pid, signal.SIGSTOP)  # it shall not start others meanwhile
            for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        launcher.kill()
        launcher.wait()


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as made:
            yield made
    except NoHosts as error:
        pytest.skip(f"this machine lets nobody make network namespaces: {error}")


def undisturbed(runtime: Runtime, base: str) -> None:
    from scripts import base_train

    os.environ |= {"NANOCHAT_BASE_DIR": base, "NANOCHAT_DTYPE": "float32"}
    assert base_train.main([*FLAGS, f"--data={base}/text.jsonl"]) == 0


def result(base: Path) -> tuple[list[float], dict[str, Any]]:
    """Losses by step, all of them there, and the final weights."""
    lines = [json.loads(line) for line in (run_dir(base, "base", "net") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines], open_checkpoint(run_dir(base, "base", "net"), STEPS).model_state()


def test_a_host_that_is_cut_off_or_dies_and_returns(hosts: TwoHosts, copied: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(copied, straight)
    run = Run(hosts, copied, ["2-22", "1-31", "2-42", "1-47"])
    try:
        run.wait_for("2-22")
        run.wait((run.folder / "000020" / "manifest.json").exists, "step 20 is saved")
        hosts.link(1, "down")
        run.let_go("2-22")
        run.wait_for("1-31")
        ended = re.search(r"error: rank 1: (\w+) .*failed", run.said(0))
        assert ended and ended[1] in ("summing", "counting", "gathering"), run.said(0)
        assert "resumed at step 20 " in run.said(0)
        assert run.launchers[1].poll() in (None, 75)  # it waits for the network, for a time
        hosts.link(1, "up")
        run.wait_for("2-42")  # host 0 was told to stop before its next step, which it finished
        assert "resumed at step 32 " in run.said(1), "rank 0 is on host 1 again"
        hosts.link(1, "down")  # nobody hears that it dies
        run.kill(1)
        run.let_go("2-42")
        run.wait_for("1-47")
        hosts.link(1, "up")
        run.launchers[1] = run.launch(1)
        run.wait(lambda: all(t.poll() is not None for t in run.launchers), "the end")
        assert [t.returncode for t in run.launchers] == [0, 0], run.said(0) + run.said(1)
    finally:
        run.kill(0)
        run.kill(1)
    run_ranks(2, undisturbed, str(straight))
    (losses, weights), (wanted_losses, wanted) = result(copied), result(straight)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    off = math.hypot(*(float((weights[name] - tensor).norm()) for name, tensor in wanted.items()))
    assert off <= 1e-5 * math.hypot(*(float(tensor.norm()) for tensor in wanted.values()))
