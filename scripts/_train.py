"""What the training scripts share: their common flags, and the path from a trainer to a finished run."""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError, get_base_dir, read_json, say, warn, write_json
from nanochat.data.corpus import NoText
from nanochat.distributed.collectives import BackgroundGroup
from nanochat.distributed.signals import StopRequested, stop_when
from nanochat.flash_attention import prepare
from nanochat.gpt import GPT
from nanochat.optim import DistMuonAdamW, MuonAdamW, OptimizerConfig, build_param_groups
from nanochat.recipe import get_recipe
from nanochat.report import record_stage
from nanochat.runtime import TIMEOUT_SECONDS, Runtime, process_age
from nanochat.scaling import REFERENCE_BATCH_TOKENS
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.deadline import Deadline
from nanochat.train.session import (
    Metrics,
    check_sinks,
    command_line,
    cut_metrics,
    measure_peak_flops,
    measure_step,
    merge_saved_config,
    move_aside,
    open_sinks,
    prepare_run,
    run_to_end,
)
from nanochat.train.snapshot import restore_trainer, take_snapshot
from nanochat.trainer import Record, Trainer
from scripts._device_batch import fit_device_batch

# Flags that a resumed run may take anew: none of them can change the numbers.
OPERATIONAL = (
    "run",
    "device_type",
    "resume",
    "resume_from_step",
    "eval_every",
    "eval_tokens",
    "sample_every",
    "save_every",
    "timeout",
    "tensorboard",
    "core_metric_every",
    "core_metric_max_per_task",
    "eval_bundle",
    "skip_bad_shards",
)

# Taken anew if given, and else as it was: where to find what a fingerprint proves to be the same, and how many
# checkpoints to keep, of which a resumed run must not delete more than it was told to.
MOVABLE = ("data", "keep_last")


@dataclass
class TrainFlags:
    run: str = "dummy"
    """Name of the wandb run; "dummy" logs to the run's folder only."""
    tensorboard: bool = False
    """Also log to tensorboard, in the run's folder."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""
    seed: int = 42
    """Seeds weights and data order."""
    model_tag: str = ""
    """Name of the run's folder; empty derives it."""
    compile: str = "auto"
    """on, off, or auto: torch.compile on CUDA only, where it pays back."""
    minutes: float = -1.0
    """Be done after this long, from the program's start to its end: the number of steps follows the clock."""
    num_iterations: int = -1
    """Optimizer steps; -1 derives them."""
    device_batch_size: int = -1
    """Rows per micro-batch and process; -1 chooses. Does not change the result."""
    total_batch_size: int = -1
    """Tokens per optimizer step over all processes; -1 derives it."""
    embedding_lr: float = -1.0
    """Rate of the token embedding at width 768 and 2^19 tokens a step; -1 takes the recipe's, here and below."""
    unembedding_lr: float = -1.0
    """Rate of the output head."""
    matrix_lr: float = -1.0
    """Rate of the matrices inside the blocks (Muon)."""
    scalar_lr: float = -1.0
    """Rate of the per-layer scalars."""
    weight_decay: float = -1.0
    """Cautious decay of the matrices at depth 12; scaled to the run as the recipe says."""
    adam_beta1: float = -1.0
    """AdamW's first moment decay."""
    adam_beta2: float = -1.0
    """AdamW's second moment decay."""
    eval_every: int = 250
    """Steps between evaluations on validation data; -1 only at the end."""
    eval_tokens: int = -1
    """Tokens per evaluation; -1 is 2^17 on a CPU and 20 * 2^19 elsewhere."""
    sample_every: int = 2000
    """Steps between samples; -1 only at the end."""
    save_every: int = -1
    """Steps between checkpoints; -1 only at the end (and on Ctrl-C, SIGTERM or SIGUSR1)."""
    keep_last: int = 2
    """Checkpoints kept; 0 keeps all."""
    resume: bool = False
    """Go on from the run's latest good checkpoint, exactly."""
    resume_from_step: int = -1
    """Go on from this step's checkpoint."""
    timeout: float = TIMEOUT_SECONDS
    """Seconds that processes wait for one that hangs or is gone before the run ends with exit code 1."""

    def optimizer_config(self, recipe: str) -> OptimizerConfig:
        """The recipe's rates, with what the command line gave in their place."""
        names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "adam_beta1", "adam_beta2")
        given = {name: getattr(self, name) for name in names if getattr(self, name) >= 0}
        if "adam_beta2" in given:
            given |= {"head_beta2": self.adam_beta2, "embed_beta2": self.adam_beta2}
        return get_recipe(recipe).optimizer(**given)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be between 0 and 2^63 - 1, got {self.seed}")
        if self.minutes <= 0 and self.minutes != -1:
            raise UserError(f"--minutes must be positive, or -1 for another horizon, got {self.minutes:g}")
        if self.timeout <= 0:
            raise UserError(f"--timeout is in seconds and must be positive, got {self.timeout:g}")
        if self.num_iterations != -1 and self.num_iterations < 1:
            raise UserError(f"--num-iterations must be positive, or -1 to derive it, got {self.num_iterations}")
        if self.compile not in ("auto", "on", "off"):
            raise UserError(f"--compile must be auto, on or off, got {self.compile!r}")
        for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"):
            value = getattr(self, name)
            if value < 0 and value != -1:
                raise UserError(f"--{name.replace('_', '-')} cannot be negative (-1 takes the recipe's), got {value:g}")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not (value == -1 or 0 <= value < 1):
                raise UserError(f"--{name.replace('_', '-')} must be below 1 (or -1 for the recipe's), got {value:g}")

    def evaluation_tokens(self, runtime: Runtime) -> int:
        return self.eval_tokens if self.eval_tokens > 0 else (2**17 if runtime.device.type == "cpu" else 20 * 2**19)


def make_optimizer(
    model: GPT, config: OptimizerConfig, runtime: Runtime, lr_scale: float, weight_decay: float
) -> MuonAdamW:
    """MuonAdamW for this model; the distributed form when there are several processes."""
    # Orthogonalising in bf16 pays only where bf16 products are fast.
    ns_dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32
    groups = build_param_groups(model, config, lr_scale=lr_scale, weight_decay=weight_decay, ns_dtype=ns_dtype)
    return (DistMuonAdamW if runtime.world_size > 1 else MuonAdamW)(groups)


def compiled_loss(model: GPT, wanted: str, runtime: Runtime):
    """model.loss, compiled if asked for."""
    use = wanted == "on" or (wanted == "auto" and runtime.device.type == "cuda")
    if use and wanted == "auto" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warn("no C compiler found, which torch.compile needs: training without it, slower (install gcc or clang)")
        use = False
    if not use:
        return model.loss
    prepare(model.config.sequence_len, (left for left, _ in model.window_sizes), runtime.device)
    return torch.compile(model.loss, dynamic=False)


@dataclass
class Earlier:
    """What an earlier session of the same run fixed. It was measured once and does not move again."""

    num_steps: int  # planned before the first step, which rates and decay rest on; a deadline moves only the schedule
    user_config: dict[str, Any]


def earlier_session(checkpoint: Checkpoint | None, config: TrainFlags, run: Path) -> Earlier | None:
    """The session being resumed: its checkpoint's, or, killed before the first save, its plan if the flags agree."""
    if checkpoint:
        plan = checkpoint.meta["plan"]
        return Earlier(plan.get("planned_steps", plan["num_steps"]), checkpoint.meta["user_config"])
    if config.resume and (run / "plan.json").exists():
        plan = read_json(run / "plan.json")
        asked = {k: v for k, v in asdict(config).items() if k not in OPERATIONAL and v != -1}
        if all(plan["user_config"].get(k) == v for k, v in asked.items()):
            return Earlier(plan["num_steps"], plan["user_config"])
    return None


Flags = TypeVar("Flags", bound=TrainFlags)


def open_session(run: Path, config: Flags, runtime: Runtime) -> tuple[Checkpoint | None, Earlier | None, Flags]:
    """(the checkpoint to go on from, what earlier sessions fixed, the flags with what must not change)."""
    step = None if config.resume_from_step < 0 else config.resume_from_step
    checkpoint = prepare_run(run, config.resume, step, runtime)
    earlier = earlier_session(checkpoint, config, run)
    if earlier:
        config = merge_saved_config(config, earlier.user_config, OPERATIONAL, MOVABLE)
    return checkpoint, earlier, config


def announce(
    run: Path,
    checkpoint: Checkpoint | None,
    config: TrainFlags,
    num_steps: int,
    table: list[tuple[str, str]],
    runtime: Runtime,
) -> None:
    """Take the folder, now that nothing is left that the user could have mistaken; say and keep what was fixed."""
    check_sinks(config.run, config.tensorboard)
    if not checkpoint:
        move_aside(run, runtime)
    if runtime.is_main:
        write_json(run / "plan.json", {"num_steps": num_steps, "user_config": asdict(config)})
        print_table("plan", table)


def batch_for_minutes(device_type: str) -> int:
    """Tokens per step where time, not the data, sets the horizon: many small steps on a slow machine."""
    return 2**13 if device_type == "cpu" else REFERENCE_BATCH_TOKENS


def steps_in(minutes: float, step_seconds: float) -> int:
    """How many steps to plan for; what is left over covers the start, evaluations and the end."""
    return max(1, round(minutes * 60 * 0.93 / step_seconds))


def steps_for_minutes(config: TrainFlags, make_trainer: Any, model: GPT, batch: Any, runtime: Runtime) -> int:
    """How many optimizer steps fit in --minutes, by timing real ones on a copy of the model.

    A first guess, which the run's Deadline corrects as it goes.
    """

    def make(copy: GPT) -> Trainer:
        trainer = make_trainer(copy)
        fit_device_batch(trainer, config.device_batch_size, batch.inputs.size(1))
        return trainer

    seconds = measure_step(make, model, batch, budget=min(10.0, config.minutes * 60 * 0.04))
    steps = steps_in(config.minutes, seconds)
    runtime.print0(f"measured {seconds:.3f} s a step: about {steps} steps fit in {config.minutes:g} minutes")
    return steps


def deadline_for(config: TrainFlags, trainer: Trainer, total_batch_tokens: int) -> Deadline | None:
    """What --minutes asks for, counted from the start of the program to its end."""
    if config.minutes <= 0 or config.num_iterations > 0:
        return None
    started = trainer.runtime.all_reduce_max(process_age(), "reading the clock")
    # Until an evaluation has been timed: a forward pass is about a third of a training step.
    usual = config.minutes * 60 / trainer.schedule.num_steps
    share = config.evaluation_tokens(trainer.runtime) / total_batch_tokens
    trainer.hooks[0].seconds = usual * share / 3  # validation comes first in every script
    deadline = Deadline(
        config.minutes * 60 - started,
        trainer.runtime.all_reduce_max(trainer.closing_hooks_seconds(), "timing the hooks"),
    )
    deadline.go_on(trainer.progress.step, trainer.progress.wall_seconds)
    return deadline


def drive(
    trainer: Trainer,
    *,
    script: str,
    run: Path,
    config: TrainFlags,
    tokenizer: RustBPETokenizer,
    checkpoint: Checkpoint | None,
    total_batch_tokens: int,
    meta: dict[str, Any],
) -> int:
    """From a fresh trainer to the end of its run: restore, log, train, save. Returns the exit code."""
    runtime = trainer.runtime
    planned_steps = trainer.schedule.num_steps
    if checkpoint:
        restore_trainer(trainer, checkpoint)
        runtime.print0(f"resumed at step {checkpoint.step} of {trainer.schedule.num_steps}")
    else:
        fit_device_batch(trainer, config.device_batch_size, trainer.loader.sequence_len)  # type: ignore[attr-defined]
    if runtime.is_main:
        cut_metrics(run / "metrics.jsonl", checkpoint.step if checkpoint else -1)
    sinks = open_sinks(config.run, run, config.tensorboard, asdict(config), runtime.is_main)
    metrics = Metrics(
        run / "metrics.jsonl",
        runtime,
        flops_per_token=trainer.model.estimate_flops(),
        peak_flops=measure_peak_flops(runtime),
        sinks=sinks,
    )
    meta = {
        **meta,
        "model_config": trainer.model.config.to_dict(),
        "user_config": asdict(config),
        "plan": {"planned_steps": planned_steps, "total_batch_tokens": total_batch_tokens},
    }
    trainer.log = Watcher(metrics, script, run, command_line(script, config))
    group = BackgroundGroup(runtime.rank, runtime.world_size, runtime.timeout_seconds)
    trainer.snapshot = partial(
        take_snapshot, run=run, tokenizer=tokenizer, meta=meta, keep_last=config.keep_last, group=group
    )
    trainer.save_every = config.save_every
    trainer.deadline = deadline_for(config, trainer, total_batch_tokens)
    try:
        code = run_to_end(trainer, run, command_line(script, config, resume=True))
        if code and runtime.is_main and trainer.progress.step:  # what stopped early is no longer under way
            figures = training_figures(trainer, run, command_line(script, config))
            record_so_far(script, figures | {"stopped_early": True})
        return code
    finally:
        trainer.saver.close()
        metrics.close()
        trainer.loader.close()  # type: ignore[attr-defined]


@dataclass
class Watcher:
    """A trainer's log that also draws the report anew at each evaluation: report.html follows the run."""

    metrics: Metrics
    stage: str
    run: Path
    command: str

    def __call__(self, trainer: Trainer, record: Record) -> None:
        self.metrics(trainer, record)
        if "val_bpb" in record and trainer.runtime.is_main and trainer.progress.step < trainer.schedule.num_steps:
            figures = training_figures(trainer, self.run, self.command)
            rate = {"tokens": trainer.progress.tokens, "tokens_per_second": self.metrics.rate}
            record_so_far(self.stage, figures | rate | {"status": "running"})


def record_so_far(stage: str, values: dict[str, Any]) -> None:
    """Put an unfinished stage into the report. A report that cannot be written stops no training."""
    try:
        record_stage(get_base_dir(), stage, values)
    except (OSError, UserError) as error:
        warn(f"the report could not be written ({error}); training goes on")


def note_bpb(trainer: Trainer, measure: Callable[[], float]) -> Record:
    """Keep a validation figure with the run's progress, and give it to the step's metrics line. Without one go on where
    nothing is left to measure on (the one validation shard was bad), or a signal came and the data did not."""
    now = trainer.progress
    try:
        with stop_when(lambda: trainer.stop_signal is not None):
            now.val_bpb = measure()
        if not math.isfinite(now.val_bpb):
            raise NoText(f"bits per byte are {now.val_bpb}: no target has a byte, or the model has diverged")
    except (NoText, StopRequested) as error:
        now.val_bpb = None
        trainer.runtime.warn0(f"not evaluated: {error}")
        return {}
    now.best_val_bpb = min(now.val_bpb, now.best_val_bpb or now.val_bpb)
    return {"val_bpb": now.val_bpb}


def tell_bpb(trainer: Trainer) -> str:
    """The validation figure at a run's end."""
    bpb = trainer.progress.val_bpb
    return "val bpb not measured" if bpb is None else f"val bpb {bpb:.4f}"


def training_figures(trainer: Trainer, run: Path, command: str) -> dict[str, Any]:
    """What the report keeps of any training stage."""
    now = trainer.progress
    return {
        "seconds": now.wall_seconds,
        "train_seconds": now.seconds,
        "val_bpb": now.val_bpb,
        "best_val_bpb": now.best_val_bpb,
        "loss": now.debiased_loss(),
        "steps": now.step,
        "num_params": trainer.model.num_scaling_params()["total"],
        "loader": trainer.loader.stats(),  # type: ignore[attr-defined]
        "metrics": os.path.relpath(run / "metrics.jsonl", get_base_dir()),
        "command": command,
    }


def print_samples(samples: list[dict[str, str]]) -> None:
    """Prompts and what came of them, from inside a run."""
    say("")
    for item in samples:
        say(f"  {item['prompt']} -> {item['text']!r}")


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Name/value rows on the console."""
    table = Table(title=escape(title), show_header=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get(), end="")
