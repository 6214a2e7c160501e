"""One training run: its folder, the checkpoint it resumes from, and the way from a trainer to an exit code.

    with open_run("base_train", folder, config, runtime) as run:   # locks the folder, finds the checkpoint
        ... build the model, plan and trainer from run.config and run.checkpoint
        run.begin(num_steps, plan)                                  # from here on an earlier run is moved aside
        code = run.train(trainer, ...)                              # restore, log, train, save

The folder holds STEP/ checkpoints, metrics.jsonl (one object a line, every step) and plan.json (the numbers fixed
before the first step).
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic

from filelock import Timeout

from nanochat.checkpoint.async_save import SaveFailed
from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint_manager import Checkpoint, read_checkpoint
from nanochat.common import (
    UserError,
    delete_leftovers,
    first_line,
    format_count,
    format_seconds,
    free_name,
    get_base_dir,
    is_out_of_memory,
    say,
    warn,
    write_json,
)
from nanochat.distributed.collectives import BackgroundGroup, CollectiveFailed
from nanochat.distributed.rank_checks import DataError, NonFiniteLoss, RanksDiverged
from nanochat.report import record_stage
from nanochat.reporting.console import print_table
from nanochat.reporting.status import run_lock
from nanochat.runtime import Runtime
from nanochat.scaling import reported_params
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.commands import command_line, describe_flags, gentler_command, train_on_command
from nanochat.train.config import HORIZON, Config, TrainConfig, merge_saved_config
from nanochat.train.device_batch import fit_device_batch
from nanochat.train.metrics import Metrics, check_sinks, cut_metrics, open_sinks
from nanochat.train.snapshot import check_disk, restore_trainer, take_snapshot
from nanochat.train.timing import deadline_for, reference_peak
from nanochat.trainer import Interrupted, Record, Trainer

# Between two drawings of the report, besides those at evaluations: at least so long, and 100 times as long as the last
# one took, so that a run spends at most 1% of its time on it.
REPORT_SECONDS, REPORT_FACTOR = 15.0, 100.0


@dataclass
class Run(Generic[Config]):
    """A run that has its folder to itself. `config` holds the command line's flags, or, resuming, the saved run's."""

    script: str
    folder: Path
    config: Config
    runtime: Runtime
    checkpoint: Checkpoint | None = None  # to resume from
    shown: dict[str, Any] = field(default_factory=dict)  # values for the report besides the figures
    next_report: float = field(default_factory=lambda: time.perf_counter() + REPORT_SECONDS)

    @property
    def planned_steps(self) -> int | None:
        """Steps planned in the run's first session: rates and decay follow from them, so they stay."""
        plan = self.checkpoint.meta["plan"] if self.checkpoint else {}
        return plan.get("planned_steps", plan.get("num_steps"))

    @property
    def finished(self) -> bool:
        """Whether the run was resumed after its last step."""
        return self.checkpoint is not None and self.checkpoint.step >= self.checkpoint.meta["plan"]["num_steps"]

    def check_ignored(self, ignored: dict[str, Any]) -> None:
        """Warn of the flags that a resumed run ignores. Raises UserError if it is finished: nothing would be done."""
        if not ignored:
            return
        if self.finished and self.checkpoint:
            command = train_on_command(self.script, self.folder, self.config, self.checkpoint.step, ignored)
            raise UserError(
                f"the run {self.folder.name} is finished after {self.checkpoint.step} steps: {describe_flags(ignored)} "
                f"would change nothing, and nothing was done. Train its weights on in a new run: {command}"
            )
        stays = describe_flags({name: getattr(self.config, name) for name in ignored})
        later = "; docs/training.md says how to train on afterwards" if HORIZON.intersection(ignored) else ""
        warn(f"resuming with {stays} as in the saved run, not {describe_flags(ignored)}{later}")

    def begin(self, num_steps: int, plan: list[tuple[str, str]]) -> None:
        """Take the folder, now that every flag has been checked; print and keep the plan."""
        check_sinks(self.config)
        if not self.checkpoint:
            move_aside(self.folder, self.runtime)
            self._warn_of_unused_horizons()
        if self.runtime.is_main:
            write_json(self.folder / "plan.json", {"num_steps": num_steps, "user_config": asdict(self.config)})
            if not self.finished:
                print_table("plan", plan)

    def _warn_of_unused_horizons(self) -> None:
        flags = self.config.horizon_flags
        if len(flags) > 1 and self.runtime.is_main:
            first = next(iter(flags))
            used, unused = describe_flags({first: flags.pop(first)}), describe_flags(flags)
            warn(f"{used} says how long the run is; not used: {unused}")

    def train(
        self,
        trainer: Trainer,
        tokenizer: RustBPETokenizer,
        *,
        total_batch_tokens: int,
        meta: dict[str, Any],
        report: Callable[[], None],
    ) -> int:
        """From a fresh trainer to the end of the run: restore, log, train, save. Returns the exit code.

        `meta` is kept with every checkpoint, beside the model's config, the flags and the plan. `report` is called on
        the main rank after the last step.
        """
        config, runtime = self.config, self.runtime
        meta = {
            **meta,
            "model_config": trainer.model.config.to_dict(),
            "user_config": asdict(config),
            "plan": {"planned_steps": trainer.schedule.num_steps, "total_batch_tokens": total_batch_tokens},
        }
        self._restore(trainer)
        trainer.snapshot = partial(
            take_snapshot,
            run=self.folder,
            tokenizer=tokenizer,
            meta=meta,
            keep_last=config.keep_last,
            group=BackgroundGroup(runtime.rank, runtime.world_size, runtime.timeout_seconds),
        )
        trainer.save_every = config.save_every
        trainer.deadline = deadline_for(config, trainer, total_batch_tokens)
        metrics = self._open_metrics(trainer)
        trainer.log = partial(self._log, metrics=metrics)
        try:
            code = run_to_end(trainer, self.folder, partial(self.resume_command, trainer))
        finally:
            trainer.saver.close()
            metrics.close()
            trainer.loader.close()
        if runtime.is_main and code == 0:
            report()
        elif runtime.is_main and trainer.progress.step:
            stopped = {
                "stopped_early": True,
                "stopped_by": first_line(trainer.stopped_by) if trainer.stopped_by else "",
                "not_finite": isinstance(trainer.stopped_by, NonFiniteLoss),
            }
            record_so_far(self.script, self.figures(trainer) | stopped)
        return code

    def _restore(self, trainer: Trainer) -> None:
        """Bring a fresh trainer to the checkpoint's state, and find the device batch that fits in memory.

        The saved run's is tried first, unless one was given: where it fits, sums keep their order.
        """
        saved_rows, step = None, trainer.step
        if self.checkpoint:
            restore_trainer(trainer, self.checkpoint)
            saved_rows = self.checkpoint.meta["runtime"]["device_batch_size"]
            left = ""
            if self.finished:
                command = train_on_command(self.script, self.folder, self.config, self.checkpoint.step)
                left = f": the run is finished, nothing is left to train; to train its weights on:\n  {command}"
            self.runtime.print0(f"resumed at step {self.checkpoint.step} of {trainer.schedule.num_steps}{left}")
        if self.finished:
            return
        fit_device_batch(step, self.config.device_batch_size, lambda: trainer.loader.sequence_len, saved_rows)
        if saved_rows not in (None, step.device_batch_size):
            self.runtime.print0(
                f"{step.device_batch_size} rows per micro-batch, where the saved run had {saved_rows}: the same "
                "batches and steps; sums may round differently"
            )
        check_disk(trainer, self.folder, self.config)

    def report(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """Put the finished stage into the report, and print a summary."""
        record_stage(get_base_dir(), self.script, self.figures(trainer) | values)
        now = trainer.progress
        bpb = "not measured" if now.val_bpb is None else f"{now.val_bpb:.4f} on {validation_tokens(trainer)}"
        validation = f"val bpb {bpb}; " if any(hook.tokens for hook in trainer.hooks) else ""
        say(
            f"{now.step} step{'' if now.step == 1 else 's'}, {format_count(now.tokens)} trained tokens in "
            f"{format_seconds(now.wall_seconds)}; {validation}saved in {self.folder}"
        )

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """The report's values of any training stage."""
        now, finished = trainer.progress, {}
        if self.finished and self.checkpoint:  # nothing was trained: what was made from it later stays later
            saved_at = (self.checkpoint.path / "meta.json").stat().st_mtime
            finished = {"finished_at": datetime.fromtimestamp(saved_at, UTC).isoformat(timespec="seconds")}
        return {
            **finished,
            "seconds": now.wall_seconds,
            "train_seconds": now.seconds,
            "val_bpb": now.val_bpb,
            "val_bpb_of": validation_tokens(trainer),
            "best_val_bpb": now.best_val_bpb,
            "loss": now.debiased_loss(),
            "steps": now.step,
            "num_steps": trainer.schedule.num_steps,
            "tokens": now.tokens,
            "tokens_per_second": now.tokens / max(now.seconds, 1e-9),
            **reported_params(trainer.model.num_scaling_params()),
            "loader": trainer.loader.stats(),
            "metrics": os.path.relpath(self.folder / "metrics.jsonl", get_base_dir()),
            "command": command_line(self.script, self.config),
            "resume_command": self.resume_command(trainer),
            "gentler_command": gentler_command(self.script, self.config),
            **self.shown,
        }

    def resume_command(self, trainer: Trainer) -> str:
        """The command that resumes the run from its newest checkpoint. After --resume-from-step it must name that step:
        the folder may still hold later ones, saved before the run went back."""
        config, saved = self.config, trainer.saver.last_step
        if config.resume_from_step >= 0 and saved is not None:
            config = replace(config, resume_from_step=saved)
        return command_line(self.script, config, resume=True)

    def _open_metrics(self, trainer: Trainer) -> Metrics:
        path, runtime = self.folder / "metrics.jsonl", self.runtime
        if runtime.is_main:
            cut_metrics(path, self.checkpoint.step if self.checkpoint else -1)
        return Metrics(
            path,
            runtime,
            flops_per_token=trainer.model.estimate_flops(),
            peak_flops=reference_peak(runtime)[0],
            sinks=open_sinks(self.config, self.folder) if runtime.is_main else [],
        )

    def _log(self, trainer: Trainer, record: Record, metrics: Metrics) -> None:
        """Write the metrics, and update the report at each evaluation and now and then: report.html follows the run."""
        metrics(trainer, record)
        began = time.perf_counter()
        due = "val_bpb" in record or began > self.next_report
        if due and trainer.runtime.is_main and not trainer.finished:
            record_so_far(self.script, self.figures(trainer) | {"status": "running", "progress": metrics.text})
            now = time.perf_counter()
            self.next_report = now + max(REPORT_SECONDS, REPORT_FACTOR * (now - began))


def validation_tokens(trainer: Trainer) -> str:
    """`32,768 tokens`: what the run's bits per byte are measured on."""
    return f"{max((hook.tokens for hook in trainer.hooks), default=0):,} tokens"


@contextlib.contextmanager
def open_run(script: str, folder: Path, config: Config, runtime: Runtime) -> Iterator[Run[Config]]:
    """Lock the run's folder and find what to resume. UserError if another process trains there, or nothing fits, or if
    the flags ask for something else of a run that is finished."""
    with lock_folder(folder, runtime):
        checkpoint = choose_checkpoint(folder, config, runtime)
        run = Run(script, folder, config, runtime, checkpoint)
        if checkpoint:
            run.config, ignored = merge_saved_config(config, checkpoint.meta["user_config"])
            run.check_ignored(ignored)
        if run.config.deterministic:
            runtime.make_deterministic()
        yield run


@contextlib.contextmanager
def lock_folder(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Keep other processes from training in the same folder. UserError if one already does."""
    if not runtime.is_main:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = run_lock(folder).acquire()
    except Timeout:
        raise UserError(f"another process is training in {folder}; wait for it, or give another --model-tag") from None
    with held:
        delete_leftovers(folder.rglob(".*.tmp"))
        yield


def choose_checkpoint(folder: Path, config: TrainConfig, runtime: Runtime) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh run; also where nothing was saved yet. Collective.

    The main rank verifies and chooses for all: on a shared disk, or while a save ends, others might see another one.
    """
    if not config.resume and config.resume_from_step < 0:
        return None
    step = None if config.resume_from_step < 0 else config.resume_from_step
    if step is None and not runtime.broadcast(lambda: list_steps(folder), "listing the checkpoints"):
        runtime.print0(f"nothing saved in {folder} yet: starting from the beginning")
        return None
    return read_checkpoint(folder, step, lambda checkpoint: checkpoint, True, runtime)


def move_aside(folder: Path, runtime: Runtime) -> None:
    """Rename the folder of an earlier run. Collective."""
    runtime.barrier("checking the run's folder")
    if runtime.is_main and list_steps(folder):
        aside = free_name(folder, "old")
        folder.rename(aside)
        say(f"the earlier run {folder.name} was moved aside to {aside.name}; --resume would have continued it")
    runtime.barrier("moving the earlier run aside")


def run_to_end(trainer: Trainer, folder: Path, resume_command: Callable[[], str]) -> int:
    """Train; turn the known failures into one line and an exit code. 0 if the last step was reached."""
    runtime = trainer.runtime

    def resume() -> str:
        return f"resume with:\n  {resume_command()}"

    try:
        with keep_error(trainer):
            trainer.run()
        return 0
    except Interrupted as stop:
        runtime.print0(f"\n{stop}: stopped after step {trainer.progress.step}, which is saved; {resume()}")
        return 128 + stop.signum
    except CollectiveFailed as error:  # known to this rank only
        runtime.failed = True
        print(f"\nerror: {error}; {resume()}", file=sys.stderr, flush=True)
    except (NonFiniteLoss, RanksDiverged, FloatingPointError) as error:  # these and the following are of all ranks
        runtime.error0(f"\nerror: {error}")
    except DataError as error:
        runtime.error0(f"\nerror: data cannot be read: {error}; {trainer.last_good()}; {resume()}")
    except SaveFailed as error:
        runtime.error0(f"\nerror: {error}; {trainer.last_good()} in {folder}; once its disk is in order, {resume()}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = f"--device-batch-size={max(1, trainer.step.device_batch_size // 2)}"
        reason = f"not enough memory: {first_line(error)}; {trainer.last_good()}"
        print(f"\nerror: {reason}; {resume()} {fewer}", file=sys.stderr, flush=True)  # this rank's own, too
    return 1


@contextlib.contextmanager
def keep_error(trainer: Trainer) -> Iterator[None]:
    """Keep the exception that ends the block in `trainer.stopped_by`."""
    try:
        yield
    except Exception as error:
        trainer.stopped_by = error
        raise


def record_so_far(stage: str, values: dict[str, Any]) -> None:
    """Put an unfinished stage into the report. A report that cannot be written stops no training."""
    try:
        record_stage(get_base_dir(), stage, values)
    except (OSError, UserError) as error:
        warn(f"the report could not be written ({error}); training continues")
