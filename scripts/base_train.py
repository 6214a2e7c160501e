"""Pretrain a base model: `python -m scripts.base_train --depth=4`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from nanochat import fp8
from nanochat.checkpoint_manager import load_model_state, run_dir
from nanochat.common import UserError, format_count, get_base_dir, say
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Corpus, SavedCorpus, open_corpus, save_record
from nanochat.evals.bits_per_byte import corpus_bpb
from nanochat.evals.core_run import open_bundle
from nanochat.evals.samples import continuations
from nanochat.gpt import GPT, GPTConfig
from nanochat.planning.hardware import usual_price
from nanochat.planning.outcome import plan_and_outcome
from nanochat.ranges import Range
from nanochat.recipe import get_recipe, recipe_rules
from nanochat.runtime import Runtime
from nanochat.scaling import Plan, describe, make_plan
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.train.build import create_step
from nanochat.train.config import OnResume, TrainConfig
from nanochat.train.device_batch import random_batch
from nanochat.train.hooks import core_hook, estimate_core_seconds, sample_hook, validation_hook
from nanochat.train.pace import choose_depth
from nanochat.train.run import Run, open_run
from nanochat.train.starting_model import check_source, open_source
from nanochat.train.step import TrainStep
from nanochat.train.timing import batch_for_minutes, steps_for_minutes
from nanochat.trainer import Hook, Trainer
from scripts import _cli
from scripts._flags import ModelFlags

PROMPTS = ("The capital of France is", "Once upon a time", "The sun is", "My favourite food is")


@dataclass
class Config(ModelFlags, TrainConfig):
    """Pretrain a base model from raw text. -1 means "off" or "derive it"."""

    data: Annotated[str, OnResume.IF_GIVEN] = ""
    """starter, fineweb-edu, climbmix, or a path, glob or URL of parquet, jsonl or txt; empty: what is there."""
    skip_bad_shards: Annotated[bool, OnResume.NEW] = False
    """Go on without files of the data that are missing or damaged, and say which."""
    depth: int = 12
    """The one dial: layers. Width, heads, horizon, batch and rates follow. -1 with --minutes: what fits the time."""
    max_seq_len: Annotated[int, Range(2, unset=-1)] = -1
    """Context length in tokens; -1 is 2048, or with --init-from what that model has."""
    warmup_steps: Annotated[int, Range(0)] = 0
    """Linear warm-up, in steps."""
    warmup_ratio: Annotated[float, Range(0, 1, unset=-1)] = -1.0
    """Linear warm-up as a share of the run; overrides --warmup-steps."""
    warmdown_ratio: Annotated[float, Range(0, 1, unset=-1)] = -1.0
    """Share of the run over which the rates fall linearly; -1 takes the recipe's, here and below."""
    final_lr_frac: Annotated[float, Range(0, unset=-1)] = -1.0
    """Where they end, as a share of the peak."""
    lr_scale: Annotated[float, Range(0)] = 1.0
    """All rates are multiplied by this: short runs on small batches want more than the square root of the batch."""
    init_from: str = ""
    """Folder of another base run (or its tag) whose weights to start from, with fresh schedules."""
    fp8: bool = False
    """Matrix products of the blocks in fp8; needs a GPU of compute capability 8.9 (Ada, Hopper) and torchao."""
    fp8_recipe: str = "tensorwise"
    """One fp8 scale per tensor (tensorwise, the fastest) or per row (rowwise, more exact)."""
    core_metric_every: Annotated[int, OnResume.NEW] = -1
    """Steps between CORE evaluations; there is one at the end too."""
    core_metric_max_per_task: Annotated[int, Range(1, unset=-1), OnResume.NEW] = 500
    """Items per CORE task; -1 takes all."""
    eval_bundle: Annotated[str, OnResume.NEW] = ""
    """Folder of the CORE bundle; empty: eval_bundle/ in the base folder, downloaded if it is not there."""


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
    folder = run_dir(base_dir, "base", config.model_tag or f"d{config.depth}")
    with open_run("base_train", folder, config, runtime) as run:
        config = run.config
        tokenizer = run.checkpoint.tokenizer() if run.checkpoint else get_tokenizer()
        corpus = open_corpus(config.data, base_dir, runtime, skip_bad=config.skip_bad_shards, saved=saved_corpus(run))
        bundle = open_bundle(config.eval_bundle, base_dir, runtime) if config.core_metric_every > 0 else None
        model = build_model(run, tokenizer)
        runtime.print0(f"{runtime.describe()}\ndata: {corpus.name}; run folder: {folder}")

        plan = fix_plan(run, model)
        loader = PretrainLoader(
            corpus,
            tokenizer,
            sequence_len=config.max_seq_len,
            seed=config.seed,
            rows_per_step=plan.total_batch_tokens // config.max_seq_len,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        trainer = Trainer(build_step(config, plan, model, runtime), loader)
        run.begin(plan.num_steps, describe(model.config, plan))
        if runtime.is_main and not run.checkpoint:
            save_record(corpus, folder)
        trainer.hooks = make_hooks(config, corpus, tokenizer, runtime)
        if bundle:
            core = tokenizer, bundle, config.core_metric_max_per_task
            trainer.hooks.append(core_hook(*core, config.core_metric_every))
            if config.minutes > 0:  # leave time for it
                trainer.hooks[-1].seconds = estimate_core_seconds(trainer, *core)

        code = run.train(
            trainer,
            tokenizer,
            sequence_len=config.max_seq_len,
            total_batch_tokens=plan.total_batch_tokens,
            meta={"stage": "base", "corpus": corpus.fingerprint},
        )
        if code == 0 and runtime.is_main:
            report(run, trainer, plan)
        return code


def saved_corpus(run: Run[Config]) -> SavedCorpus | None:
    """The corpus that a resumed run was trained on, to find the same shards again."""
    if (saved := run.checkpoint) is None:
        return None
    return SavedCorpus.load(run.folder, saved.step, saved.meta["corpus"], saved.loader_state())


def build_model(run: Run[Config], tokenizer: RustBPETokenizer) -> GPT:
    """A new model, or one with the weights of --init-from; a resumed run's weights are restored later.

    Fills in the depth and the context that the flags left to derive.
    """
    config, runtime = run.config, run.runtime
    source = open_source(config.init_from, get_base_dir()) if config.init_from and not run.checkpoint else None
    if source:
        check_source(source, tokenizer, config.max_seq_len)
    if saved := run.checkpoint or source:
        model_config = GPTConfig.from_dict(saved.meta["model_config"])
    else:
        model_config = new_network(config, tokenizer, runtime)
    config.depth, config.max_seq_len = model_config.n_layer, model_config.sequence_len
    model = GPT.create(model_config, device=runtime.device, compute_dtype=runtime.dtype, seed=config.seed)
    if source:
        load_model_state(model, source.model_state(runtime.device), source.path)
        runtime.print0(f"weights from {source.path}; its sizes are kept, the schedules start anew")
    return model


def new_network(config: Config, tokenizer: RustBPETokenizer, runtime: Runtime) -> GPTConfig:
    """The network that the flags describe; --depth=-1 takes the depth that suits --minutes on this machine."""
    config_of_depth = config.network(tokenizer.get_vocab_size())
    if config.depth != -1:
        return config_of_depth(config.depth)
    if config.minutes <= 0:
        raise UserError("--depth=-1 derives the depth from --minutes: give --minutes, or a depth")
    choice = choose_depth(config.minutes, config.total_batch_size, config_of_depth, runtime)
    runtime.print0(
        f"{config.minutes:g} minutes on this machine suit depth {choice.key}: by the fitted law about "
        f"{format_count(choice.tokens)} tokens and {choice.loss:.3f} bits per byte"
    )
    return config_of_depth(choice.key)


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


def fix_plan(run: Run[Config], model: GPT) -> Plan:
    """Every number of the run. With --minutes the horizon is estimated by timing real steps."""
    config, runtime = run.config, run.runtime
    arguments = plan_arguments(config)
    if config.total_batch_size == -1 and config.minutes > 0:
        arguments["total_batch_size"] = batch_for_minutes(runtime.device.type)
    make = partial(make_plan, model.config, **arguments)
    if run.planned_steps is not None:
        return replace(make(num_iterations=run.planned_steps), horizon="the run's first session")
    if not config.ends_on_time:
        return make(num_iterations=config.num_iterations)
    trial = make(num_iterations=1000)
    rows = trial.total_batch_tokens // config.max_seq_len
    batch = random_batch(rows, config.max_seq_len, model.config.vocab_size, runtime)
    num_steps = steps_for_minutes(config, partial(build_step, config, trial, runtime=runtime), model, batch, runtime)
    return replace(make(num_iterations=num_steps), horizon=f"--minutes={config.minutes:g}")


def build_step(config: Config, plan: Plan, model: GPT, runtime: Runtime) -> TrainStep:
    """The optimizer step of `model`, with the plan's rates; in fp8 with --fp8."""
    if config.fp8:
        fp8.convert(model, config.fp8_recipe, runtime)
    warmup = round(config.warmup_ratio * plan.num_steps) if config.warmup_ratio >= 0 else config.warmup_steps
    given = {name: getattr(config, name) for name in ("warmdown_ratio", "final_lr_frac") if getattr(config, name) != -1}
    schedule = get_recipe(config.recipe).schedule(plan.num_steps, warmup_steps=warmup, **given)
    return create_step(
        model,
        config,
        config.recipe,
        schedule,
        runtime,
        rows=plan.total_batch_tokens // config.max_seq_len,
        T=config.max_seq_len,
        lr_scale=plan.lr_scale * config.lr_scale,
        weight_decay=plan.weight_decay,
        compile=config.compile,
    )


def make_hooks(config: Config, corpus: Corpus, tokenizer: RustBPETokenizer, runtime: Runtime) -> list[Hook]:
    """Validation bits per byte, and completions of a few prompts."""
    tokens = config.evaluation_tokens(runtime)
    prompts = [(prompt, tokenizer.encode(prompt, prepend="<|bos|>")) for prompt in PROMPTS]

    def measure(trainer: Trainer) -> float:
        rows = trainer.step.device_batch_size
        return corpus_bpb(trainer.model, corpus, tokenizer, runtime, split="val", tokens=tokens, device_batch_size=rows)

    def complete(model: GPT) -> list[dict[str, str]]:
        return continuations(model, tokenizer, prompts, max_tokens=24)

    return [validation_hook(measure, config.eval_every, tokens), sample_hook(complete, config.sample_every)]


def report(run: Run[Config], trainer: Trainer, plan: Plan) -> None:
    """Put the run's figures into the report."""
    now = trainer.progress
    values = now.throughput() | {
        "flops": now.tokens * plan.flops_per_token,
        "plan": describe(trainer.model.config, plan),
        "tables": {"Plan and outcome": plan_and_outcome(plan, now, run.config.minutes)},
    }
    if (price := usual_price(trainer.runtime)) is not None:
        values["dollars"] = price * trainer.runtime.world_size * now.wall_seconds / 3600
    run.report(trainer, values)
    cropped = trainer.loader.stats()["cropped_share"]
    say(f"packing: no tokens dropped; {cropped:.1%} of documents span more than one row")


if __name__ == "__main__":
    _cli.run(main)
