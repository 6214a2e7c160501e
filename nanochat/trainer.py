"""The training loop of pretraining, SFT and RL.

    batch = loader.next_batch()
    record = step(batch)            # gradients and update: train/step.py
    hooks: evaluate, sample; log; save

Everything that only observes the run (evaluation, samples, metrics, report) is a hook or `log`.
"""

import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat.checkpoint.async_save import AsyncSaver
from nanochat.common import UserError
from nanochat.data.batches import Batch, Loader
from nanochat.distributed.rank_checks import (
    DataError,
    NonFiniteLoss,
    RanksDiverged,
    find_diverged_ranks,
    gather_failures,
    non_finite,
)
from nanochat.distributed.signals import StopRequested, catch_signals
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.train.deadline import Deadline
from nanochat.train.progress import Progress
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.step import Record, TrainStep

DATA_ERROR = 1000  # stop code; above every signal number, so it wins the max-reduce


class Interrupted(Exception):
    """A signal asked the run to stop; the current step was finished and saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Leave the objects that exist now out of garbage collections in the block.

    A full collection goes through a million objects of torch, its compiler and the model, and stops the step for some
    0.2 s, on one rank while the others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class Hook:
    """Calls `run(trainer)` after every `every`-th step, if that is positive, and after the last step.

    The result is added to the step's metrics.
    """

    run: Callable[["Trainer"], Record | None]
    every: int = -1
    tokens: int = 0  # that it evaluates, for a first estimate of its time
    seconds: float | None = None  # its time: measured in its last call, or estimated

    def due(self, step: int, num_steps: int) -> bool:
        return (self.every > 0 and step % self.every == 0) or step == num_steps


@dataclass
class Trainer:
    """Takes steps on the loader's batches until the schedule's last one."""

    step: TrainStep
    loader: Loader
    hooks: list[Hook] = field(default_factory=list)
    log: Callable[["Trainer", Record], None] = lambda trainer, record: None
    snapshot: Callable[["Trainer"], Callable[[], Any]] | None = None  # copies the state; returns what writes the copy
    save_every: int = -1
    compare_every: int = 100  # steps between comparisons of the ranks' weights
    deadline: Deadline | None = None  # moves the schedule's last step
    wait_seconds: float = 0.0  # that the last step's batch was waited for
    stop_signal: int | None = None  # the signal that asked this rank to stop
    stopped_by: Exception | None = None  # what ended the run before its last step
    started: float = field(default_factory=time.perf_counter)  # as if all sessions had been one
    saver: AsyncSaver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = AsyncSaver(self.runtime)

    @property
    def model(self) -> GPT:
        return self.step.model

    @property
    def runtime(self) -> Runtime:
        return self.step.runtime

    @property
    def progress(self) -> Progress:
        return self.step.progress

    @property
    def schedule(self) -> ScheduleConfig:
        return self.step.schedule

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.schedule.num_steps

    def run(self) -> Progress:
        """Train to the last step. Raises Interrupted after a signal, NonFiniteLoss, RanksDiverged, DataError, or
        SaveFailed if the last save failed."""
        self.started = time.perf_counter() - self.progress.wall_seconds
        self.model.train()
        with catch_signals(self._request_stop), contextlib.ExitStack() as stack:
            self._await_batch()
            first = self.progress.step + 1
            while not self.finished:
                try:
                    batch = self.loader.next_batch()
                except StopIteration:
                    self._end_early()
                    break
                except FloatingPointError as error:  # the answers of RL, sampled with weights that are not finite
                    raise self._not_finite(error) from None
                record = self._take_step(batch)
                if self.progress.step == first:  # what compilation leaves behind is there by now
                    stack.enter_context(frozen_objects())
                self._follow_deadline(record)
                self._observe(record)
                self._save_if_due()
                self._await_batch()
            stopped = self.runtime.all_reduce_max(self.stop_signal or 0, "sharing the stop signal")
            if stopped:  # in the last hooks: what would follow the run shall not start
                raise Interrupted(int(stopped))
        return self.progress

    def raise_if_stop_requested(self) -> None:
        """Raise StopRequested on all ranks once any has received a stop signal. For long hooks; collective."""
        if self.runtime.all_reduce_max(self.stop_signal or 0, "sharing the stop signal"):
            raise StopRequested("stop requested")

    def final_hooks_seconds(self) -> float:
        """Expected time of the hooks after the last step: the largest over all ranks. Collective."""
        seconds = sum(hook.seconds or 0.0 for hook in self.hooks)
        return self.runtime.all_reduce_max(seconds, "timing the hooks")

    def _take_step(self, batch: Batch) -> Record:
        try:
            record = self.step(batch)
        except NonFiniteLoss as error:
            raise self._not_finite(error) from None
        skipped = len(self.loader.skipped)
        record["wait_seconds"] = self.wait_seconds  # for this rank's batch, before the step
        return record | ({"skipped_shards": skipped} if skipped else {})

    def _not_finite(self, error: Exception) -> NonFiniteLoss:
        self.saver.settle(None)
        return NonFiniteLoss(f"{error}; {self.last_good()}")

    def _follow_deadline(self, record: Record) -> None:
        if self.deadline:
            step = self.progress.step
            now = self.runtime.all_reduce_max(time.perf_counter() - self.started, "reading the clock")
            self.schedule.num_steps = self.deadline.horizon(step, self.schedule.num_steps, now)
            if record["lr_multiplier"] > 0.5:
                self.deadline.last_high_step = step
            if self.finished and (cut := self.deadline.cut(self.schedule)):
                self.runtime.warn0(cut)

    def _observe(self, record: Record) -> None:
        """Run the hooks that are due, and log. If one of them fails, the steps so far are saved first, on one
        rank: of several, only one may have failed, and would wait for the others in the save."""
        due = [hook for hook in self.hooks if hook.due(self.progress.step, self.schedule.num_steps)]
        try:
            for hook in due:
                began = time.perf_counter()
                record.update(self._run_hook(hook))
                self.model.train()
                hook.seconds = time.perf_counter() - began
            if self.deadline and due:
                self.deadline.hooks_seconds = self.final_hooks_seconds()
            self.log(self, record)
        except (Exception, KeyboardInterrupt):
            if self.runtime.world_size == 1:
                self._save(final=True)
            raise

    def _run_hook(self, hook: Hook) -> Record:
        """Its record; none if a stop signal ends it."""
        try:
            return hook.run(self) or {}
        except StopRequested:  # _await_batch raises Interrupted
            self.runtime.print0("stop requested: an evaluation is left unfinished")
            return {}

    def _save_if_due(self) -> None:
        step = self.progress.step
        if self.compare_every > 0 and step % self.compare_every == 0:
            self._compare_weights()
        if self.saver.writing and self.saver.last_step is None:
            self.saver.settle(0.0)  # raises SaveFailed now, not at the next save
        if self.finished or (self.save_every > 0 and step % self.save_every == 0):
            self._save(final=self.finished)

    def _await_batch(self) -> None:
        """Wait for the next batch. If any rank got a stop signal, save and raise Interrupted; skip bad shards.

        All ranks decide alike, so that they stop after the same step and skip from the same batch on.
        """
        began = time.perf_counter()
        while not self.finished:
            while not self.loader.wait(0.5) and not self.stop_signal:
                pass
            self.wait_seconds = time.perf_counter() - began
            failure = self.loader.failure
            own_code = DATA_ERROR if failure else self.stop_signal or 0
            code = int(self.runtime.all_reduce_max(own_code, "sharing the stop code"))
            if code == 0:
                return
            if code != DATA_ERROR:
                self._save(final=True)
                raise Interrupted(code)
            self._skip_or_raise(failure)

    def _skip_or_raise(self, failure: BaseException | None) -> None:
        """Skip the shards that any rank could not read, on all ranks, if the loader may skip them.

        Otherwise save and raise DataError on all; before the first step, the failure itself where it occurred.
        """
        shards, error = gather_failures(self.runtime, failure, self.loader.skips_bad_shards)
        if error is None:
            self.loader.skip(shards)
            for reason in shards.values():
                self.runtime.warn0(f"SKIPPED A BAD SHARD ({len(self.loader.skipped)} so far): {reason}")
            return
        if self.progress.step:
            self._save(final=True)
        if failure and not (self.progress.step and isinstance(failure, UserError | OSError)):
            raise failure
        raise DataError(error) from failure

    def _end_early(self) -> None:
        """Finish a run whose data ended before the schedule's last step."""
        self.runtime.warn0(f"the data ended after step {self.progress.step} of {self.schedule.num_steps}")
        self.schedule.num_steps = self.progress.step  # the run is finished, when it is resumed too
        for hook in self.hooks if self.progress.step else ():
            self._run_hook(hook)
        self._save(final=True)

    def _save(self, final: bool) -> None:
        """Save this step in the background, or, if `final`, wait until it is written. Collective."""
        step = self.progress.step
        self.progress.wall_seconds = time.perf_counter() - self.started
        if self.snapshot and self.saver.ready_for(step, final):
            self._compare_weights()
            self._check_weights_are_finite()
            self.saver.start(step, self.snapshot(self), final)

    def _check_weights_are_finite(self) -> None:
        """Raise NonFiniteLoss on all ranks before a broken checkpoint replaces a good one. Collective."""
        names = non_finite(self.model)
        if self.runtime.all_reduce_max(len(names), "checking for non-finite weights"):
            raise NonFiniteLoss(
                f"the weights are not finite after step {self.progress.step} "
                f"({', '.join(names[:3]) or 'on another rank'}), and are not saved; {self.last_good()}; "
                "lower the learning rates"
            )

    def _compare_weights(self) -> None:
        """Raise RanksDiverged on all ranks if some ranks' weights differ. Collective."""
        diverged = find_diverged_ranks(self.runtime, self.model)
        if diverged:
            raise RanksDiverged(
                f"the weights of rank {', '.join(map(str, diverged))} differ from the other ranks' after step "
                f"{self.progress.step}: faulty hardware, or code that treats ranks differently; {self.last_good()}"
            )

    def last_good(self) -> str:
        """What is saved, for the end of an error's line."""
        saved = self.saver.last_step
        return "no checkpoint yet" if saved is None else f"last good checkpoint: step {saved}"

    def _request_stop(self, signum: int) -> None:
        self.stop_signal = signum
