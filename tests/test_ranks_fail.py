"""What goes wrong on one process only: all stop, or all go on, and the message names the rank."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_trainer import CONFIG, Batches

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import list_steps, open_checkpoint
from nanochat.dataloader import Batch
from nanochat.gpt import GPT
from nanochat.optim import DistMuonAdamW, OptimizerConfig, build_param_groups
from nanochat.runtime import Runtime
from nanochat.saver import Saver
from nanochat.schedules import ScheduleConfig
from nanochat.tokenizer import RustBPETokenizer
from nanochat.trainer import Drifted, NonFiniteLoss, Trainer


class Rows(Batches):
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
    return Trainer(model, DistMuonAdamW(groups), Rows(runtime), runtime, ScheduleConfig(steps), 6)


def drift(runtime: Runtime) -> str:
    trainer = make_trainer(runtime, 9)
    trainer.compare_every = 2

    def disturb(t: Trainer, record: Any) -> None:
        if record["step"] == 3 and runtime.rank == 1:  # of a tensor that every rank updates for itself
            t.model.x0_lambdas.data[0] *= 1 + 1e-6

    trainer.log = disturb
    try:
        trainer.run()
    except Drifted as error:
        return f"{trainer.progress.step} {error}"
    return "ran on"


def test_a_rank_that_drifts_stops_the_run() -> None:
    said = run_ranks(3, drift)
    assert len(set(said)) == 1 and said[0].startswith("4 the weights of rank 1 are not the others' after step 4"), said


def poison(runtime: Runtime) -> str:
    trainer = make_trainer(runtime, 9)
    loss = trainer.model.loss

    def loss_fn(*args: Any) -> Any:
        summed, count = loss(*args)
        return summed * (math.nan if runtime.rank == 1 and trainer.progress.step == 2 else 1), count

    trainer.loss_fn = loss_fn
    try:
        trainer.run()
    except NonFiniteLoss as error:
        return str(error)
    return "ran on"


def test_a_loss_that_is_no_number_names_step_rank_and_data() -> None:
    said = run_ranks(2, poison)
    assert said[0] == said[1], said
    assert said[0] == "loss is nan at step 2 on rank 1: batch 3 of rank 1; no checkpoint yet"


def save_on_a_full_disk(runtime: Runtime, folder: str, tokenizer: str) -> Any:
    trainer = make_trainer(runtime, 6)
    real = checkpoint_manager.write_file

    def write_file(path: Path, chunks: Any) -> Any:
        if runtime.rank == 1 and "000004" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, chunks)

    checkpoint_manager.write_file = write_file
    meta = {"model_config": CONFIG.to_dict(), "plan": {}}
    saver = Saver(Path(folder), runtime, RustBPETokenizer.from_directory(Path(tokenizer)), meta, keep_last=1)
    trainer.save, trainer.save_every = saver, 2
    saved_after: list[int | None] = []
    trainer.log = lambda t, record: saved_after.append(t.last_saved_step)
    trainer.run()
    saver.close()
    return trainer.progress.step, saved_after[-1], trainer.last_saved_step


def test_a_disk_that_is_full_on_one_rank_costs_all_of_them_one_save(tmp_path: Path) -> None:
    tokenizer = RustBPETokenizer.train_from_iterator(["the quick brown fox " * 20] * 4, 270)
    os.mkdir(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")
    answers = run_ranks(2, save_on_a_full_disk, str(tmp_path / "run"), str(tmp_path / "tokenizer"))
    assert answers == [(6, 2, 6)] * 2  # step 4 failed on both, the last one succeeded
    assert list_steps(tmp_path / "run") == [6]
    checkpoint = open_checkpoint(tmp_path / "run")
    assert {k: int(v) for k, v in checkpoint.loader_state().items()} == {"served0": 6, "served1": 6}


@pytest.mark.parametrize("missing", ["optimizer-00002-of-00002.safetensors", "loader-00001-of-00002.safetensors"])
def test_a_step_that_lacks_a_share_is_skipped(missing: str, tmp_path: Path) -> None:
    tokenizer = RustBPETokenizer.train_from_iterator(["the quick brown fox " * 20] * 4, 270)
    os.mkdir(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")
    run_ranks(2, save_twice, str(tmp_path / "run"), str(tmp_path / "tokenizer"))
    assert list_steps(tmp_path / "run") == [2, 4]
    (tmp_path / "run" / "000004" / missing).unlink()
    assert open_checkpoint(tmp_path / "run").step == 2


def save_twice(runtime: Runtime, folder: str, tokenizer: str) -> None:
    trainer = make_trainer(runtime, 4)
    meta = {"model_config": CONFIG.to_dict(), "plan": {}}
    trainer.save = Saver(Path(folder), runtime, RustBPETokenizer.from_directory(Path(tokenizer)), meta, keep_last=0)
    trainer.save_every = 2
    trainer.run()
    trainer.save.close()
