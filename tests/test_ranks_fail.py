"""Failures on one rank only: all ranks stop, or all continue, and the message names the rank."""

import contextlib
import io
import math
import os
import re
import resource
import sys
import time
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import join_group, run_ranks
from toy_training import CONFIG, RandomBatches

from nanochat.checkpoint import folder, saving, tensor_file
from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.dataloader import Batch
from nanochat.distributed.collectives import BackgroundGroup
from nanochat.distributed.rank_checks import NonFiniteLoss, RanksDiverged
from nanochat.gpt import GPT
from nanochat.optim import DistMuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.run import run_to_end
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.snapshot import take_snapshot
from nanochat.train.step import TrainStep
from nanochat.trainer import Trainer


class Rows(RandomBatches):
    """A rank's rows of the global batches, and a state that a checkpoint can hold."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def next_batch(self) -> Batch:
        whole, own = super().next_batch(), slice(self.runtime.rank, None, self.runtime.world_size)
        return Batch(whole.inputs[own], whole.targets[own], None, f"{whole.origin} of rank {self.runtime.rank}")

    def state_dict(self) -> dict[str, Any]:
        return {f"served{self.runtime.rank}": torch.tensor(self.served).numpy()}


def make_trainer(runtime: Runtime, steps: int) -> Trainer:
    model = GPT.create(CONFIG, seed=1)
    groups = build_param_groups(model, OptimizerConfig(), lr_scale=0.2, ns_dtype=torch.float32)
    step = TrainStep(model, DistMuonAdamW(groups), runtime, ScheduleConfig(steps), 6, model.loss)
    return Trainer(step, Rows(runtime))


def diverge(runtime: Runtime) -> str:
    trainer = make_trainer(runtime, 9)
    trainer.compare_every = 2

    def change_a_weight(t: Trainer, record: Any) -> None:
        if record["step"] == 3 and runtime.rank == 1:  # in a small tensor, which every rank updates by itself
            t.model.x0_lambdas.data[0] *= 1 + 1e-6

    trainer.log = change_a_weight
    with pytest.raises(RanksDiverged) as caught:
        trainer.run()
    assert trainer.progress.step == 4
    return str(caught.value)


def test_a_rank_whose_weights_diverge_stops_the_run() -> None:
    messages = run_ranks(3, diverge)
    assert len(set(messages)) == 1 and re.search(r"rank 1\b.*step 4\b", messages[0]), messages


def poison(runtime: Runtime) -> str:
    trainer = make_trainer(runtime, 9)
    loss = trainer.model.loss

    def loss_fn(*args: Any) -> Any:
        summed, count = loss(*args)
        return summed * (math.nan if runtime.rank == 1 and trainer.progress.step == 2 else 1), count

    trainer.step.loss_fn = loss_fn
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.run()
    return str(caught.value)


def test_a_non_finite_loss_names_step_rank_and_data() -> None:
    messages = run_ranks(2, poison)
    assert messages[0] == messages[1], messages
    assert re.search(r"nan\b.*step 2\b.*rank 1: batch 3 of rank 1", messages[0]), messages


class Storage:
    """Faults of a run's folder, on one rank or, for `replace`, on all. Each method breaks it, or repairs it again."""

    def __init__(self, run: Path) -> None:
        self.run, self.aside = run, run.with_name("aside")

    def limit(self, broken: bool) -> None:
        """Files of more than 100 bytes fail in this process, as with a quota or a full disk."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if broken else hard, hard))

    def unmount(self, broken: bool) -> None:
        """The folder does not exist for this process."""
        real = folder.step_path
        elsewhere = lambda run, *rest: real(run.with_name("unmounted"), *rest)  # noqa: E731
        saving.step_path = elsewhere if broken else real

    def refuse(self, broken: bool) -> None:
        """This process may not write there. (Simulated, because permissions do not bind root.)"""

        def write_file(path: Path, chunks: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        saving.write_file = write_file if broken else tensor_file.write_file

    def replace(self, broken: bool) -> None:
        """The folder has been replaced by a file."""
        if broken:
            self.run.rename(self.aside)
            self.run.touch()
        else:
            self.run.unlink()
            self.aside.rename(self.run)


def train_tokenizer(folder: Path) -> str:
    """Train a tokenizer; returns its folder."""
    own = folder / "tokenizer"
    own.mkdir()
    RustBPETokenizer.train_from_iterator(["the quick brown fox " * 20] * 4, 270).save(own)
    return str(own)


def save_every_other_step(trainer: Trainer, run: Path, tokenizer: str, keep_last: int) -> None:
    trainer.snapshot = partial(
        take_snapshot,
        run=run,
        tokenizer=RustBPETokenizer.from_directory(Path(tokenizer)),
        meta={"model_config": CONFIG.to_dict(), "plan": {"planned_steps": 10, "total_batch_tokens": 48}},
        keep_last=keep_last,
        group=BackgroundGroup(trainer.runtime.rank, trainer.runtime.world_size),
    )
    trainer.save_every = 2


def save_through(runtime: Runtime, run: str, tokenizer: str, fault: str, bad_rank: int, repaired: bool) -> Any:
    """Save at every other step of ten; the storage breaks before the second save, and is repaired before the third."""
    trainer, storage = make_trainer(runtime, 10), Storage(Path(run))
    save_every_other_step(trainer, Path(run), tokenizer, keep_last=1)
    saved: list[int | None] = []

    def log(t: Trainer, record: Any) -> None:
        saved.append(t.saver.last_step)
        if record["step"] == 3 or (record["step"] == 6 and repaired):
            if t.saver.writing:  # let the write before the fault, or the one it affects, end first
                wait([t.saver.writing[1]])
            runtime.barrier("test")
            if runtime.rank == bad_rank:
                getattr(storage, fault)(record["step"] == 3)
            runtime.barrier("test")

    trainer.log = log
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run_to_end(trainer, Path(run), lambda: "again")
    trainer.saver.close()
    if runtime.rank == bad_rank and not repaired:
        getattr(storage, fault)(False)
    return stderr.getvalue(), (code, trainer.progress.step, saved[-1], trainer.saver.last_step)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on files")
@pytest.mark.parametrize(
    ("fault", "bad_rank", "repaired", "reason"),
    [
        ("limit", 0, True, "File too large"),
        ("limit", 1, True, "rank 1: .*File too large"),
        ("limit", 1, False, "rank 1: .*File too large"),
        ("unmount", 1, True, "rank 1: .*No such file"),
        ("refuse", 1, True, "rank 1: .*Permission denied"),
        ("replace", 0, True, "File exists|Not a directory"),
        ("replace", 0, False, "File exists|Not a directory"),
    ],
)
def test_storage_that_fails_on_one_rank_fails_the_save_on_all(
    fault: str, bad_rank: int, repaired: bool, reason: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = run_ranks(2, save_through, str(run), train_tokenizer(tmp_path), fault, bad_rank, repaired)
    (stderr, _), results = both[0], [result for _, result in both]
    assert re.search(f"warning: .*step 4: .*({reason}).* step 2", stderr), stderr
    if repaired:
        assert results == [(0, 10, 6, 10)] * 2 and list_steps(run) == [10]
        served = {k: int(v) for k, v in open_checkpoint(run).loader_state().items()}
        assert served == {"served0": 10, "served1": 10}
    else:  # the run ends with an error, and the earlier step is still good
        assert results == [(1, 10, 2, 2)] * 2 and list_steps(run) == [2]
        assert re.search(f"error: .*step 10: .*({reason}).* step 2", stderr), stderr
        served = {k: int(v) for k, v in open_checkpoint(run).loader_state().items()}
        assert served == {"served0": 2, "served1": 2} and not list(run.glob(".*.new"))


@pytest.mark.parametrize("missing", ["optimizer-00002-of-00002.safetensors", "loader-00001-of-00002.safetensors"])
def test_a_step_that_lacks_a_share_is_skipped(missing: str, tmp_path: Path) -> None:
    run_ranks(2, save_twice, str(tmp_path / "run"), train_tokenizer(tmp_path))
    assert list_steps(tmp_path / "run") == [2, 4]
    (tmp_path / "run" / "000004" / missing).unlink()
    assert open_checkpoint(tmp_path / "run").step == 2


def save_twice(runtime: Runtime, folder: str, tokenizer: str) -> None:
    trainer = make_trainer(runtime, 4)
    save_every_other_step(trainer, Path(folder), tokenizer, keep_last=0)
    trainer.run()
    trainer.saver.close()


def join_at_the_second_attempt(rank: int, world_size: int, store: Path, timeout: float) -> None:
    if rank == 1 and not (failed := Path(os.environ["FAILED"])).exists():
        failed.touch()
        raise RuntimeError("connection closed by peer")
    join_group(rank, world_size, store, timeout)


def test_ranks_whose_group_was_not_formed_start_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILED", str(tmp_path / "failed"))
    began = time.monotonic()
    assert run_ranks(2, os_rank, join=join_at_the_second_attempt) == ["0", "1"]
    assert time.monotonic() - began < 30  # rank 0 was not waited for until its timeout
    monkeypatch.setenv("FAILED", str(tmp_path / "no folder" / "failed"))
    with pytest.raises(AssertionError, match=r"(?s)rank 1.*FileNotFoundError"):
        run_ranks(2, os_rank, join=join_at_the_second_attempt)


def os_rank(runtime: Runtime) -> str:
    return os.environ["RANK"]


def leave(runtime: Runtime) -> None:
    os._exit(1)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 0 of 1 died"):
        run_ranks(1, leave)
