"""What runs on several GPUs, at 2 and 4 ranks on a CPU: see claimed_gpu.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from claimed_gpu import ClaimGPU, pretend
from ranks import run_ranks
from stubs import TINY

from nanochat.checkpoint.runs import run_dir
from nanochat.common import UserError
from nanochat.reporting.curves import read_metrics
from nanochat.runtime import Runtime
from nanochat.train import run
from scripts import base_train

STEPS = ["--num-iterations=4", "--save-every=2", "--eval-every=2", "--total-batch-size=64", "--compile=off"]


def train_on_gpus(rank: Runtime, base: str, flags: list[str]) -> list[str]:
    """Train with a GPU on each rank, and again from the second step. Returns the collectives called."""
    rank.close()
    device = torch.device("cuda", rank.rank)
    run.measure_peak_flops = lambda runtime: 1e12
    calls = pretend(device, dist.FileStore(f"{base}/store", rank.world_size))
    for more in ([], ["--resume-from-step=2"]):
        with ClaimGPU(device):
            assert base_train.main([*flags, *more]) == 0
        assert not dist.is_initialized()
    return calls


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_run_on_gpus_trains_as_on_a_cpu(world_size: int, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    flags = [*TINY, *STEPS, f"--data={copied / 'text.jsonl'}"]
    assert base_train.main([*flags, "--model-tag=cpu"]) == 0
    ranks = run_ranks(world_size, train_on_gpus, str(copied), [*flags, "--model-tag=gpu", "--device-type=cuda"])
    assert all(calls == ranks[0] for calls in ranks)
    assert any("reduce_scatter" in name for name in ranks[0]) and "all_to_all_single" not in ranks[0]
    wanted, found = (read_metrics(run_dir(copied, "base", tag) / "metrics.jsonl") for tag in ("cpu", "gpu"))
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for before, after in zip(wanted, found):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
