"""What surrounds the training loop in every stage: the run's folder, its metrics, its console line, saving, resuming.

A run's folder holds STEP/ checkpoints, `metrics.jsonl` (one object a line, every step) and `plan.json` (the
numbers fixed before the first step).
"""

import contextlib
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from nanochat.checkpoint.async_save import SaveFailed
from nanochat.checkpoint_manager import Checkpoint, list_steps, open_checkpoint
from nanochat.common import UserError, atomic_write, format_count, format_seconds, on_terminal, say, warn
from nanochat.distributed.collectives import CollectiveFailed
from nanochat.distributed.rank_checks import DataError, NonFiniteLoss, RanksDiverged
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.trainer import Interrupted, Record, Trainer

PLAIN_LINE_SECONDS = 10.0  # how often a log file gets a line


# ---------------------------------------------------------------------------------------------------
# The run's folder


def prepare_run(run: Path, resume: bool, step: int | None, runtime: Runtime) -> Checkpoint | None:
    """The checkpoint to go on from, or None for a fresh run.

    Resuming where nothing was saved yet starts from the beginning. A fresh run calls move_aside later.
    """
    if not resume and step is None:
        return None

    def choose() -> int | None:
        if step is None and not list_steps(run):
            return None
        return open_checkpoint(run, step).step

    # One verifies and chooses for all: of a run that is being saved, or on a shared disk, each might see another.
    chosen = runtime.broadcast(choose, "choosing a checkpoint")
    if chosen is None:
        runtime.print0(f"nothing saved in {run} yet: starting from the beginning")
        return None
    return open_checkpoint(run, chosen, verify=False)


@contextlib.contextmanager
def only_session(run: Path, runtime: Runtime) -> Iterator[None]:
    """Keep other processes from training in the same folder. UserError if one already does."""
    if not runtime.is_main:
        yield
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.parent / f".{run.name}.lock", timeout=0)  # beside the folder, which may be moved
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is training in {run}; wait for it, or give another --model-tag") from None
    try:
        yield
    finally:
        lock.release()


def move_aside(run: Path, runtime: Runtime) -> None:
    """Make room for a fresh run. Call it once everything that the user could have mistaken is checked."""
    runtime.barrier("checking the run's folder")
    if runtime.is_main and list_steps(run):
        aside = next(p for n in range(1, 10_000) if not (p := run.with_name(f"{run.name}.old{n}")).exists())
        run.rename(aside)
        say(f"the earlier run {run.name} was moved aside to {aside.name}; --resume would have continued it")
    runtime.barrier("moving the earlier run aside")


def merge_saved_config(
    given: Any, saved: dict[str, Any], may_change: Sequence[str], may_move: Sequence[str] = ()
) -> Any:
    """The saved run's config with only the `may_change` fields taken from the command line, and those of `may_move`
    that were given there.

    What could change the numbers stays as it was; a differing value on the command line is ignored with a warning.
    """
    values = asdict(given)
    for name, value in saved.items():
        if name not in values or name in may_change:
            continue
        if values[name] not in (value, -1, getattr(type(given)(), name)):  # -1 asks to derive it
            if name in may_move:
                continue
            warn(f"resuming: --{name.replace('_', '-')} stays {value!r} as in the saved run, not {values[name]!r}")
        values[name] = value
    return type(given)(**values)


# ---------------------------------------------------------------------------------------------------
# Metrics


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines past `step`, which a resumed run will write again, and a last line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    with atomic_write(path, "w") as file:
        file.writelines(line + "\n" for line in kept)


class Metrics:
    """Writes every step's record to metrics.jsonl and shows the run on the console; main process only."""

    def __init__(
        self, path: Path, runtime: Runtime, *, flops_per_token: float, peak_flops: float, sinks: Sequence[Any] = ()
    ) -> None:
        self.runtime, self.flops_per_token, self.peak_flops = runtime, flops_per_token, peak_flops
        self.sinks = sinks  # called with (step, record): wandb, tensorboard
        self.live = on_terminal()
        self.last_line = 0.0
        self.rate = 0.0  # smoothed tokens per second
        self.file = None
        self.write_failed = False
        if runtime.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for the whole run)

    def __call__(self, trainer: Trainer, record: Record) -> None:
        if self.file is None:
            return
        self.write(record)
        for sink in self.sinks:
            sink(record["step"], record)
        rate = record["tokens_per_second"]
        self.rate = rate if not self.rate else 0.9 * self.rate + 0.1 * rate
        last = record["step"] == trainer.schedule.num_steps
        now = time.monotonic()
        evaluated = "val_bpb" in record
        if self.live:
            say("\r\x1b[K" + self.line(trainer, record), end="\n" if last or evaluated else "")
        elif last or evaluated or now - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = now
            say(self.line(trainer, record))

    def write(self, record: Record) -> None:
        """Append one line. A full disk costs the line, not the run."""
        assert self.file is not None
        try:
            self.file.write(json.dumps({k: v for k, v in record.items() if v is not None}) + "\n")
        except OSError as error:
            if not self.write_failed:
                warn(f"metrics.jsonl cannot be written ({error}); training goes on, its lines are lost")
            self.write_failed = True

    def line(self, trainer: Trainer, record: Record) -> str:
        """step 120/400 | loss 3.21 | bpb 1.43 | 5.2k tok/s | 41% of peak | 1m10s left"""
        now, total = trainer.progress, trainer.schedule.num_steps
        left = (time.perf_counter() - trainer.started) / max(now.step, 1) * (total - now.step)
        bpb = f" | bpb {now.val_bpb:.4f}" if now.val_bpb is not None else ""
        reward = f" | reward {record['reward']:.3f}" if "reward" in record else ""
        share = self.rate * self.flops_per_token / self.peak_flops / self.runtime.world_size if self.peak_flops else 0
        peak = f" | {share:.0%} of peak" if share else ""
        return (
            f"step {now.step}/{total} | loss {now.debiased_loss():.4f}{bpb}{reward} | "
            f"{format_count(self.rate)} tok/s{peak} | {format_seconds(left)} left"
        )

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk refused before, it refuses again
                self.file.close()


def check_sinks(run_name: str, use_tensorboard: bool) -> None:
    """Raise UserError, before anything is begun, where the optional extra is not installed."""
    if run_name != "dummy" and importlib.util.find_spec("wandb") is None:
        raise UserError("--run needs wandb: pip install 'nanochat[wandb]', or leave --run=dummy")
    if use_tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs tensorboard: pip install 'nanochat[tensorboard]', or leave it out")


def open_sinks(run_name: str, run: Path, use_tensorboard: bool, config: dict[str, Any], is_main: bool) -> list[Any]:
    """wandb (run_name other than "dummy") and tensorboard; see check_sinks."""
    sinks: list[Any] = []
    if run_name != "dummy" and is_main:
        import wandb

        session = wandb.init(project="nanochat", name=run_name, config=config)
        sinks.append(lambda step, record: session.log(record, step=step))
    if use_tensorboard and is_main:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(step: int, record: Record) -> None:
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)

        sinks.append(to_tensorboard)
    return sinks


# ---------------------------------------------------------------------------------------------------
# Measuring and running


def measure_peak_flops(runtime: Runtime, seconds: float = 0.3) -> float:
    """FLOP/s of large matrix products on this machine, now: the yardstick for "share of peak"."""
    size = 1024 if runtime.device.type == "cpu" else 8192
    a = torch.randn(size, size, device=runtime.device, dtype=runtime.dtype)
    a @ a
    runtime.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        runtime.synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def choose_device_batch(given: int, rows: int, sequence_len: int, runtime: Runtime) -> int:
    """Rows per micro-batch: as given, else a size that keeps a CPU's caches warm or a GPU busy.

    Whether a GPU's memory holds that many is for find_device_batch to see.
    """
    if given == 0 or given < -1:
        raise UserError(f"--device-batch-size must be positive, or -1 to choose it, got {given}")
    own = math.ceil(rows / runtime.world_size)
    if given > 0:
        return min(given, own)
    tokens = 4096 if runtime.device.type == "cpu" else 65536
    return max(1, min(own, tokens // sequence_len))


def find_device_batch(trial: Callable[[int], None], rows: int, runtime: Runtime) -> int:
    """`rows`, halved until `trial(rows)` raises no torch.OutOfMemoryError on any process."""
    while True:
        try:
            trial(rows)
            failed = False
        except torch.OutOfMemoryError:
            failed = True
        if not runtime.all_reduce_max(float(failed), "checking that the batch fits"):
            return rows
        if rows == 1:
            raise UserError("not even one row fits in the GPU's memory: give a smaller --depth or --max-seq-len")
        rows //= 2


def run_to_end(trainer: Trainer, run: Path, resume_command: str) -> int:
    """Train; turn what can end a run early into one line and an exit code (0 when it reached the horizon)."""
    runtime = trainer.runtime
    try:
        trainer.run()
        return 0
    except Interrupted as stop:
        runtime.print0(
            f"\n{stop}: stopped after step {trainer.progress.step}, which is saved. Go on with:\n  {resume_command}"
        )
        return 128 + stop.signum
    except (NonFiniteLoss, RanksDiverged) as error:  # all processes know
        runtime.error0(f"\nerror: {error}")
        return 1
    except DataError as error:  # all processes know
        saved = trainer.saver.last_step
        where = "Nothing is saved yet" if saved is None else f"Step {saved} is saved"
        runtime.error0(f"\nerror: data cannot be read: {error}. {where}; go on with:\n  {resume_command}")
        return 1
    except CollectiveFailed as error:  # what one process has to tell, the others may not know
        print(
            f"\nerror: {error}; go on from the last checkpoint with:\n  {resume_command}", file=sys.stderr, flush=True
        )
        return 1
    except SaveFailed as error:
        saved = trainer.saver.last_step
        runtime.error0(
            f"\nerror: could not save step {trainer.progress.step}: {error}; the last good checkpoint in "
            f"{run} is {'none' if saved is None else f'step {saved}'}"
        )
        return 1


def command_line(script: str, config: Any, **extra: Any) -> str:
    """The command that starts `script` with every non-default field of `config`."""
    defaults = asdict(type(config)())
    flags = {k: v for k, v in {**asdict(config), **extra}.items() if extra.get(k) is not None or v != defaults.get(k)}
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    return shlex.join(["python", "-m", f"scripts.{script}", *words])


def measure_step(make_trainer: Callable[[GPT], Trainer], model: GPT, batch: Any, budget: float) -> float:
    """Seconds of one whole optimizer step: the median of real ones on a copy of the model, thrown away afterwards.

    At least two are timed, within about `budget` seconds.
    """
    import copy

    trial = make_trainer(copy.deepcopy(model))
    trial.loss_fn = trial.loss_fn or trial.model.loss
    trial.step(batch)  # warm-up: allocation, compilation
    times: list[float] = []
    while len(times) < 2 or (sum(times) < budget and len(times) < 20):
        started = time.perf_counter()
        trial.step(batch)
        times.append(
            trial.runtime.all_reduce_max(time.perf_counter() - started, "timing a step")
        )  # all processes stop after as many steps
    return float(np.median(times))
