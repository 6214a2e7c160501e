"""What runs on several GPUs, at 2 and 4 ranks on a CPU: see claimed_gpu.py."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from claimed_gpu import ClaimGPU, pretend
from ranks import run_ranks
from stubs import TINY

from nanochat.checkpoint.runs import run_dir
from nanochat.common import UserError
from nanochat.distributed.collectives import CollectiveFailed, collective_op, start_all_gather, start_reduce_scatter
from nanochat.reporting.curves import read_metrics
from nanochat.runtime import Runtime
from nanochat.train import run
from scripts import base_train

STEPS = ["--num-iterations=4", "--save-every=2", "--eval-every=2", "--total-batch-size=64", "--compile=off"]


def train_on_gpus(rank: Runtime, base: str, flags: list[str]) -> list[str]:
    """Train with a GPU on each rank. Returns the collectives called."""
    rank.close()
    device = torch.device("cuda", rank.rank)
    calls = pretend(device, dist.FileStore(f"{base}/store{rank.world_size}", rank.world_size))
    run.reference_peak = lambda runtime: (1e12, "test")
    with ClaimGPU(device):
        assert base_train.main(flags) == 0
    assert not dist.is_initialized()
    return calls


def test_a_run_on_gpus_trains_as_on_a_cpu(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 2 GPUs, and from the second step on 4."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    flags = [*TINY, *STEPS, f"--data={copied / 'text.jsonl'}"]
    assert base_train.main([*flags, "--model-tag=cpu"]) == 0
    flags += ["--model-tag=gpu", "--device-type=cuda"]
    for ranks in (
        run_ranks(2, train_on_gpus, str(copied), flags),
        run_ranks(4, train_on_gpus, str(copied), [*flags, "--resume-from-step=2"]),
    ):
        assert all(calls == ranks[0] for calls in ranks)
        assert any("reduce_scatter" in name for name in ranks[0]) and "all_to_all_single" not in ranks[0]
    wanted, found = (read_metrics(run_dir(copied, "base", tag) / "metrics.jsonl") for tag in ("cpu", "gpu"))
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for before, after in zip(wanted, found):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)


@pytest.mark.parametrize("renamed", [True, False])
def test_collectives_have_other_names_before_torch_2_12(renamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"reduce_scatter_single": "reduce_scatter_tensor", "all_gather_single": "all_gather_into_tensor"}
    calls: list[str] = []
    for new, old in names.items():
        monkeypatch.delattr(dist, old if renamed else new, raising=False)
        name = new if renamed else old
        monkeypatch.setattr(dist, name, lambda *args, name=name, **kwargs: calls.append(name), raising=False)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    share = start_reduce_scatter(torch.zeros(6), "summing").output
    start_all_gather(share, torch.zeros(6), "gathering")
    assert share.shape == (3,) and calls == list(names if renamed else names.values())


def join(rank: Runtime, folder: str, settings: list[tuple[str, str]]) -> str:
    """The error of a rank that joins with its (device type, dtype)."""
    rank.close()
    device_type, dtype = settings[rank.rank]
    pretend(torch.device("cuda", rank.rank), dist.FileStore(f"{folder}/store", rank.world_size))
    with pytest.raises(UserError) as caught:
        Runtime.create(device_type, dtype)
    return str(caught.value)


def test_ranks_with_different_devices_or_number_formats_do_not_start(tmp_path: Path) -> None:
    settings = [("cuda", "bfloat16"), ("cuda", "bfloat16"), ("cuda", "float16"), ("cpu", "bfloat16")]
    errors = run_ranks(4, join, str(tmp_path), settings)
    assert len(set(errors)) == 1
    assert re.search(r"rank 0 .*cuda/bfloat16.* rank 2 .*cuda/float16.*NANOCHAT_DTYPE", errors[0])


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "6"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        Runtime.create("cuda")


@pytest.mark.parametrize(("device", "failure", "left"), [("cuda", None, 1), ("cuda", OSError, 0), ("cpu", OSError, 1)])
def test_after_a_failure_nccl_is_not_waited_for(
    device: str, failure: type[Exception] | None, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))
    with suppress(OSError), Runtime(torch.device(device), torch.float32, "", 0, world_size=2):
        if failure:
            raise failure
    assert len(calls) == left


NCCL_ERROR = """NCCL error in: ProcessGroupNCCL.cpp:3720, unhandled system error, NCCL version 2.29.7
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
Error while creating shared memory segment /dev/shm/nccl-x, error: No space left on device (28)
"""


def test_a_failed_collective_names_its_cause() -> None:
    cause = r"rank 3: summing .*unhandled system error.*No space left on device"
    with pytest.raises(CollectiveFailed, match=cause), collective_op("summing", 3):
        raise dist.DistBackendError(NCCL_ERROR)
    for own in (torch.OutOfMemoryError, torch.AcceleratorError):  # not another rank's fault
        with pytest.raises(own), collective_op("summing", 3):
            raise own("CUDA error")
