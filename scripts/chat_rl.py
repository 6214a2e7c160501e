"""Reinforcement learning on tasks whose answers can be checked: `python -m scripts.chat_rl`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from nanochat.common import UserError, atomic_write, say
from nanochat.engine import Engine
from nanochat.ranges import Range
from nanochat.reporting.curves import read_metrics
from nanochat.rl import Curriculum, Group, RolloutLoader, Sampler
from nanochat.runtime import Runtime
from nanochat.train.build import create_step
from nanochat.train.config import OnResume, TrainConfig
from nanochat.train.run import Run, open_run
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.starting_model import StartingModel, finetuning_dir, open_starting_model
from nanochat.train.step import TrainStep
from nanochat.trainer import Hook, Record, Trainer
from scripts import _cli
from tasks.common import Task
from tasks.evaluation import AskFlags, ask_on_all_ranks, pass_rates, write_transcripts
from tasks.registry import REWARDED, known_name, make_levels

GUESSED_STEPS = 100  # of a run that the clock ends, until its pace is known

# Flags of the other training stages that chat_rl refuses, and why.
UNUSED = {
    "total_batch_size": "--examples-per-step times --num-samples is",
    "sample_every": "every evaluation leaves its answers in transcripts/",
    "eval_tokens": "--eval-examples says how many items are evaluated",
    "compile": "the shapes of answers change from step to step, and each would be compiled anew",
}


@dataclass
class Config(TrainConfig):
    """Train a chat model on its own answers, by how good they are. -1 means "derive it" or "off".

    --total-batch-size, --sample-every, --eval-tokens and --compile do not apply here.
    """

    source: Literal["sft", "rl"] = "sft"
    """Which model to start from: sft, or rl to train one further."""
    source_tag: str = ""
    """Tag of its run; empty takes the one of this run's name, else the latest."""
    model_step: int = -1
    """Its step; -1 takes the last."""
    tasks: str = "WordProblems"
    """Separated by commas: WordProblems, GSM8K, Arithmetic, LetterCounting, Spelling, Identity, Format, Code."""
    num_epochs: Annotated[int, Range(1)] = 1
    """Passes over the tasks' training items, unless --num-iterations or --minutes says otherwise."""
    examples_per_step: Annotated[int, Range(1)] = 16
    """Prompts in each step."""
    num_samples: Annotated[int, Range(2)] = 16
    """Answers to each prompt, which are compared with each other."""
    max_new_tokens: Annotated[int, Range(1)] = 256
    """Longest answer."""
    temperature: Annotated[float, Range(above=0)] = 1.0
    """Sampling temperature of the answers trained on."""
    top_k: Annotated[int, Range(0)] = 50
    """The answers trained on are sampled among the k most likely tokens; 0 is off."""
    init_lr_frac: Annotated[float, Range(above=0)] = 0.05
    """All rates are multiplied by this; they fall linearly to zero over the run."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Cautious decay of the matrices."""
    raise_at: Annotated[float, Range(above=0, max=1)] = 0.8
    """Mean reward at which a task's next level joins."""
    eval_every: Annotated[int, OnResume.NEW] = 60
    """Steps between evaluations on held-out items; -1 only at the end. There is one before the first step."""
    eval_examples: Annotated[int, Range(1)] = 200
    """Held-out items of each task and level."""
    eval_samples: Annotated[int, Range(1)] = 4
    """Answers to each of them at temperature 1, for pass@k; accuracy is that of the likeliest answer."""

    def __post_init__(self) -> None:
        for name, reason in UNUSED.items():
            if getattr(self, name) != getattr(TrainConfig, name):
                raise UserError(f"--{name.replace('_', '-')} is not for chat_rl: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(config.device_type, seed=config.seed, timeout_seconds=config.timeout) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One RL run, fresh or resumed, to its end. Returns the exit code."""
    folder = finetuning_dir("rl", config.source, config, config.source_tag, runtime)
    with open_run("chat_rl", folder, config, runtime) as run:
        config, checkpoint = run.config, run.checkpoint
        start = open_starting_model(checkpoint, config.source, folder, config.source_tag, config.model_step, runtime)
        runtime.print0(
            f"{runtime.describe()}\n{config.source} model: {start.tag}, step {start.step}; run folder: {folder}"
        )
        levels, held_out = open_tasks(config)
        engine = Engine(start.model, start.tokenizer)
        loader = make_loader(config, engine, levels, folder, runtime)
        num_steps = run.planned_steps or find_horizon(config, levels)
        trainer = Trainer(build_step(config, start, runtime, num_steps), loader)
        plan = [
            ("tasks", ", ".join(task.name for tasks in levels for task in tasks)),
            ("answers per step", f"{config.examples_per_step} prompts x {config.num_samples}"),
            ("steps", "as --minutes allows" if config.minutes > 0 and not run.planned_steps else f"{num_steps:,}"),
        ]
        run.begin(num_steps, plan)
        evaluate_held_out = partial(evaluate, tasks=held_out, engine=engine, config=config, folder=folder)
        trainer.hooks = [
            Hook(evaluate_held_out, config.eval_every, tokens=config.evaluation_tokens(runtime)),
            Hook(lambda trainer: loader.stats(), 1),
        ]
        before = checkpoint.meta["before"] if checkpoint else evaluate_held_out(trainer)
        code = run.train(
            trainer,
            start.tokenizer,
            sequence_len=engine.max_context,
            total_batch_tokens=config.examples_per_step * config.num_samples * config.max_new_tokens,
            meta={"stage": "rl", "base": start.record | {"source": config.source}, "before": before},
        )
        if code == 0 and runtime.is_main:
            report(run, trainer, plan, before, start.tag)
        return code


def open_tasks(config: Config) -> tuple[list[list[Task]], list[Task]]:
    """(the levels of each task to train on, held-out tasks to evaluate on)."""
    names = list(dict.fromkeys(known_name(n.strip(), REWARDED) for n in config.tasks.split(",") if n.strip()))
    if not names:
        raise UserError(f"--tasks is empty; choose from {', '.join(REWARDED)}")
    levels = [make_levels(name, "train", seed=config.seed) for name in names]
    return levels, [task for name in names for task in make_levels(name, "test", size=config.eval_examples)]


def make_loader(
    config: Config, engine: Engine, levels: list[list[Task]], folder: Path, runtime: Runtime
) -> RolloutLoader:
    return RolloutLoader(
        engine,
        [Curriculum(tasks, config.raise_at) for tasks in levels],
        Sampler(config.num_samples, config.max_new_tokens, config.temperature, config.top_k),
        config.examples_per_step,
        runtime,
        config.seed,
        watch=partial(keep_rollouts, folder=folder / "transcripts", every=config.eval_every, runtime=runtime),
    )


def find_horizon(config: Config, levels: list[list[Task]]) -> int:
    """Steps: as given, or a first guess for --minutes, or the epochs over all training items."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.minutes > 0:
        return GUESSED_STEPS
    items = sum(len(task) for tasks in levels for task in tasks)
    return max(1, items * config.num_epochs // config.examples_per_step)


def build_step(config: Config, start: StartingModel, runtime: Runtime, num_steps: int) -> TrainStep:
    """The optimizer step of the starting model."""
    return create_step(
        start.model,
        config,
        start.recipe,
        ScheduleConfig(num_steps, warmdown_ratio=1.0),
        runtime,
        rows=config.examples_per_step * config.num_samples,
        T=min(start.model.config.sequence_len, 2 * config.max_new_tokens),
        lr_scale=config.init_lr_frac,
        weight_decay=config.weight_decay,
        compile="off",
    )


def evaluate(trainer: Trainer, tasks: Sequence[Task], engine: Engine, config: Config, folder: Path) -> Record:
    """Accuracy of greedy answers and pass@k of sampled ones on held-out items, with transcripts to read."""
    runtime, step = trainer.runtime, trainer.progress.step
    accuracies: dict[str, float] = {}
    found: Record = {}
    for task in tasks:
        total = min(config.eval_examples, len(task))
        sampled = [(config.eval_samples, 1.0)] if config.eval_samples > 1 else []
        for samples, temperature in [(1, 0.0), *sampled]:
            flags = AskFlags(samples, 32, config.max_new_tokens, temperature, config.top_k, config.seed)
            rights, outcomes = ask_on_all_ranks(task, total, engine, flags, runtime)
            rates = pass_rates(rights, samples)
            if samples == 1:
                accuracies[task.name] = found[f"accuracy/{task.name}"] = rates[1]
                name = task.name.replace("/", "_") + (f".rank{runtime.rank}" if runtime.world_size > 1 else "")
                path = folder / "transcripts" / f"step_{step:06d}" / f"{name}.jsonl"
                write_transcripts(path, task.name, "test", outcomes)
        found |= {f"pass@{k}/{task.name}": rate for k, rate in rates.items() if k > 1}
        trainer.raise_if_stop_requested()
    shown = " | ".join(f"{name} {accuracy:.1%}" for name, accuracy in accuracies.items())
    newline = "\n" if step else ""  # after the live line
    runtime.print0(f"{newline}step {step} | held out | {shown}")
    return found


def keep_rollouts(step: int, groups: list[Group], folder: Path, every: int, runtime: Runtime) -> None:
    """Write the samples of the step after each evaluation, with their rewards."""
    if not runtime.is_main or (step % every if every > 0 else step):
        return
    with atomic_write(folder / f"step_{step:06d}" / "rollouts.jsonl", "w") as file:
        for group in groups:
            question = group.conversation["messages"][0]["content"]
            samples = [{"text": text, "reward": reward} for text, reward in zip(group.texts, group.rewards)]
            line = {"task": group.task.name, "question": question, "samples": samples}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def report(run: Run[Config], trainer: Trainer, plan: list[tuple[str, str]], before: Record, started_from: str) -> None:
    """Put the run's figures into the report, with the accuracies before and after."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    last: Record = next((line for line in reversed(lines) if any(k.startswith("accuracy/") for k in line)), {})
    values: Record = {"model": run.folder.name, "started_from": started_from}
    for key in before:
        if key.startswith("accuracy/") and key in last:
            name = key.removeprefix("accuracy/")
            values[f"{name}, before and after"] = f"{before[key]:.1%}, {last[key]:.1%}"
    run.report(trainer, values | {"plan": plan, "before": before, "after": last})
    say(f"answers to read: {run.folder / 'transcripts'}")


if __name__ == "__main__":
    _cli.run(main)
