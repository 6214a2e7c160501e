"""Finetune a base model on conversations: `python -m scripts.chat_sft`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanochat.common import UserError, format_count, get_base_dir, say
from nanochat.dataloader import ConversationLoader
from nanochat.gpt import GPT
from nanochat.recipe import get_recipe
from nanochat.report import record_stage
from nanochat.runtime import Runtime
from nanochat.scaling import align_batch, batch_lr_scale, scaled_weight_decay
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.session import choose_device_batch, command_line, only_session
from nanochat.trainer import Hook, Record, Trainer
from scripts import _cli
from scripts._device_batch import random_batch
from scripts._observe import continuations, loader_bpb
from scripts._start import Start, own_run, resumed_model, starting_model
from scripts._train import (
    TrainFlags,
    announce,
    compiled_loss,
    drive,
    make_optimizer,
    note_bpb,
    open_session,
    print_samples,
    steps_for_minutes,
    tell_bpb,
    training_figures,
)
from tasks.common import TaskMixture
from tasks.mixtures import describe_parts, load_mixture

EVAL_ROWS = 8  # per evaluation step over all processes: there may be few held-out conversations
QUESTIONS = ("Hello! Who are you?", "What is 17 + 25?", "Spell the word: garden", "What is the capital of France?")


@dataclass
class Config(TrainFlags):
    """Finetune a base model on conversations. Sizes and tokenizer are the base model's. -1 means "derive it"."""

    base_tag: str = ""
    """Tag of the base run to start from; empty takes the latest."""
    model_step: int = -1
    """Its step; -1 takes the last."""
    data: str = "starter"
    """starter, published (the public mixture, as far as its data is at hand), or a .jsonl of your conversations."""
    init_lr_frac: float = 1.0
    """All rates are multiplied by this."""
    num_epochs: int = 1
    """Passes over the mixture, unless --num-iterations or --minutes says otherwise."""
    warmdown_ratio: float = 0.2
    """Share of the run over which the rates fall linearly to zero."""
    max_seq_len: int = -1
    """Row length in tokens; -1 takes the base model's context."""
    eval_every: int = 100
    """Steps between evaluations on validation conversations; -1 only at the end."""
    sample_every: int = -1
    """Steps between sample answers; -1 only at the end."""
    weight_decay: float = 0.0
    """Cautious decay of the matrices at depth 12, scaled by (12/depth)^2 and to zero over the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs < 1:
            raise UserError(f"--num-epochs must be at least 1, got {self.num_epochs}")
        if self.init_lr_frac <= 0:
            raise UserError(f"--init-lr-frac must be above 0, got {self.init_lr_frac:g}")
        if self.weight_decay < 0:
            raise UserError(f"--weight-decay cannot be negative, got {self.weight_decay:g}")


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(config.device_type, seed=config.seed, timeout_seconds=config.timeout) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One finetuning run, fresh or resumed, to its end. Returns the exit code."""
    base_dir = get_base_dir()
    run = own_run("sft", "base", config, config.base_tag, base_dir)
    with only_session(run, runtime):
        return train_in(run, config, runtime, base_dir)


def train_in(run: Path, config: Config, runtime: Runtime, base_dir: Path) -> int:
    """The same, in the run's folder, which is ours alone."""
    checkpoint, earlier, config = open_session(run, config, runtime)
    start = (
        resumed_model(checkpoint, runtime)
        if checkpoint
        else starting_model("base", run, config.base_tag, config.model_step, runtime, base_dir)
    )
    model, tokenizer = start.model, start.tokenizer
    runtime.print0(f"{runtime.describe()}\nbase model: {start.tag}, step {start.step}; run folder: {run}")

    train_parts, val_parts, missing = load_mixture(config.data, config.seed)
    for reason in missing:
        runtime.print0(f"skipped: {reason}")
    if not train_parts or not val_parts:
        raise UserError("no public data set is at hand: set NANOCHAT_DATASETS_DIR to a mirror, or use --data=starter")
    mixture = TaskMixture([p.task for p in train_parts], seed=config.seed)
    data = mixture.fingerprint()
    if checkpoint and checkpoint.meta["data"] != data:
        raise UserError(
            f"the conversations have changed since step {checkpoint.step} was saved: cannot resume "
            "exactly; give the same --data, or start a new run"
        )
    T, rows = row_sizes(config, start)
    loader_for = partial(
        ConversationLoader, tokenizer=tokenizer, sequence_len=T, rank=runtime.rank, world_size=runtime.world_size
    )
    endless = config.num_iterations > 0 or config.minutes > 0
    training = partial(
        loader_for, mixture, rows_per_step=rows, seed=config.seed, num_epochs=None if endless else config.num_epochs
    )
    validation = partial(
        loader_for, TaskMixture([p.task for p in val_parts], seed=0), rows_per_step=EVAL_ROWS, seed=0, num_epochs=1
    )
    for make_loader, use in ((training, "train on"), (validation, "validate on (the last of a file are held out)")):
        probe = make_loader()
        try:  # conversations of which none fits are found now, not hours later
            probe.next_batch()
        except UserError as error:
            raise UserError(f"nothing to {use}: {error}") from None
        finally:
            probe.close()
    loader = training()
    make_trainer = partial(build_trainer, config, start.recipe, runtime, rows, T)
    num_steps = earlier.num_steps if earlier else find_horizon(config, make_trainer, model, loader, rows, T, runtime)
    trainer = make_trainer(model=model, loader=loader, num_steps=num_steps)
    plan = [
        *describe_parts(train_parts),
        ("row length", f"{T}"),
        ("tokens per step", f"{rows * T:,}"),
        ("steps", f"{num_steps:,}"),
    ]
    announce(run, checkpoint, config, num_steps, plan, runtime)
    steps = max(1, config.evaluation_tokens(runtime) // (EVAL_ROWS * T))
    trainer.hooks = [
        Hook(partial(evaluate, validation=validation, tokenizer=tokenizer, steps=steps), config.eval_every),
        Hook(partial(sample, tokenizer=tokenizer), config.sample_every),
    ]
    base = {"tag": start.tag, "step": start.step, "recipe": start.recipe}
    code = drive(
        trainer,
        script="chat_sft",
        run=run,
        config=config,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        total_batch_tokens=rows * T,
        meta={"stage": "sft", "base": base, "data": data},
    )
    if code == 0 and runtime.is_main:
        report(base_dir, run, config, trainer, tokenizer, plan, start.tag)
    return code


def row_sizes(config: Config, start: Start) -> tuple[int, int]:
    """(tokens of a row, rows of a step over all processes): as given, or the base model's."""
    context = start.model.config.sequence_len
    T = context if config.max_seq_len == -1 else config.max_seq_len
    if not 2 <= T <= context:
        raise UserError(f"--max-seq-len must lie between 2 and the base model's {context}, got {T}")
    total = start.total_batch_tokens if config.total_batch_size == -1 else config.total_batch_size
    if total < 1:
        raise UserError(f"--total-batch-size must be positive, in tokens, or -1 for the base model's, got {total}")
    return T, align_batch(total, T) // T


def find_horizon(
    config: Config,
    make_trainer: Callable[..., Trainer],
    model: GPT,
    loader: ConversationLoader,
    rows: int,
    T: int,
    runtime: Runtime,
) -> int:
    """Steps: as given, or what fits in --minutes, or the mixture's epochs."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.minutes <= 0:
        return loader.num_steps()
    batch = random_batch(rows, T, model.config.vocab_size, runtime, supervised=0.5)  # about half is prompt
    return steps_for_minutes(
        config, lambda copy: make_trainer(model=copy, loader=None, num_steps=1000), model, batch, runtime
    )


def build_trainer(
    config: Config, recipe: str, runtime: Runtime, rows: int, T: int, model: GPT, loader: Any, num_steps: int
) -> Trainer:
    """Optimizer and loop around `model`."""
    rules = get_recipe(recipe).plan
    lr_scale = rules.lr_scale * batch_lr_scale(rows * T, rules.batch_exponent) * config.init_lr_frac
    decay = scaled_weight_decay(config.weight_decay, model.config.n_layer)
    optimizer = make_optimizer(model, config.optimizer_config(recipe), runtime, lr_scale, decay)
    schedule = ScheduleConfig(num_steps, warmdown_ratio=config.warmdown_ratio)
    micro = choose_device_batch(config.device_batch_size, rows, T, runtime)
    return Trainer(
        model, optimizer, loader, runtime, schedule, micro, loss_fn=compiled_loss(model, config.compile, runtime)
    )


def evaluate(
    trainer: Trainer, validation: Callable[[], ConversationLoader], tokenizer: RustBPETokenizer, steps: int
) -> Record:
    """Bits per byte on the assistant's tokens of held-out conversations."""
    return note_bpb(
        trainer,
        partial(loader_bpb, trainer.model, validation, tokenizer, trainer.runtime, steps, trainer.device_batch_size),
    )


def answers(model: GPT, tokenizer: RustBPETokenizer) -> list[dict[str, str]]:
    """Greedy answers to the fixed questions."""
    empty = {"role": "assistant", "content": ""}
    prompts = [
        (question, tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}, empty]}))
        for question in QUESTIONS
    ]
    return continuations(model, tokenizer, prompts, max_tokens=64)


def sample(trainer: Trainer, tokenizer: RustBPETokenizer) -> None:
    """Print answers to the fixed questions."""
    if trainer.runtime.is_main:
        print_samples(answers(trainer.model, tokenizer))


def report(
    base_dir: Path,
    run: Path,
    config: Config,
    trainer: Trainer,
    tokenizer: RustBPETokenizer,
    plan: list[tuple[str, str]],
    started_from: str,
) -> None:
    """Hand the run's figures to the report."""
    now = trainer.progress
    values = training_figures(trainer, run, command_line("chat_sft", config)) | {
        "tokens": now.tokens,
        "tokens_per_second": now.tokens / max(now.seconds, 1e-9),
        "mixture": plan,
        "samples": answers(trainer.model, tokenizer),
        "started_from": started_from,
    }
    record_stage(base_dir, "chat_sft", values)
    say(
        f"{now.step} steps, {format_count(now.tokens)} supervised tokens in {values['seconds']:.0f} s; "
        f"{tell_bpb(trainer)}; saved in {run}"
    )


if __name__ == "__main__":
    _cli.run(main)
