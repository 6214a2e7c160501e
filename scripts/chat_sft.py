"""Finetune a base model on conversations: `python -m scripts.chat_sft`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

from nanochat.common import UserError
from nanochat.dataloader import ConversationLoader
from nanochat.evals.bits_per_byte import loader_bpb
from nanochat.evals.samples import continuations
from nanochat.gpt import GPT
from nanochat.ranges import Range
from nanochat.recipe import get_recipe
from nanochat.runtime import Runtime
from nanochat.scaling import align_batch, batch_lr_scale, scaled_weight_decay
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.build import create_step, random_batch
from nanochat.train.config import OnResume, TrainConfig
from nanochat.train.hooks import sample_hook, validate
from nanochat.train.run import open_run
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.starting_model import StartingModel, finetuning_dir, open_starting_model
from nanochat.train.step import TrainStep
from nanochat.train.timing import steps_for_minutes
from nanochat.trainer import Hook, Trainer
from scripts import _cli
from tasks.common import TaskMixture
from tasks.mixtures import describe_parts, load_mixture

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
    folder = finetuning_dir("sft", "base", config, config.base_tag, runtime)
    with open_run("chat_sft", folder, config, runtime) as run:
        config = run.config
        start = open_starting_model(run.checkpoint, "base", folder, config.base_tag, config.model_step, runtime)
        model, tokenizer = start.model, start.tokenizer
        runtime.print0(f"{runtime.describe()}\nbase model: {start.tag}, step {start.step}; run folder: {folder}")

        sizes = row_sizes(config, start)
        data = open_data(config, tokenizer, sizes, runtime)
        if run.checkpoint and run.checkpoint.meta["data"] != data.fingerprint:
            raise UserError(
                f"the conversations have changed since step {run.checkpoint.step} was saved: cannot resume "
                "exactly; give the same --data, or start a new run"
            )
        make_step = partial(build_step, config, start.recipe, sizes, runtime=runtime)
        num_steps = run.planned_steps or find_horizon(config, make_step, model, data.loader, sizes, runtime)
        trainer = Trainer(make_step(model, num_steps), data.loader)
        trainer.hooks = make_hooks(config, data, tokenizer, sizes, runtime)
        tokens_per_step = sizes.rows * sizes.T
        plan = [
            *data.parts,
            ("row length", f"{sizes.T}"),
            ("tokens per step", f"{tokens_per_step:,}"),
            ("steps", f"{num_steps:,}"),
        ]
        run.begin(num_steps, plan)
        meta = {"stage": "sft", "base": start.record, "data": data.fingerprint}
        code = run.train(trainer, tokenizer, sequence_len=sizes.T, total_batch_tokens=tokens_per_step, meta=meta)
        if code == 0 and runtime.is_main:
            samples = answers(model, tokenizer)
            values = {"mixture": plan, "samples": samples, "started_from": start.tag}
            run.report(trainer, trainer.progress.throughput() | values)
        return code


class RowSizes(NamedTuple):
    """The shape of a global batch: `rows` rows of T tokens, over all ranks."""

    rows: int
    T: int


def row_sizes(config: Config, start: StartingModel) -> RowSizes:
    """As given, or the base model's."""
    context = start.model.config.sequence_len
    T = context if config.max_seq_len == -1 else config.max_seq_len
    if not 2 <= T <= context:
        raise UserError(f"--max-seq-len must lie between 2 and the base model's {context}, got {T}")
    total = start.total_batch_tokens if config.total_batch_size == -1 else config.total_batch_size
    return RowSizes(align_batch(total, T) // T, T)


@dataclass
class Data:
    """The conversations to train and to validate on."""

    loader: ConversationLoader
    make_validation: Callable[[], ConversationLoader]
    fingerprint: str
    parts: list[tuple[str, str]]  # name and size of each


def open_data(config: Config, tokenizer: RustBPETokenizer, sizes: RowSizes, runtime: Runtime) -> Data:
    """Raises UserError now, not hours later, where no conversation can be used. Prints which data sets are missing."""
    train_parts, val_parts, missing = load_mixture(config.data, config.seed)
    for reason in missing:
        runtime.print0(f"skipped: {reason}")
    if not train_parts or not val_parts:
        raise UserError("no public data set is at hand: set NANOCHAT_DATASETS_DIR to a mirror, or use --data=starter")
    mixture = TaskMixture([p.task for p in train_parts], seed=config.seed)
    held_out = TaskMixture([p.task for p in val_parts], seed=0)
    make_loader = partial(
        ConversationLoader, tokenizer=tokenizer, sequence_len=sizes.T, rank=runtime.rank, world_size=runtime.world_size
    )
    endless = config.num_iterations > 0 or config.minutes > 0
    epochs = None if endless else config.num_epochs
    loader = make_loader(mixture, rows_per_step=sizes.rows, seed=config.seed, num_epochs=epochs)
    make_validation = partial(make_loader, held_out, rows_per_step=EVAL_ROWS, seed=0, num_epochs=1)
    check_usable(loader, "train on")
    check_usable(make_validation(), "validate on (the last of a file are held out)")
    return Data(loader, make_validation, mixture.fingerprint(), describe_parts(train_parts))


def check_usable(loader: ConversationLoader, purpose: str) -> None:
    """Raise UserError if the loader cannot make its first batch; leave it at its start."""
    while not loader.wait(1.0):
        pass
    failure = loader.failure
    loader.close()
    if isinstance(failure, UserError):
        raise UserError(f"nothing to {purpose}: {failure}") from None


def find_horizon(
    config: Config,
    make_step: Callable[[GPT, int], TrainStep],
    model: GPT,
    loader: ConversationLoader,
    sizes: RowSizes,
    runtime: Runtime,
) -> int:
    """Steps: as given, or what fits in --minutes, or the mixture's epochs."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.minutes <= 0:
        return loader.num_steps()
    batch = random_batch(*sizes, model.config.vocab_size, runtime, supervised=0.5)  # about half is prompt
    return steps_for_minutes(config, lambda copy: make_step(copy, 1000), model, batch, runtime)


def build_step(config: Config, recipe: str, sizes: RowSizes, model: GPT, num_steps: int, runtime: Runtime) -> TrainStep:
    """The optimizer step of `model`, with the rates that the recipe and the batch call for."""
    rules = get_recipe(recipe).plan
    batch_scale = batch_lr_scale(sizes.rows * sizes.T, rules.batch_exponent)
    return create_step(
        model,
        config,
        recipe,
        ScheduleConfig(num_steps, warmdown_ratio=config.warmdown_ratio),
        runtime,
        rows=sizes.rows,
        T=sizes.T,
        lr_scale=rules.lr_scale * batch_scale * config.init_lr_frac,
        weight_decay=scaled_weight_decay(config.weight_decay, model.config.n_layer),
        compile=config.compile,
    )


def make_hooks(
    config: Config, data: Data, tokenizer: RustBPETokenizer, sizes: RowSizes, runtime: Runtime
) -> list[Hook]:
    """Bits per byte on the assistant's tokens of held-out conversations, and answers to the fixed questions."""
    tokens = config.evaluation_tokens(runtime)
    steps = max(1, tokens // (EVAL_ROWS * sizes.T))

    def measure(trainer: Trainer) -> float:
        rows = trainer.step.device_batch_size
        return loader_bpb(trainer.model, data.make_validation, tokenizer, runtime, steps, rows)

    return [
        Hook(partial(validate, measure=measure), config.eval_every, tokens=tokens),
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
