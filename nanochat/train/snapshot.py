"""Saving while training goes on: a copy in host memory, written by a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.cpu import kernels
from nanochat.distributed.collectives import BackgroundGroup
from nanochat.runtime import Runtime, rng_state
from nanochat.trainer import Trainer


class Saver:
    """A trainer's `save`: copies everything that is needed to go on exactly from here, and returns the writing of it.

    All ranks make one and call it at the same steps. It holds no more than one copy, as the trainer starts no write
    before the last one has ended.
    """

    def __init__(self, run: Path, runtime: Runtime, tokenizer: Any, meta: dict[str, Any], keep_last: int) -> None:
        self.run, self.tokenizer, self.meta, self.keep_last = run, tokenizer, meta, keep_last
        self.group = BackgroundGroup(runtime.rank, runtime.world_size, runtime.timeout_seconds)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="save")

    def __call__(self, trainer: Trainer) -> Future[Path]:
        """Copy now, write meanwhile. The future raises OSError as save_checkpoint does."""
        names = {p: name for name, p in trainer.model.named_parameters()}
        tensors, steps = trainer.optimizer.named_state(names)
        meta = {
            **self.meta,
            "progress": asdict(trainer.progress),
            "runtime": numeric_settings(trainer),
            "plan": {**self.meta["plan"], "num_steps": trainer.schedule.num_steps},
        }
        return self.thread.submit(
            partial(
                save_checkpoint,
                self.run,
                trainer.progress.step,
                model_state=host_copy(trainer.model.state_dict()) if self.group.rank == 0 else {},
                meta=meta,
                tokenizer=self.tokenizer,
                optimizer_state=(host_copy(tensors), steps),
                loader_state=trainer.loader.state_dict(),  # type: ignore[attr-defined]
                rng_state=rng_state(trainer.runtime.device),
                keep_last=self.keep_last,
                group=self.group,
            )
        )

    def close(self) -> None:
        """Wait for the thread."""
        self.thread.shutdown()


def host_copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the CPU's memory, which training does not touch."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def numeric_settings(trainer: Trainer) -> dict[str, Any]:
    """What the same batch needs to give the same bits."""
    return {
        "device_batch_size": trainer.device_batch_size,
        "num_threads": torch.get_num_threads(),
        "dtype": str(trainer.model.compute_dtype).removeprefix("torch."),
        "device": trainer.runtime.device.type,
        "kernels": kernels.in_use(trainer.runtime.device),
        "world_size": trainer.runtime.world_size,
    }
