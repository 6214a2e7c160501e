"""How many rows a micro-batch may have on a GPU, found out by trying; and batches of noise, for that and for timing."""

from functools import partial

import torch

from nanochat.dataloader import Batch
from nanochat.runtime import Runtime
from nanochat.train.session import find_device_batch
from nanochat.trainer import Trainer


def random_batch(rows: int, T: int, vocab_size: int, runtime: Runtime, supervised: float = 1.0) -> Batch:
    """This process's share of a global batch of noise, for timing; every 1/supervised-th position has a target."""
    own = len(range(runtime.rank, rows, runtime.world_size))
    tokens = torch.randint(vocab_size, (own, T + 1), generator=torch.Generator().manual_seed(runtime.seed))
    targets = torch.full((own, T), -1)
    every = round(1 / supervised)
    targets[:, ::every] = tokens[:, 1::every]
    return Batch(tokens[:, :-1].contiguous(), targets, None, "timing")


def fit_device_batch(trainer: Trainer, given: int, T: int) -> None:
    """On a GPU, unless the user gave a number: as many rows of T tokens per micro-batch as its memory holds."""
    if given > 0 or trainer.runtime.device.type != "cuda":
        return
    wished = trainer.device_batch_size
    trainer.device_batch_size = find_device_batch(partial(try_micro_batches, trainer, T=T), wished, trainer.runtime)
    if trainer.device_batch_size < wished:
        trainer.runtime.print0(f"{wished} rows do not fit in memory: {trainer.device_batch_size} per micro-batch")


def try_micro_batches(trainer: Trainer, rows: int, T: int) -> None:
    """Two micro-batches of noise, the second one beside the first one's gradients, with the optimizer's state to come.

    Raises OutOfMemoryError where that is too much. What it compiles is what the run needs.
    """
    runtime, state = trainer.runtime, {"adamw": 8, "muon": 4}  # bytes a parameter: two fp32 moments, or one
    torch.cuda.empty_cache()  # of what a larger trial left behind
    trainer.device_batch_size = rows
    size = sum(p.numel() * state[g["kind"]] for g in trainer.optimizer.param_groups for p in g["params"])
    size //= runtime.world_size  # shared out
    room = torch.empty(size, dtype=torch.uint8, device=runtime.device)
    batch = random_batch(2 * rows * runtime.world_size, T, trainer.model.config.vocab_size, runtime)
    try:
        for micro in trainer.micro_batches(batch):
            trainer.add_gradients(*micro, num_targets=2 * rows * T)
    finally:
        trainer.model.zero_grad(set_to_none=True)
    del room  # held until here
