"""The complete state of a training run: copied for a save, put back for a resume."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint.saving import save_checkpoint
from nanochat.checkpoint_manager import Checkpoint, load_model_state
from nanochat.common import UserError, first_line, format_count, warn
from nanochat.common.files import check_value
from nanochat.cpu import kernels
from nanochat.distributed.collectives import BackgroundGroup
from nanochat.optimizer.update_rules import optimizer_bytes
from nanochat.train.config import TrainConfig
from nanochat.train.progress import Progress
from nanochat.trainer import Trainer


def take_snapshot(
    trainer: Trainer, *, run: Path, tokenizer: Any, meta: dict[str, Any], keep_last: int, group: BackgroundGroup
) -> Callable[[], Path]:
    """Copy everything that is needed to continue exactly from here; returns the function that writes the copy.

    That function is collective (see save_checkpoint) and may run in another thread while training goes on. Only rank 0
    copies the model; every rank copies its own share of the optimizer's and the loader's state.
    """
    names = {p: name for name, p in trainer.model.named_parameters()}
    tensors, steps = trainer.step.optimizer.named_state(names)
    return partial(
        save_checkpoint,
        run,
        trainer.progress.step,
        model_state=host_copy(trainer.model.state_dict()) if group.rank == 0 else {},
        meta={
            **meta,
            "progress": asdict(trainer.progress),
            "runtime": numeric_settings(trainer),
            "plan": {**meta["plan"], "num_steps": trainer.schedule.num_steps},
        },
        tokenizer=tokenizer,
        optimizer_state=(host_copy(tensors), steps),
        loader_state=trainer.loader.state_dict(),
        rng_state=rng_state(trainer.runtime.device),
        keep_last=keep_last,
        group=group,
    )


def check_disk(trainer: Trainer, folder: Path, config: TrainConfig) -> None:
    """Raise UserError if the disk of `folder` has no room for one checkpoint; warn if not for all. Collective."""
    weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    needed = weights + optimizer_bytes(trainer.step.optimizer.param_groups)
    saves = trainer.schedule.num_steps // config.save_every if config.save_every > 0 else 1
    at_once = min(saves, config.keep_last + 1) if config.keep_last > 0 else saves  # the next is written before one goes

    def check() -> None:
        free = shutil.disk_usage(folder).free
        room = f"{format_count(free)}B are free on the disk of {folder}, and a checkpoint takes {format_count(needed)}B"
        if free < needed:
            raise UserError(f"{room}: free some space, or set NANOCHAT_BASE_DIR to another disk")
        if free < at_once * needed:
            warn(f"{room}: {at_once} at a time, by --save-every and --keep-last, do not fit")

    trainer.runtime.broadcast(check, "checking the disk")


def host_copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def restore_trainer(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a fresh trainer into the saved state, at any world size. Prints what keeps the numbers from matching exactly.

    Every rank reads the same checkpoint and keeps its own share. The device batch stays the trainer's.
    """
    device = trainer.runtime.device
    load_model_state(trainer.model, checkpoint.model_state(device), checkpoint.path)
    where = checkpoint.path / "meta.json"
    progress: Progress = check_value(checkpoint.meta["progress"], where, Progress, extra="forbid")
    if progress.step != checkpoint.step:
        raise UserError(f"{where} is damaged: its progress is of step {progress.step}; choose another step")
    names = {p: name for name, p in trainer.model.named_parameters()}
    trainer.step.optimizer.load_named_state(names, *checkpoint.optimizer_state())
    with readable(checkpoint.path):
        trainer.loader.load_state_dict(checkpoint.loader_state())
        set_rng_state(checkpoint.rng_state(), device)
    trainer.step.progress = progress
    trainer.schedule.num_steps = checkpoint.meta["plan"]["num_steps"]  # a deadline may have moved it
    trainer.saver.last_step = checkpoint.step
    saved = {"world_size": 1, **checkpoint.meta["runtime"]}
    if saved["world_size"] == trainer.runtime.world_size:  # else the ranks share the cores differently
        if saved["num_threads"] != (own := torch.get_num_threads()):
            trainer.runtime.print0(
                f"{saved['num_threads']} threads instead of {own}, as in the saved run: the bits stay the same"
            )
        torch.set_num_threads(saved["num_threads"])
    current = numeric_settings(trainer)
    if saved["world_size"] != current["world_size"]:
        trainer.runtime.print0(
            f"saved at world size {saved['world_size']}, resuming at {current['world_size']}: the same batches and "
            "steps; sums may round differently"
        )
    keys = ("dtype", "device", "kernels")
    if changed := [f"{key} {saved[key]} -> {current[key]}" for key in keys if saved[key] != current[key]]:
        trainer.runtime.warn0(
            f"resuming on another setup ({', '.join(changed)}): the numbers will not match an uninterrupted run exactly"
        )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a state of other names, types or sizes raises in the block into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the state in {path} cannot be restored ({reason}); choose another step") from error


def numeric_settings(trainer: Trainer) -> dict[str, Any]:
    """The settings that decide whether the same batch gives the same bits; under CUDA --deterministic does so too."""
    return {
        "device_batch_size": trainer.step.device_batch_size,
        "num_threads": torch.get_num_threads(),
        "dtype": str(trainer.model.compute_dtype).removeprefix("torch."),
        "device": trainer.runtime.device.type,
        "kernels": kernels.in_use(trainer.runtime.device),
        "world_size": trainer.runtime.world_size,
    }


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the global torch generators, as uint8 tensors for set_rng_state."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what rng_state returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
