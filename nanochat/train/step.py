"""One optimizer step on one global batch: gradients of micro-batches, accumulated, then the update.

Each rank splits its rows into micro-batches and sums their gradients, divided by the global number of target tokens.
So the result does not depend on how the rows were split or distributed.

Shapes: B rows of a micro-batch, T tokens.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nanochat.data.batches import Batch
from nanochat.distributed.rank_checks import NonFiniteLoss, describe_non_finite_ranks
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime, to_device
from nanochat.train.progress import Progress
from nanochat.train.schedules import ScheduleConfig

Record = dict[str, Any]  # one line of metrics.jsonl
# (inputs, targets, token weights or None), each (B, T) -> (summed loss, each token's loss), as GPT.loss
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class TrainStep:
    """Trains `model` on one global batch per call."""

    model: GPT
    optimizer: MuonAdamW
    runtime: Runtime
    schedule: ScheduleConfig
    device_batch_size: int  # rows per micro-batch
    loss_fn: LossFunction  # model.loss, or its compiled form
    progress: Progress = field(default_factory=Progress)
    unread: float = 1.0  # share of the last step's rows with text of the first epoch
    positions: int = 0  # tokens that this rank computed in the last step, without those left out or cut off

    def __call__(self, batch: Batch) -> Record:
        """Take one optimizer step; returns its metrics. Raises NonFiniteLoss before anything is updated."""
        started, now = time.perf_counter(), self.progress
        loss, num_targets = self.accumulate(batch)
        multiplier = self.schedule.apply(self.optimizer.param_groups, now.step, self.unread)
        if not self.runtime.scales_loss or self.unscale_gradients():
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.runtime.synchronize()
        seconds = time.perf_counter() - started
        now.add_step(loss, num_targets, seconds)
        record: Record = {
            "step": now.step,
            "loss": loss,
            "lr_multiplier": multiplier,
            "tokens": now.tokens,
            "tokens_per_second": self.positions * self.runtime.world_size / seconds,
            "seconds": now.seconds,
        }
        return record | ({"loss_scale": now.loss_scale} if self.runtime.scales_loss else {})

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        """Add the gradients of the mean loss over the global batch's targets. Returns (that loss, number of targets).

        Raises NonFiniteLoss on all ranks, naming the data.
        """
        runtime, device = self.runtime, self.runtime.device
        counts = torch.tensor([int((batch.targets >= 0).sum()), len(batch.inputs), batch.read_before], device=device)
        num_targets, rows, read_before = runtime.all_reduce_sum(counts, "counting targets").tolist()
        num_targets, self.unread = max(num_targets, 1), 1 - read_before / max(rows, 1)
        rank_loss, self.positions = torch.zeros((), device=device), 0
        for inputs, targets, weights in self.micro_batches(batch):
            self.positions += inputs.numel()
            rank_loss += self.add_gradients(inputs, targets, weights, num_targets)
        loss = float(runtime.all_reduce_sum(rank_loss.clone(), "summing the loss")) / num_targets
        if not math.isfinite(loss):
            data = describe_non_finite_ranks(runtime, rank_loss, batch.origin)
            raise NonFiniteLoss(f"loss is {loss} at step {self.progress.step} on {data}")
        return loss, num_targets

    def add_gradients(
        self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, num_targets: int
    ) -> torch.Tensor:
        """Add a micro-batch's share of the mean loss's gradients, all inputs (B, T). Returns its summed loss, ()."""
        if not self.runtime.scales_loss:
            summed, _ = self.loss_fn(inputs, targets, weights)
            (summed / num_targets).backward()
            return summed.detach()
        # The head computes its gradients in float16 in its forward pass (loss_head.py): the scale must reach them
        # before they are rounded, and only the tokens' weights do.
        factor = self.progress.loss_scale / num_targets
        ones = torch.ones(targets.shape, device=targets.device)
        summed, _ = self.loss_fn(inputs, targets, factor * (ones if weights is None else weights))
        summed.backward()
        return summed.detach() / factor

    def unscale_gradients(self) -> bool:
        """Divide float16 gradients by the loss scale and adjust it. False if any rank's overflowed: skip the update.

        Raises NonFiniteLoss once the smallest scale still overflows. torch.amp.GradScaler does not fit: it scales the
        loss after the forward pass, and ranks do not share its overflow check.
        """
        now = self.progress
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(grads).isfinite())
        overflowed = bool(self.runtime.all_reduce_max(float(not finite), "checking for overflow"))
        if not overflowed:
            for grad in grads:
                grad /= now.loss_scale
        now.adjust_loss_scale(overflowed)
        if now.loss_scale < 1:
            raise NonFiniteLoss(f"the gradients are not finite at step {now.step}, though the loss is")
        return not overflowed

    def micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(inputs, targets, weights) of at most device_batch_size rows each, on the device."""
        put = partial(to_device, device=self.runtime.device)
        for start in range(0, batch.inputs.size(0), self.device_batch_size):
            rows = slice(start, start + self.device_batch_size)
            if batch.weights is None:
                yield put(batch.inputs[rows]), put(batch.targets[rows]), None
                continue
            weights = batch.weights[rows]
            if weights.any():  # all zero gives no gradient, as in RL when all answers to a prompt are equally good
                width = int((batch.targets[rows] >= 0).any(0).nonzero().max()) + 1  # the rest is padding
                columns = (batch.inputs[rows, :width], batch.targets[rows, :width], weights[:, :width])
                inputs, targets, weights = (put(x.contiguous()) for x in columns)
                yield inputs, targets, weights
