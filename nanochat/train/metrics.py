"""The record of a run: metrics.jsonl, the console line, wandb and tensorboard."""

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from nanochat.common import UserError, atomic_write, format_count, format_seconds, free_name, warn
from nanochat.common.output import ProgressLine
from nanochat.reporting.curves import parse_record
from nanochat.runtime import Runtime
from nanochat.train.busy_cores import CoreWatch
from nanochat.train.config import TrainConfig
from nanochat.train.deadline import RecentPace
from nanochat.trainer import Record, Trainer

MAX_WAIT_SHARE, WAIT_WATCH_SECONDS = 0.1, 30.0  # of the time, and how long to watch before judging

Sink = Callable[[int, Record], None]  # called with (step, record)


class Metrics:
    """A trainer's `log`: appends every step's record to metrics.jsonl and shows the run on the console. Main rank only.

    A full disk costs the line, not the run.
    """

    def __init__(
        self, path: Path, runtime: Runtime, *, flops_per_token: float, peak_flops: float, sinks: Sequence[Sink] = ()
    ) -> None:
        self.runtime, self.flops_per_token, self.peak_flops = runtime, flops_per_token, peak_flops
        self.sinks = sinks
        self.text = ""
        self.shown = ProgressLine(lambda: self.text, at_once=True)
        self.rate = 0.0  # smoothed tokens per second
        self.pace = RecentPace()  # of this session, without its first step
        self.waited = 0.0  # for data, in this session after its first step, which compiles
        self.first_seconds: float | None = None  # record["seconds"] of that step
        self.said_waiting = False
        self.cores: CoreWatch | None = None  # since the first step, until it has been judged
        self.file = None
        self.write_failed = False
        if runtime.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for the whole run)

    def __call__(self, trainer: Trainer, record: Record) -> None:
        if self.file is None:
            return
        positions = trainer.step.positions * self.runtime.world_size
        record["step_flops"] = positions * self.flops_per_token  # the model's own, as estimate_flops counts them
        try:
            self.file.write(json.dumps({k: v for k, v in record.items() if v is not None}) + "\n")
        except OSError as error:
            if not self.write_failed:
                warn(f"metrics.jsonl cannot be written ({error}); training continues, its lines are lost")
            self.write_failed = True
        for sink in self.sinks:
            sink(record["step"], record)
        self.pace.add(record["step"], time.perf_counter())
        self.watch_waiting(trainer, record)
        if rate := record["tokens_per_second"]:  # 0: nothing to train on, see groups_without_signal
            self.rate = rate if not self.rate else 0.9 * self.rate + 0.1 * rate
        self.text = self.line(trainer, record)
        self.shown.show(last=trainer.finished or "val_bpb" in record)

    def watch_waiting(self, trainer: Trainer, record: Record) -> None:
        """Warn once if training waits for its data for more than MAX_WAIT_SHARE of the time, or for cores that other
        programs use, and say what helps."""
        if self.first_seconds is None:
            self.first_seconds = record["seconds"]
            self.cores = CoreWatch() if self.runtime.device.type == "cpu" else None
            return
        self.waited += record["wait_seconds"]
        total = self.waited + record["seconds"] - self.first_seconds
        if self.cores and total > WAIT_WATCH_SECONDS:
            if text := self.cores.warning("training"):
                warn(text)
            self.cores = None
        if not self.said_waiting and total > WAIT_WATCH_SECONDS and self.waited > MAX_WAIT_SHARE * total:
            self.said_waiting = True
            warn(f"training waits for data for {self.waited / total:.0%} of the time; {trainer.loader.advice}")

    def line(self, trainer: Trainer, record: Record) -> str:
        """step 120/400 | loss 3.21 | bpb 1.43 | 5.2k tok/s | 41% of peak | 1m10s left

        The number of steps and the time left are shown once they are known, see seconds_left.
        """
        now, deadline = trainer.progress, trainer.deadline
        known = deadline is None or deadline.is_measured or trainer.finished
        total = f"/{trainer.schedule.num_steps}" if known else ""
        seconds = self.seconds_left(trainer)
        left = "" if seconds is None or trainer.finished else f" | {format_seconds(seconds)} left"
        bpb = f" | bpb {now.val_bpb:.4f}" if now.val_bpb is not None else ""
        reward = f" | reward {record['reward']:.3f}" if "reward" in record else ""
        if record.get("groups_without_signal") == 1:
            reward += ", the same for all answers to a prompt: nothing to learn"
        share = self.rate * self.flops_per_token / self.peak_flops / self.runtime.world_size if self.peak_flops else 0
        if share > 1:  # the peak was measured beside other work, so it is not known
            self.peak_flops = share = 0.0
        speed = f" | {format_count(self.rate)} tok/s" if self.rate else ""
        peak = f" | {share:.0%} of peak" if share else ""
        return f"step {now.step}{total} | loss {now.debiased_loss():.4f}{bpb}{reward}{speed}{peak}{left}"

    def seconds_left(self, trainer: Trainer) -> float | None:
        """What is left of --minutes; without it, of the remaining steps at this session's recent pace, or None before
        that has been measured for a few seconds."""
        if trainer.deadline:
            return max(0.0, trainer.deadline.seconds - (time.perf_counter() - trainer.started))
        if not self.pace.is_sound:
            return None
        return self.pace.seconds_per_step * (trainer.schedule.num_steps - trainer.progress.step)

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # a full disk may refuse the last line again
                self.file.close()


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines past `step`, which a resumed run will write again, and a last line cut short by a kill.

    Lines that cannot be read are dropped too, with a warning; the file as it was is kept beside it.
    """
    if not path.exists():
        return
    *lines, rest = path.read_bytes().split(b"\n")
    records = [parse_record(line) for line in lines] + [parse_record(rest)]
    if damaged := [number for number, (line, record) in enumerate(zip(lines, records), 1) if line and not record]:
        copy = free_name(path, "damaged")
        shutil.copy(path, copy)
        numbers = ", ".join(map(str, damaged[:5])) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        warn(f"{path}: dropped what cannot be read (line {numbers}); the file as it was is {copy.name}")
    with atomic_write(path) as file:
        for line, record in zip([*lines, rest], records):
            if record and record["step"] <= step:
                file.write(line + b"\n")


def check_sinks(config: TrainConfig) -> None:
    """Raise UserError, before anything is begun, where the optional extra is not installed."""
    if config.run != "dummy" and importlib.util.find_spec("wandb") is None:
        raise UserError("--run needs wandb: pip install 'nanochat[wandb]', or leave --run=dummy")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs tensorboard: pip install 'nanochat[tensorboard]', or leave it out")


def open_sinks(config: TrainConfig, folder: Path) -> list[Sink]:
    """wandb and tensorboard, as the flags ask for them; see check_sinks. Main rank only."""
    sinks: list[Sink] = []
    if config.run != "dummy":
        import wandb

        session = wandb.init(project="nanochat", name=config.run, config=asdict(config))
        sinks.append(lambda step, record: session.log(record, step=step))
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, record: Record) -> None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)

        sinks.append(to_tensorboard)
    return sinks
