"""Pretrain a base model: `python -m scripts.base_train --depth=4`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanochat import fp8
from nanochat.checkpoint_manager import Checkpoint, load_model_state, run_dir
from nanochat.common import UserError, format_count, format_seconds, get_base_dir, say
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Corpus, SavedCorpus, open_corpus, save_record
from nanochat.gpt import GPT, GPTConfig
from nanochat.planning.hardware import usual_price
from nanochat.planning.law import Law
from nanochat.recipe import get_recipe, recipe_rules
from nanochat.report import record_stage
from nanochat.runtime import Runtime, process_age
from nanochat.scaling import Plan, align_batch, describe, make_plan, scaling_params
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.train.session import choose_device_batch, command_line, only_session
from nanochat.trainer import Hook, Record, Trainer
from scripts import _cli
from scripts._core import core_seconds, open_bundle, watch_core
from scripts._device_batch import random_batch
from scripts._model import ModelFlags, network
from scripts._observe import continuations, corpus_bpb
from scripts._pace import choose_depth
from scripts._start import open_source
from scripts._train import (
    Earlier,
    TrainFlags,
    announce,
    batch_for_minutes,
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

PROMPTS = ("The capital of France is", "Once upon a time", "The sun is", "My favourite food is")


@dataclass
class Config(ModelFlags, TrainFlags):
    """Pretrain a base model from raw text. -1 means "off" or "derive it"."""

    data: str = ""
    """starter, fineweb-edu, climbmix, or a path, glob or URL of parquet, jsonl or txt; empty: what is there."""
    skip_bad_shards: bool = False
    """Go on without files of the data that are missing or damaged, and say which."""
    depth: int = 12
    """The one dial: layers. Width, heads, horizon, batch and rates follow. -1 with --minutes: what fits the time."""
    max_seq_len: int = -1
    """Context length in tokens; -1 is 2048, or with --init-from what that model has."""
    warmup_steps: int = 0
    """Linear warm-up, in steps."""
    warmup_ratio: float = -1.0
    """Linear warm-up as a share of the run; overrides --warmup-steps."""
    warmdown_ratio: float = -1.0
    """Share of the run over which the rates fall linearly; -1 takes the recipe's, here and below."""
    final_lr_frac: float = -1.0
    """Where they end, as a share of the peak."""
    lr_scale: float = 1.0
    """All rates are multiplied by this: short runs on small batches want more than the square root of the batch."""
    init_from: str = ""
    """Folder of another base run (or its tag) whose weights to start from, with fresh schedules."""
    fp8: bool = False
    """Matrix products of the blocks in fp8; needs a GPU of compute capability 8.9 (Ada, Hopper) and torchao."""
    fp8_recipe: str = "tensorwise"
    """One fp8 scale per tensor (tensorwise, the fastest) or per row (rowwise, more exact)."""
    core_metric_every: int = -1
    """Steps between CORE evaluations; there is one at the end too."""
    core_metric_max_per_task: int = 500
    """Items per CORE task; -1 takes all."""
    eval_bundle: str = ""
    """Folder of the CORE bundle; empty: eval_bundle/ in the base folder, downloaded if it is not there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core_metric_max_per_task == 0 or self.core_metric_max_per_task < -1:
            raise UserError(
                f"--core-metric-max-per-task must be positive, or -1 for all, got {self.core_metric_max_per_task}"
            )
        if self.warmup_ratio != -1 and not 0 <= self.warmup_ratio <= 1:
            raise UserError(
                f"--warmup-ratio is a share of the run, from 0 to 1, or -1 for --warmup-steps, got "
                f"{self.warmup_ratio:g}"
            )
        if self.lr_scale < 0:
            raise UserError(f"--lr-scale cannot be negative, got {self.lr_scale:g}")


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(config.device_type, seed=config.seed, timeout_seconds=config.timeout) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One pretraining run, fresh or resumed, to its end. Returns the exit code."""
    base_dir = get_base_dir()
    if not config.model_tag and (config.depth == -1 or config.init_from):
        flag = "--init-from" if config.init_from else "--depth=-1"
        raise UserError(f"{flag} needs --model-tag: the run's folder cannot be named after a depth not known yet")
    run = run_dir(base_dir, "base", config.model_tag or f"d{config.depth}")
    with only_session(run, runtime):
        return train_in(run, config, runtime, base_dir)


def train_in(run: Path, config: Config, runtime: Runtime, base_dir: Path) -> int:
    """The same, in the run's folder, which is ours alone."""
    checkpoint, earlier, config = open_session(run, config, runtime)
    tokenizer = checkpoint.tokenizer() if checkpoint else get_tokenizer()
    saved = None
    if checkpoint:
        saved = SavedCorpus.load(run, checkpoint.step, checkpoint.meta["corpus"], checkpoint.loader_state())
    corpus = open_corpus(config.data, base_dir, runtime, skip_bad=config.skip_bad_shards, saved=saved)
    bundle = open_bundle(config.eval_bundle, base_dir, runtime) if config.core_metric_every > 0 else None
    model = build_model(config, checkpoint, tokenizer, runtime, base_dir)
    runtime.print0(f"{runtime.describe()}\ndata: {corpus.name}; run folder: {run}")

    plan = fix_plan(config, model, runtime, earlier)
    loader = PretrainLoader(
        corpus,
        tokenizer,
        sequence_len=config.max_seq_len,
        seed=config.seed,
        rows_per_step=plan.total_batch_tokens // config.max_seq_len,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    trainer = build_trainer(config, plan, runtime, model, loader)
    announce(run, checkpoint, config, plan.num_steps, describe(model.config, plan), runtime)
    if runtime.is_main and not checkpoint:
        save_record(corpus, run)
    tokens = config.evaluation_tokens(runtime)
    trainer.hooks = [
        Hook(partial(evaluate, corpus=corpus, tokenizer=tokenizer, tokens=tokens), config.eval_every),
        Hook(partial(sample, tokenizer=tokenizer), config.sample_every),
    ]
    if bundle:
        core = partial(watch_core, tokenizer=tokenizer, bundle=bundle)
        most = config.core_metric_max_per_task
        seconds = core_seconds(trainer, core, bundle, most) if config.minutes > 0 else None  # to leave room for
        trainer.hooks.append(Hook(partial(core, most=most), config.core_metric_every, seconds=seconds))
    code = drive(
        trainer,
        script="base_train",
        run=run,
        config=config,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        total_batch_tokens=plan.total_batch_tokens,
        meta={"stage": "base", "corpus": corpus.fingerprint},
    )
    if code == 0 and runtime.is_main:
        report(base_dir, run, config, trainer, plan)
    return code


def build_model(
    config: Config, checkpoint: Checkpoint | None, tokenizer: RustBPETokenizer, runtime: Runtime, base_dir: Path
) -> GPT:
    """The model to train: a resumed run's (its weights come later), another run's with its weights, or a new one.

    What was left to derive, depth and context, is filled into `config`.
    """
    make = partial(GPT.create, device=runtime.device, compute_dtype=runtime.dtype, seed=config.seed)
    if checkpoint:
        return make(GPTConfig.from_dict(checkpoint.meta["model_config"]))
    if config.init_from:
        source = open_source(config.init_from, base_dir)
        if source.tokenizer().hash != tokenizer.hash:
            raise UserError(f"--init-from: {source.path} was trained with another tokenizer")
        model_config = GPTConfig.from_dict(source.meta["model_config"])
        if config.max_seq_len not in (-1, model_config.sequence_len):
            raise UserError(
                f"--init-from: that model's context is {model_config.sequence_len}, "
                f"not {config.max_seq_len}; leave --max-seq-len out"
            )
        config.depth, config.max_seq_len = model_config.n_layer, model_config.sequence_len
        model = make(model_config)
        load_model_state(model, source.model_state(runtime.device), source.path)
        runtime.print0(f"weights from {source.path}; its sizes are kept, the schedules start anew")
        return model
    return make(new_config(config, tokenizer, runtime))


def new_config(config: Config, tokenizer: RustBPETokenizer, runtime: Runtime) -> GPTConfig:
    """The network that the flags describe."""
    of_depth = network(config, tokenizer.get_vocab_size())
    if config.depth == -1:
        if config.minutes <= 0:
            raise UserError("--depth=-1 derives the depth from --minutes: give --minutes, or a depth")
        choice = choose_depth(config.minutes, config.total_batch_size, of_depth, runtime)
        config.depth = choice.key
        runtime.print0(
            f"{config.minutes:g} minutes on this machine suit depth {config.depth}: by the fitted law about "
            f"{format_count(choice.tokens)} tokens and {choice.loss:.3f} bits per byte"
        )
    model_config = of_depth(config.depth)
    config.max_seq_len = model_config.sequence_len
    return model_config


def plan_arguments(config: Config) -> dict[str, Any]:
    """make_plan's arguments, all but the steps."""
    rates = config.optimizer_config(config.recipe)
    return {
        "target_flops": config.target_flops,
        "target_param_data_ratio": config.target_param_data_ratio,
        "total_batch_size": config.total_batch_size,
        **recipe_rules(config.recipe),
        "weight_decay": rates.weight_decay,
        "matrix_lr": rates.matrix_lr,
    }


def fix_plan(config: Config, model: GPT, runtime: Runtime, earlier: Earlier | None) -> Plan:
    """Every number of the run. With --minutes the horizon is what fits, by timing real steps."""
    total = config.total_batch_size
    if total == -1 and config.minutes > 0:
        total = batch_for_minutes(runtime.device.type)
    make = partial(make_plan, model.config, **plan_arguments(config) | {"total_batch_size": total})
    if earlier:
        plan = make(num_iterations=earlier.num_steps)
        plan.horizon = "the run's first session"
        return plan
    if config.minutes <= 0 or config.num_iterations > 0:
        return make(num_iterations=config.num_iterations)
    rows = align_batch(total, config.max_seq_len) // config.max_seq_len
    batch = random_batch(rows, config.max_seq_len, model.config.vocab_size, runtime)
    make_trainer = partial(build_trainer, config, make(num_iterations=1000), runtime, loader=None)
    plan = make(num_iterations=steps_for_minutes(config, make_trainer, model, batch, runtime))
    plan.horizon = f"--minutes={config.minutes:g}"
    return plan


def build_trainer(config: Config, plan: Plan, runtime: Runtime, model: GPT, loader: PretrainLoader | None) -> Trainer:
    """Optimizer and loop around `model`, its products in fp8 if asked for."""
    if config.fp8:
        fp8.convert(model, config.fp8_recipe, runtime)
    lr_scale = plan.lr_scale * config.lr_scale
    optimizer = make_optimizer(model, config.optimizer_config(config.recipe), runtime, lr_scale, plan.weight_decay)
    warmup = round(config.warmup_ratio * plan.num_steps) if config.warmup_ratio >= 0 else config.warmup_steps
    given = {name: getattr(config, name) for name in ("warmdown_ratio", "final_lr_frac") if getattr(config, name) != -1}
    schedule = get_recipe(config.recipe).schedule(plan.num_steps, warmup_steps=warmup, **given)
    rows = plan.total_batch_tokens // config.max_seq_len
    micro = choose_device_batch(config.device_batch_size, rows, config.max_seq_len, runtime)
    return Trainer(
        model,
        optimizer,
        loader,  # type: ignore[arg-type]
        runtime,
        schedule,
        micro,
        loss_fn=compiled_loss(model, config.compile, runtime),
    )


# ---------------------------------------------------------------------------------------------------
# Observers


def evaluate(trainer: Trainer, corpus: Corpus, tokenizer: RustBPETokenizer, tokens: int) -> Record:
    """Validation bits per byte."""
    with fp8.without_fp8(trainer.model):
        return note_bpb(
            trainer,
            partial(
                corpus_bpb,
                trainer.model,
                corpus,
                tokenizer,
                trainer.runtime,
                split="val",
                tokens=tokens,
                device_batch_size=trainer.device_batch_size,
            ),
        )


def sample(trainer: Trainer, tokenizer: RustBPETokenizer) -> None:
    """Print what the model makes of a few prompts."""
    if trainer.runtime.is_main:
        prompts = [(prompt, tokenizer.encode(prompt, prepend="<|bos|>")) for prompt in PROMPTS]
        with fp8.without_fp8(trainer.model):
            print_samples(continuations(trainer.model, tokenizer, prompts, max_tokens=24))


def report(base_dir: Path, run: Path, config: Config, trainer: Trainer, plan: Plan) -> None:
    """Hand the run's figures to the report."""
    now = trainer.progress
    values = training_figures(trainer, run, command_line("base_train", config)) | {
        "tokens": now.tokens,
        "tokens_per_second": now.tokens / max(now.seconds, 1e-9),
        "flops": now.tokens * plan.flops_per_token,
        "plan": describe(trainer.model.config, plan),
        "tables": {"Plan and outcome": plan_and_outcome(config, trainer, plan)},
    }
    if (price := usual_price(trainer.runtime)) is not None:
        values["dollars"] = price * trainer.runtime.world_size * now.wall_seconds / 3600
    record_stage(base_dir, "base_train", values)
    say(f"{values['steps']} steps, {format_count(now.tokens)} tokens in {values['seconds']:.0f} s; {tell_bpb(trainer)}")
    cropped = values["loader"]["cropped_share"]
    say(f"{cropped:.1%} of documents were cut at a row's end (their rest came later); saved in {run}")


def plan_and_outcome(config: Config, trainer: Trainer, plan: Plan) -> list[dict[str, Any]]:
    """What was planned before the first step, and what came of it."""
    now, law = trainer.progress, Law.load()
    rows: list[dict[str, Any]] = [
        {"": "steps", "planned": f"{plan.num_steps:,}", "outcome": f"{now.step:,}"},
        {"": "tokens", "planned": format_count(plan.tokens), "outcome": format_count(now.tokens)},
    ]
    if config.minutes > 0:
        planned = format_seconds(60 * config.minutes)
        taken = format_seconds(max(process_age(), now.wall_seconds))  # the latter counts earlier sessions too
        rows.append({"": "time", "planned": planned, "outcome": taken})
    if law and now.val_bpb is not None:
        forecast = law.forecast(scaling_params(plan.params), plan.tokens)
        rows.append({"": "bits per byte", "planned": str(forecast), "outcome": f"{now.val_bpb:.4f}"})
    return rows


if __name__ == "__main__":
    _cli.run(main)
