"""Supervised finetuning: its flags, and the sizes, horizon and training step that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from nanochat.common import UserError
from nanochat.common.ranges import Range
from nanochat.dataloader import ConversationLoader
from nanochat.evals.bits_per_byte import loader_bpb, measured_tokens
from nanochat.evals.samples import continuations
from nanochat.gpt import GPT
from nanochat.recipe import get_recipe
from nanochat.runtime import Runtime
from nanochat.scaling import align_batch, batch_lr_scale, scaled_weight_decay
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.build import create_step, random_batch
from nanochat.train.config import OnResume, TrainConfig
from nanochat.train.hooks import sample_hook, validate
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.starting_model import StartingModel
from nanochat.train.step import TrainStep
from nanochat.train.timing import steps_for_minutes
from nanochat.trainer import Hook, Record, Trainer

QUESTIONS = ("Hello! Who are you?", "What is 17 + 25?", "Spell the word: garden", "What is the capital of France?")
FEW_STEPS, ENOUGH_STEPS = 10, 50  # fewer steps than the first draw a warning, which aims at the second


@dataclass
class FinetuneConfig(TrainConfig):
    """Finetune a base model on conversations. Sizes and tokenizer are the base model's. -1 means "derive it"."""

    source: Literal["base", "sft"] = "base"
    """Which model to start from: base, or sft to train one further."""
    base_tag: str = ""
    """Tag of its run; empty takes the one of this run's name, else the latest."""
    model_step: Annotated[int, Range(-1)] = -1
    """Its step; -1 takes the last."""
    data: Annotated[str, OnResume.IF_GIVEN] = "starter"
    """starter, published, files of conversations, or several: starter,mine.jsonl:3 (three passes; docs/own_data.md)."""
    strict: Annotated[bool, OnResume.NEW] = False
    """Stop where a conversation cannot be used, instead of leaving it out."""
    init_lr_frac: Annotated[float, Range(above=0)] = 1.0
    """All rates are multiplied by this."""
    num_epochs: Annotated[int, Range(1)] = 1
    """Passes over the mixture, unless --num-iterations or --minutes says otherwise."""
    warmdown_ratio: Annotated[float, Range(0, 1)] = 0.2
    """Share of the run over which the rates fall linearly to zero."""
    max_seq_len: Annotated[int, Range(2, unset=-1)] = -1
    """Row length in tokens; -1 takes the base model's context."""
    eval_every: Annotated[int, Range(-1), OnResume.NEW] = 100
    """Steps between evaluations on validation conversations; -1 only at the end."""
    sample_every: Annotated[int, Range(-1), OnResume.NEW] = -1
    """Steps between sample answers; -1 only at the end."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Cautious decay of the matrices at depth 12, scaled by (12/depth)^2 and to zero over the run."""

    def start_from(self, tag: str) -> dict[str, Any]:
        return {"source": "sft", "base_tag": tag, "model_step": -1}

    @property
    def epochs(self) -> int | None:
        """Passes over the mixture that end the run; None if steps or the clock do."""
        return None if self.num_iterations > 0 or self.minutes > 0 else self.num_epochs


class RowSizes(NamedTuple):
    """The shape of a global batch: `rows` rows of T tokens, over all ranks."""

    rows: int
    T: int


def row_sizes(config: FinetuneConfig, start: StartingModel) -> RowSizes:
    """As given, or the base model's."""
    context = start.model.config.sequence_len
    T = context if config.max_seq_len == -1 else config.max_seq_len
    if not 2 <= T <= context:
        raise UserError(f"--max-seq-len must lie between 2 and the base model's {context}, got {T}")
    total = start.total_batch_tokens if config.total_batch_size == -1 else config.total_batch_size
    return RowSizes(align_batch(total, T) // T, T)


def find_horizon(
    config: FinetuneConfig,
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
        num_steps = loader.num_steps()
        if num_steps < FEW_STEPS:
            total = align_batch(max(1, num_steps * sizes.rows // ENOUGH_STEPS) * sizes.T, sizes.T)
            steps = f"{num_steps} step{'' if num_steps == 1 else 's'}"
            runtime.warn0(
                f"the conversations fill only {steps} of {sizes.rows * sizes.T:,} tokens: little will be learnt. "
                f"Give --total-batch-size={total}, or a larger --num-epochs"
            )
        return num_steps
    batch = random_batch(*sizes, model.config.vocab_size, runtime, supervised=0.5)  # about half is prompt
    return steps_for_minutes(config, lambda copy: make_step(copy, 1000), model, batch, runtime)


def build_step(
    config: FinetuneConfig, recipe: str, sizes: RowSizes, model: GPT, num_steps: int, runtime: Runtime
) -> TrainStep:
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
    config: FinetuneConfig,
    make_validation: Callable[[], ConversationLoader],
    held_out_tokens: float,
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
) -> list[Hook]:
    """Bits per byte on the assistant's tokens of held-out conversations, answers to the fixed questions, and counts of
    the conversations read. `held_out_tokens`: what there is to evaluate, without padding."""
    validation = make_validation()
    T = validation.sequence_len
    tokens = measured_tokens(config.evaluation_tokens(runtime), T, validation.rows_per_step)
    steps = tokens // (validation.rows_per_step * T)
    if held_out_tokens < tokens:  # they may end before what was asked for
        tokens = min(tokens, validation.num_rows() * T)

    def measure(trainer: Trainer) -> float:
        rows = trainer.step.device_batch_size
        return loader_bpb(trainer.model, make_validation, tokenizer, runtime, steps, rows)

    return [
        Hook(partial(validate, measure=measure), config.eval_every, tokens=tokens),
        sample_hook(partial(answers, tokenizer=tokenizer), config.sample_every),
        Hook(count_conversations, 1),
    ]


def count_conversations(trainer: Trainer) -> Record:
    """How many conversations the steps so far have trained on; how many were truncated, and left out, on the way."""
    stats = trainer.loader.stats()
    names = {"conversations": "trained", "truncated": "truncated", "left_out": "skipped", "epoch": "epoch"}
    return {name: stats[key] for name, key in names.items()}


def answers(model: GPT, tokenizer: RustBPETokenizer) -> list[dict[str, str]]:
    """Greedy answers to the fixed questions."""
    empty = {"role": "assistant", "content": ""}
    prompts = [
        (question, tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}, empty]}))
        for question in QUESTIONS
    ]
    return continuations(model, tokenizer, prompts, max_tokens=64)
