"""Pretrain a base model: `python -m scripts.base_train --depth=4`.

The flags, and how model, plan and training step follow from them, are in nanochat/train/pretraining.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from nanochat.checkpoint.runs import run_dir
from nanochat.common import get_base_dir, say
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Corpus, SavedCorpus, open_corpus, save_record
from nanochat.evals.bits_per_byte import corpus_bpb, measured_tokens
from nanochat.evals.core_bundle import Bundle
from nanochat.evals.core_run import open_bundle
from nanochat.evals.samples import continuations
from nanochat.gpt_config import GPTConfig
from nanochat.planning.hardware import known_gpu
from nanochat.planning.law import Law
from nanochat.planning.planner import forecast_values, plan_and_outcome
from nanochat.recipe import with_changes
from nanochat.runtime import Runtime
from nanochat.scaling import Plan, describe
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.train.commands import command_line
from nanochat.train.hooks import estimate_core_seconds, evaluate_core, sample_hook, validate
from nanochat.train.pretraining import PretrainConfig as Config, build_model, build_step, fix_plan, run_recipe
from nanochat.train.progress import Progress
from nanochat.train.run import Run, open_run
from nanochat.trainer import Hook, Trainer
from scripts import _cli

LONGER = 4  # times as long: the run whose forecast the report names
PROMPTS = ("The capital of France is", "Once upon a time", "The sun is", "My favourite food is")


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(
        config.device_type, seed=config.seed, timeout_seconds=config.timeout, deterministic=config.deterministic
    ) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One pretraining run, fresh or resumed, to its end. Returns the exit code."""
    base_dir = get_base_dir()
    folder = run_dir(base_dir, "base", config.model_tag or f"d{config.depth}")
    with open_run("base_train", folder, config, runtime) as run:
        config, old = run.config, run.checkpoint
        if old and config.window_pattern == "SSSL":  # what earlier versions recorded where none was given
            config.window_pattern = ""
        tokenizer = old.tokenizer() if old else get_tokenizer()
        # To find the same shards again.
        saved = SavedCorpus.load(folder, old.step, old.meta["corpus"], old.loader_state()) if old else None
        corpus = open_corpus(
            config.data, base_dir, runtime, text_field=config.text_field, skip_bad=config.skip_bad_shards, saved=saved
        )
        bundle = open_bundle(config.eval_bundle, base_dir, runtime) if config.core_metric_every > 0 else None
        model = build_model(run, tokenizer)
        runtime.print0(f"{runtime.describe()}\ndata: {corpus.describe()}; run folder: {folder}")

        recipe = run_recipe(run, model.config)
        plan = fix_plan(run, recipe, model)
        loader = PretrainLoader(
            corpus,
            tokenizer,
            sequence_len=config.max_seq_len,
            seed=config.seed,
            rows_per_step=plan.total_batch_tokens // config.max_seq_len,
            rank=runtime.rank,
            world_size=runtime.world_size,
            num_threads=runtime.loader_threads,
        )
        trainer = Trainer(build_step(config, recipe, plan, model, runtime), loader)
        run.begin(plan.num_steps, describe(model.config, plan))
        law = None if config.init_from else Law.load()  # it knows no model that was trained before
        run.shown = {
            "data": corpus.name,
            "planned_steps": plan.num_steps,
            "tokenizer_hash": tokenizer.hash,
            "forecast": forecast_values(plan, plan.tokens, corpus.name, law),
        }
        if runtime.is_main and not (saved and saved.record):
            save_record(corpus, folder)
        trainer.hooks = make_hooks(config, corpus, tokenizer, runtime)
        if bundle:
            trainer.hooks.append(core_hook(config, trainer, tokenizer, bundle))
        return run.train(
            trainer,
            tokenizer,
            total_batch_tokens=plan.total_batch_tokens,
            meta={"stage": "base", "corpus": corpus.fingerprint, "corpus_name": corpus.name, "recipe": recipe},
            report=partial(report, run, trainer, plan, corpus.name, law),
        )


def make_hooks(config: Config, corpus: Corpus, tokenizer: RustBPETokenizer, runtime: Runtime) -> list[Hook]:
    """Validation bits per byte, and completions of a few prompts."""
    tokens = measured_tokens(config.evaluation_tokens(runtime), config.max_seq_len)
    prompts = [(prompt, tokenizer.encode(prompt, prepend="<|bos|>")) for prompt in PROMPTS]

    def measure(trainer: Trainer) -> float:
        rows = trainer.step.device_batch_size
        return corpus_bpb(trainer.model, corpus, tokenizer, runtime, split="val", tokens=tokens, device_batch_size=rows)

    return [
        Hook(partial(validate, measure=measure), config.eval_every, tokens=tokens),
        sample_hook(partial(continuations, tokenizer=tokenizer, prompts=prompts, max_tokens=24), config.sample_every),
    ]


def core_hook(config: Config, trainer: Trainer, tokenizer: RustBPETokenizer, bundle: Bundle) -> Hook:
    """The CORE evaluation; with --minutes timed now, to leave time for it."""
    core = tokenizer, bundle, config.core_metric_max_per_task
    seconds = estimate_core_seconds(trainer, *core) if config.minutes > 0 else None
    return Hook(lambda trainer: evaluate_core(trainer, *core), config.core_metric_every, seconds=seconds)


def longer_run(config: Config, network: GPTConfig, now: Progress) -> dict[str, Any]:
    """The report's values of a run that trains the same model anew, LONGER times as long: its command and time."""
    minutes = LONGER * config.minutes if config.ends_on_time else -1.0
    steps = -1 if minutes > 0 else LONGER * now.step
    recipe = config.recipe if config.init_from else with_changes(config.recipe, network)
    horizon: dict[str, Any] = {"minutes": minutes, "num_iterations": steps}
    fresh = replace(config, resume=False, resume_from_step=-1, recipe=recipe, window_pattern="", **horizon)
    seconds = 60 * minutes if minutes > 0 else LONGER * now.wall_seconds
    return {"times": LONGER, "command": command_line("base_train", fresh), "seconds": seconds}


def report(run: Run[Config], trainer: Trainer, plan: Plan, corpus: str, law: Law | None) -> None:
    """Put the run's figures into the report."""
    now = trainer.progress
    expected, longer = (forecast_values(plan, times * now.tokens, corpus, law) for times in (1, LONGER))
    values: dict[str, Any] = {
        "forecast": expected,
        "longer": longer_run(run.config, trainer.model.config, now) | longer,
        "flops": now.tokens * plan.flops_per_token,
        "plan": describe(trainer.model.config, plan),
        "tables": {"Plan and outcome": plan_and_outcome(plan, now, run.config.minutes, corpus, law)},
    }
    if (gpu := known_gpu(trainer.runtime)) and (price := gpu.dollars_per_hour):
        values["dollars"] = price * trainer.runtime.world_size * now.wall_seconds / 3600
    run.report(trainer, values)
    cropped = trainer.loader.stats()["cropped_share"]
    say(f"packing: no tokens dropped; {cropped:.1%} of documents span more than one row")


if __name__ == "__main__":
    _cli.run(main, memory_flags="--device-batch-size, --max-seq-len or --depth")
