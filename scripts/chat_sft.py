"""Finetune a base model on conversations: `python -m scripts.chat_sft`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from nanochat.common import UserError, get_base_dir
from nanochat.dataloader import ConversationLoader
from nanochat.evals.bits_per_byte import loader_bpb
from nanochat.evals.samples import continuations
from nanochat.gpt import GPT
from nanochat.ranges import Range
from nanochat.recipe import get_recipe
from nanochat.runtime import Runtime
from nanochat.scaling import align_batch, batch_lr_scale, scaled_weight_decay
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.build import make_step
from nanochat.train.config import OnResume, TrainConfig
from nanochat.train.device_batch import random_batch
from nanochat.train.hooks import sample_hook, validation_hook
from nanochat.train.run import open_run
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.starting_model import StartingModel, finetuning_dir, load_starting_model, resumed_model
from nanochat.train.step import TrainStep
from nanochat.train.timing import steps_for_minutes
from nanochat.trainer import Hook, Trainer
from scripts import _cli
from tasks.common import TaskMixture
from tasks.mixtures import Part, describe_parts, load_mixture

EVAL_ROWS = 8  # per evaluation step over all ranks: there may be few held-out conversations
QUESTIONS = ("Hello! Who are you?", "What is 17 + 25?", "Spell the word: garden", "What is the capital of France?")


@dataclass
class Config(TrainConfig):
    """Finetune a base model on conversations. Sizes and tokenizer are the base model's. -1 means "derive it"."""

    base_tag: str = ""
    """Tag of the base run to start from; empty takes the latest."""
    model_step: int = -1
    """Its step; -1 takes the last."""
    data: Annotated[str, OnResume.IF_GIVEN] = "starter"
    """starter, published (the public mixture, as far as its data is at hand), or a .jsonl of your conversations."""
    init_lr_frac: Annotated[float, Range(above=0)] = 1.0
    """All rates are multiplied by this."""
    num_epochs: Annotated[int, Range(1)] = 1
    """Passes over the mixture, unless --num-iterations or --minutes says otherwise."""
    warmdown_ratio: Annotated[float, Range(0, 1)] = 0.2
    """Share of the run over which the rates fall linearly to zero."""
    max_seq_len: int = -1
    """Row length in tokens; -1 takes the base model's context."""
    eval_every: Annotated[int, OnResume.NEW] = 100
    """Steps between evaluations on validation conversations; -1 only at the end."""
    sample_every: Annotated[int, OnResume.NEW] = -1
    """Steps between sample answers; -1 only at the end."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Cautious decay of the matrices at depth 12, scaled by (12/depth)^2 and to zero over the run."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(config.device_type, seed=config.seed, timeout_seconds=config.timeout) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One finetuning run, fresh or resumed, to its end. Returns the exit code."""
    base_dir = get_base_dir()
    folder = finetuning_dir("sft", "base", config, config.base_tag, base_dir)
    with open_run("chat_sft", folder, config, runtime) as run:
        config, checkpoint = run.config, run.checkpoint
        if checkpoint:
            start = resumed_model(checkpoint, runtime)
        else:
            start = load_starting_model("base", folder, config.base_tag, config.model_step, runtime, base_dir)
        model, tokenizer = start.model, start.tokenizer
        runtime.print0(f"{runtime.describe()}\nbase model: {start.tag}, step {start.step}; run folder: {folder}")

        train_parts, val_parts = open_mixture(config, runtime)
        mixture = TaskMixture([p.task for p in train_parts], seed=config.seed)
        data = mixture.fingerprint()
        if checkpoint and checkpoint.meta["data"] != data:
            raise UserError(
                f"the conversations have changed since step {checkpoint.step} was saved: cannot resume "
                "exactly; give the same --data, or start a new run"
            )
        T, rows = row_sizes(config, start)
        make_loader = partial(
            ConversationLoader, tokenizer=tokenizer, sequence_len=T, rank=runtime.rank, world_size=runtime.world_size
        )
        endless = config.num_iterations > 0 or config.minutes > 0
        epochs = None if endless else config.num_epochs
        training = partial(make_loader, mixture, rows_per_step=rows, seed=config.seed, num_epochs=epochs)
        held_out = TaskMixture([p.task for p in val_parts], seed=0)
        validation = partial(make_loader, held_out, rows_per_step=EVAL_ROWS, seed=0, num_epochs=1)
        check_conversations(training, "train on")
        check_conversations(validation, "validate on (the last of a file are held out)")

        loader = training()
        make_step = partial(build_step, config, start.recipe, runtime, rows, T)
        num_steps = run.planned_steps or find_horizon(config, make_step, model, loader, rows, T, runtime)
        trainer = Trainer(make_step(model, num_steps=num_steps), loader)
        plan = [
            *describe_parts(train_parts),
            ("row length", f"{T}"),
            ("tokens per step", f"{rows * T:,}"),
            ("steps", f"{num_steps:,}"),
        ]
        run.begin(num_steps, plan)
        trainer.hooks = make_hooks(config, validation, tokenizer, runtime, T)
        code = run.train(
            trainer,
            tokenizer,
            sequence_len=T,
            total_batch_tokens=rows * T,
            meta={"stage": "sft", "base": start.record, "data": data},
        )
        if code == 0 and runtime.is_main:
            now = trainer.progress
            values = {
                "tokens": now.tokens,
                "tokens_per_second": now.tokens / max(now.seconds, 1e-9),
                "mixture": plan,
                "samples": answers(model, tokenizer),
                "started_from": start.tag,
            }
            run.report(trainer, values)
        return code


def open_mixture(config: Config, runtime: Runtime) -> tuple[list[Part], list[Part]]:
    """The data sets to train and to validate on. Prints which of them are missing."""
    train_parts, val_parts, missing = load_mixture(config.data, config.seed)
    for reason in missing:
        runtime.print0(f"skipped: {reason}")
    if not train_parts or not val_parts:
        raise UserError("no public data set is at hand: set NANOCHAT_DATASETS_DIR to a mirror, or use --data=starter")
    return train_parts, val_parts


def check_conversations(make_loader: Callable[[], ConversationLoader], purpose: str) -> None:
    """Raise UserError now, not hours later, if no conversation fits."""
    loader = make_loader()
    try:
        loader.next_batch()
    except UserError as error:
        raise UserError(f"nothing to {purpose}: {error}") from None
    finally:
        loader.close()


def row_sizes(config: Config, start: StartingModel) -> tuple[int, int]:
    """(tokens of a row, rows of a step over all ranks): as given, or the base model's."""
    context = start.model.config.sequence_len
    T = context if config.max_seq_len == -1 else config.max_seq_len
    if not 2 <= T <= context:
        raise UserError(f"--max-seq-len must lie between 2 and the base model's {context}, got {T}")
    total = start.total_batch_tokens if config.total_batch_size == -1 else config.total_batch_size
    return T, align_batch(total, T) // T


def find_horizon(
    config: Config,
    make_step: Callable[..., TrainStep],
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
    return steps_for_minutes(config, partial(make_step, num_steps=1000), model, batch, runtime)


def build_step(
    config: Config, recipe: str, runtime: Runtime, rows: int, T: int, model: GPT, num_steps: int
) -> TrainStep:
    """The optimizer step of `model`, with the rates that the recipe and the batch call for."""
    rules = get_recipe(recipe).plan
    lr_scale = rules.lr_scale * batch_lr_scale(rows * T, rules.batch_exponent) * config.init_lr_frac
    decay = scaled_weight_decay(config.weight_decay, model.config.n_layer)
    schedule = ScheduleConfig(num_steps, warmdown_ratio=config.warmdown_ratio)
    return make_step(
        model,
        config,
        recipe,
        schedule,
        runtime,
        rows=rows,
        T=T,
        lr_scale=lr_scale,
        weight_decay=decay,
        compile=config.compile,
    )


def make_hooks(
    config: Config,
    validation: Callable[[], ConversationLoader],
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    T: int,
) -> list[Hook]:
    """Bits per byte on the assistant's tokens of held-out conversations, and answers to the fixed questions."""
    tokens = config.evaluation_tokens(runtime)
    steps = max(1, tokens // (EVAL_ROWS * T))

    def measure(trainer: Trainer) -> float:
        return loader_bpb(trainer.model, validation, tokenizer, runtime, steps, trainer.step.device_batch_size)

    return [
        validation_hook(measure, config.eval_every, tokens),
        sample_hook(partial(answers, tokenizer=tokenizer), config.sample_every),
    ]


def answers(model: GPT, tokenizer: RustBPETokenizer) -> list[dict[str, str]]:
    """Greedy answers to the fixed questions."""
    empty = {"role": "assistant", "content": ""}
    prompts = [
        (question, tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}, empty]}))
        for question in QUESTIONS
    ]
    return continuations(model, tokenizer, prompts, max_tokens=64)


if __name__ == "__main__":
    _cli.run(main)
