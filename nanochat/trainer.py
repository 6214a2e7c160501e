"""The one training loop, for pretraining, SFT and RL alike.

A step takes one global batch, splits this process's rows into micro-batches, sums their gradients divided by the
global number of target tokens, and updates. So the result does not depend on how the rows were split or spread.
Everything else (evaluation, samples, checkpoints, metrics) watches from outside through hooks.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nanochat.checkpoint.async_save import AsyncSaver
from nanochat.common import UserError, warn
from nanochat.dataloader import Batch
from nanochat.distributed.rank_checks import (
    DataError,
    NonFiniteLoss,
    RanksDiverged,
    describe_non_finite_ranks,
    find_diverged_ranks,
    gather_failures,
    non_finite,
)
from nanochat.distributed.signals import catch_signals
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.runtime import Runtime
from nanochat.train.deadline import Deadline
from nanochat.train.progress import Progress
from nanochat.train.schedules import ScheduleConfig, decay_multiplier, lr_multiplier, muon_momentum

Record = dict[str, Any]

DATA_ERROR = 1000  # what processes tell each other beside the numbers of signals


class Loader(Protocol):
    """Where batches come from: this process's rows of each global batch, in order."""

    def next_batch(self) -> Batch: ...


class StopObserving(Exception):
    """A signal asked the run to stop while a long observer was at work."""


class Interrupted(Exception):
    """A signal asked the run to stop, and the step under way was finished first."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Hook:
    """Call `run(trainer)` after every `every`-th step, and after the last one if `at_end`.

    What it returns joins that step's metrics line. `every` < 1 means at the end only.
    """

    run: Callable[["Trainer"], Record | None]
    every: int = -1
    at_end: bool = True
    seconds: float | None = None  # what the latest one took, or what it is expected to take

    def due(self, step: int, num_steps: int) -> bool:
        return (self.every > 0 and step % self.every == 0) or (self.at_end and step == num_steps)


@dataclass
class Trainer:
    """Turns the wheel: batch, gradients, update. `device_batch_size` is in rows."""

    model: GPT
    optimizer: MuonAdamW
    loader: Loader
    runtime: Runtime
    schedule: ScheduleConfig
    device_batch_size: int
    hooks: list[Hook] = field(default_factory=list)
    log: Callable[["Trainer", Record], None] = lambda trainer, record: None
    snapshot: Callable[["Trainer"], Callable[[], Any]] | None = None  # copies the state, returns what writes the copy
    save_every: int = -1
    deadline: Deadline | None = None  # moves the horizon, if there is one
    progress: Progress = field(default_factory=Progress)
    loss_fn: Any = None  # model.loss, or its compiled form
    stop_signal: int | None = None  # that asked the run to stop
    started: float = field(default_factory=time.perf_counter)  # as if all sessions had been one
    positions: int = 0  # that this process has worked on in the step
    own_loss: torch.Tensor | None = None  # summed over this process's targets of the last batch
    compare_every: int = 100  # steps between comparisons of the processes' weights
    saver: AsyncSaver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = AsyncSaver(self.runtime)

    def run(self) -> Progress:
        """Train to the horizon. Raises Interrupted after a signal, NonFiniteLoss, RanksDiverged, DataError, or
        SaveFailed at the end."""
        self.loss_fn = self.loss_fn or self.model.loss
        self.started = time.perf_counter() - self.progress.wall_seconds
        self.model.train()
        with catch_signals(self._request_stop):
            self._agree(last=self.progress.step == self.schedule.num_steps)
            while self.progress.step < self.schedule.num_steps:
                try:
                    batch = self.loader.next_batch()
                except StopIteration:  # the data ended before the horizon: finish here
                    self._end_early()
                    break
                self._after_step(self.step(batch))
        return self.progress

    def step(self, batch: Batch) -> Record:
        """One optimizer step on one global batch; returns its metrics."""
        started = time.perf_counter()
        multiplier = self.set_rates()
        loss, num_targets = self.accumulate(batch)
        if not math.isfinite(loss):
            raise NonFiniteLoss(self._describe_non_finite(loss, batch))
        if not self.runtime.scales_loss or self.unscale_gradients():
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.runtime.synchronize()
        seconds = time.perf_counter() - started
        now = self.progress
        now.add_step(loss, num_targets, seconds)
        positions = self.positions * self.runtime.world_size
        record = {
            "step": now.step,
            "loss": loss,
            "lr_multiplier": multiplier,
            "tokens": now.tokens,
            "tokens_per_second": positions / seconds,
            "seconds": now.seconds,
        }
        skipped = len(getattr(self.loader, "skipped", ()))
        return (
            record
            | ({"loss_scale": now.loss_scale} if self.runtime.scales_loss else {})
            | ({"skipped_shards": skipped} if skipped else {})
        )

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the mean loss over the global batch's targets; returns (that mean, their number)."""
        device = self.runtime.device
        counted = self.runtime.all_reduce_sum((batch.targets >= 0).sum().to(device), "counting targets")
        num_targets = max(int(counted), 1)
        total, self.positions = torch.zeros((), device=device), 0
        with self.model.hold_casts():
            for inputs, targets, weights in self.micro_batches(batch):
                self.positions += inputs.numel()
                total += self.add_gradients(inputs, targets, weights, num_targets)
        self.own_loss = total.clone()
        return float(self.runtime.all_reduce_sum(total, "summing the loss")) / num_targets, num_targets

    def add_gradients(
        self, inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, num_targets: int
    ) -> torch.Tensor:
        """Add a micro-batch's share of the mean loss's gradients, all inputs (B, T); returns its summed loss."""
        if not self.runtime.scales_loss:
            summed, _ = self.loss_fn(inputs, targets, weights)
            (summed / num_targets).backward()
            return summed.detach()
        # The head makes its gradients in float16 in its forward pass (loss_head.py). Only as a part of the tokens'
        # weights does the scale reach them before they are rounded.
        factor = self.progress.loss_scale / num_targets
        ones = torch.ones(targets.shape, device=targets.device)
        summed, _ = self.loss_fn(inputs, targets, factor * (ones if weights is None else weights))
        summed.backward()
        return summed.detach() / factor

    def unscale_gradients(self) -> bool:
        """Divide the scale out of the gradients and move it. False if one overflowed: the step is to be skipped.

        All processes decide alike. NonFiniteLoss when no scale helps.
        """
        now = self.progress
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(grads).isfinite())
        overflowed = bool(self.runtime.all_reduce_max(float(not finite), "checking for overflow"))
        if not overflowed:
            for grad in grads:
                grad /= now.loss_scale
        now.move_loss_scale(overflowed)
        if now.loss_scale < 1:
            raise NonFiniteLoss(f"the gradients are not finite at step {now.step}, though the loss is")
        return not overflowed

    def micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(inputs, targets, weights) of at most device_batch_size rows each, on the device."""
        cuda = self.runtime.device.type == "cuda"

        def put(x: torch.Tensor) -> torch.Tensor:
            return x.pin_memory().to(self.runtime.device, non_blocking=True) if cuda else x.to(self.runtime.device)

        for start in range(0, batch.inputs.size(0), self.device_batch_size):
            rows = slice(start, start + self.device_batch_size)
            if batch.weights is None:
                yield put(batch.inputs[rows]), put(batch.targets[rows]), None
                continue
            weights = batch.weights[rows]
            if weights.any():  # else no gradient comes of it, as in RL where all answers to a prompt are as good
                width = int((batch.targets[rows] >= 0).any(0).nonzero().max()) + 1  # past the last target, nothing
                cut = (batch.inputs[rows, :width], batch.targets[rows, :width], weights[:, :width])
                inputs, targets, weights = (put(x.contiguous()) for x in cut)
                yield inputs, targets, weights

    def set_rates(self) -> float:
        """Put this step's learning rate, momentum and weight decay into the optimizer's groups."""
        plan, step = self.schedule, self.progress.step
        multiplier = lr_multiplier(step, plan.num_steps, plan.warmup_steps, plan.warmdown_ratio, plan.final_lr_frac)
        down = plan.warmdown_ratio if plan.momentum_warmdown else 0.0
        momentum = muon_momentum(step, plan.num_steps, plan.momentum_warmup_steps, plan.momentum_peak, down)
        decay = decay_multiplier(step, plan.num_steps, plan.decay_shape)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["initial_weight_decay"] * decay
        return multiplier

    def _after_step(self, record: Record) -> None:
        step, num_steps = self.progress.step, self._follow_deadline()
        try:
            record.update(self._observe(step, num_steps))
            self.log(self, record)
        except (Exception, KeyboardInterrupt):  # an observer failed or was interrupted: that must not cost the steps
            self._save(final=True)
            raise
        last = step == num_steps
        if self.compare_every > 0 and step % self.compare_every == 0:
            self._compare_weights()
        if last or (self.save_every > 0 and step % self.save_every == 0):
            self._save(final=last)
        self._agree(last)

    def _agree(self, last: bool) -> None:
        """Between two steps: wait for the next batch, and stop or skip a bad shard if that is what any process has to.

        So all stop after the same step, and all leave out the same shards from the same batch on.
        """
        wait = None if last else getattr(self.loader, "wait", None)
        while True:
            while wait and not wait(0.5) and not self.stop_signal:
                pass
            failure = wait and self.loader.failure  # type: ignore[attr-defined]
            word = int(
                self.runtime.all_reduce_max(DATA_ERROR if failure else self.stop_signal or 0, "sharing the stop code")
            )
            if word != DATA_ERROR:
                break
            self._skip_or_fail(failure)
        if word and not last:
            self._save(final=True)
            raise Interrupted(word)

    def _skip_or_fail(self, failure: BaseException | None) -> None:
        """Have all processes' loaders leave out the shards that some could not read, if all that failed may do so.

        Otherwise save and raise DataError on all; before the first step, where it failed, the failure itself.
        """
        loader: Any = self.loader
        shards, error = gather_failures(self.runtime, failure, loader.skips_bad_shards)
        if error is None:
            loader.skip(shards)
            for reason in shards.values():
                self.runtime.warn0(f"SKIPPED A BAD SHARD ({len(loader.skipped)} so far): {reason}")
            return
        if self.progress.step:
            self._save(final=True)
        if failure and not (self.progress.step and isinstance(failure, UserError | OSError)):
            raise failure
        raise DataError(error) from failure

    def _follow_deadline(self) -> int:
        """The number of steps of the run, moved if there is a deadline; alike on all processes."""
        if self.deadline:
            now, plan = (
                self.runtime.all_reduce_max(time.perf_counter() - self.started, "reading the clock"),
                self.schedule,
            )
            plan.num_steps = self.deadline.horizon(self.progress.step, plan.num_steps, now)
        return self.schedule.num_steps

    def _observe(self, step: int, num_steps: int) -> Record:
        """Run the hooks that are due; what they have to add to the step's record."""
        found: Record = {}
        for hook in self.hooks:
            if hook.due(step, num_steps):
                began = time.perf_counter()
                with contextlib.suppress(StopObserving):  # the step's end asks for the signal
                    found.update(hook.run(self) or {})
                self.model.train()
                hook.seconds = time.perf_counter() - began
        if self.deadline and any(hook.due(step, num_steps) for hook in self.hooks):
            self.deadline.observing_seconds = self.runtime.all_reduce_max(
                self.closing_hooks_seconds(), "timing the hooks"
            )
        return found

    def raise_if_stop_requested(self) -> None:
        """For long observers, now and then, on all processes: raises StopObserving once a signal has come."""
        if self.runtime.all_reduce_max(self.stop_signal or 0, "sharing the stop signal"):
            raise StopObserving

    def closing_hooks_seconds(self) -> float:
        """How long what watches the last step will take, as far as it has been timed or estimated."""
        return sum(hook.seconds or 0.0 for hook in self.hooks if hook.at_end)

    def _end_early(self) -> None:
        """Close a run whose data was shorter than its horizon as if the horizon had been here."""
        warn(f"the data ended after step {self.progress.step} of {self.schedule.num_steps}")
        for hook in self.hooks:
            if hook.at_end and self.progress.step:
                hook.run(self)
        self._save(final=True)

    def _save(self, final: bool) -> None:
        """Save this step in the background, or, if `final`, wait until it is written. Collective."""
        step = self.progress.step
        self.progress.wall_seconds = time.perf_counter() - self.started
        if self.snapshot and self.saver.ready_for(step, final):
            self._compare_weights()
            self._refuse_non_finite()
            self.saver.start(step, self.snapshot(self), final)

    def _describe_non_finite(self, loss: float, batch: Batch) -> str:
        """Which step, process and data, alike on all processes."""
        self.saver.settle(None)
        data = describe_non_finite_ranks(self.runtime, self.own_loss, batch.origin)
        return f"loss is {loss} at step {self.progress.step} on {data}; {self._last_good()}"

    def _last_good(self) -> str:
        saved = self.saver.last_step
        return "no checkpoint yet" if saved is None else f"last good checkpoint: step {saved}"

    def _refuse_non_finite(self) -> None:
        """Raise NonFiniteLoss, on all processes, before weights that are spoilt take the place of good ones."""
        spoilt = non_finite(self.model)
        if self.runtime.all_reduce_max(len(spoilt), "checking for non-finite weights"):
            raise NonFiniteLoss(
                f"the weights are not finite after step {self.progress.step} "
                f"({', '.join(spoilt[:3]) or 'on another process'}), and are not saved; "
                f"{self._last_good()}; "
                "lower the learning rates"
            )

    def _compare_weights(self) -> None:
        """Raise RanksDiverged, on all processes, if the weights of some are not those of most."""
        drifted = find_diverged_ranks(self.runtime, self.model)
        if drifted:
            raise RanksDiverged(
                f"the weights of rank {', '.join(map(str, drifted))} are not the others' after step "
                f"{self.progress.step}: faulty hardware, or code that treats ranks differently; the last "
                f"good checkpoint is step {self.saver.last_step}"
            )

    def _request_stop(self, signum: int) -> None:
        self.stop_signal = signum
