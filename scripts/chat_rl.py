"""Reinforcement learning on tasks whose answers can be checked: `python -m scripts.chat_rl`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from nanochat.common import UserError, atomic_write, get_base_dir, say
from nanochat.engine import Engine
from nanochat.report import record_stage
from nanochat.rl import Curriculum, Group, RolloutLoader, Sampler
from nanochat.runtime import Runtime
from nanochat.train.schedules import ScheduleConfig
from nanochat.train.session import choose_device_batch, command_line, only_session
from nanochat.trainer import Hook, Record, Trainer
from scripts import _cli
from scripts._start import Start, own_run, resumed_model, starting_model
from scripts._train import TrainFlags, announce, drive, make_optimizer, open_session, training_figures
from tasks.common import Task
from tasks.evaluation import AskFlags, ask, pass_rates, write_transcripts
from tasks.rewarded import REWARDED, known_name, make_levels

GUESSED_STEPS = 100  # of a run that the clock ends, until its pace is known


# Flags of every training stage that have no meaning here, and what has.
UNUSED = {
    "sample_every": "every evaluation leaves its answers in transcripts/",
    "eval_tokens": "--eval-examples says how many items are looked at",
    "compile": "the shapes of answers change from step to step, and each would be compiled anew",
}


@dataclass
class Config(TrainFlags):
    """Train a chat model on its own answers, by how good they are. -1 means "derive it" or "off"."""

    source: str = "sft"
    """Which model to start from: sft, or rl to train one further."""
    source_tag: str = ""
    """Tag of its run; empty takes the one of this run's name, else the latest."""
    model_step: int = -1
    """Its step; -1 takes the last."""
    tasks: str = "WordProblems"
    """What to train on, separated by commas: WordProblems, GSM8K, Arithmetic, LetterCounting, Spelling, Identity,
    Format, Code."""
    num_epochs: int = 1
    """Passes over the tasks' training items, unless --num-iterations or --minutes says otherwise."""
    examples_per_step: int = 16
    """Prompts in each step."""
    num_samples: int = 16
    """Answers to each prompt, which are compared with each other."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Of the answers trained on."""
    top_k: int = 50
    """Of the answers trained on; 0 is off."""
    init_lr_frac: float = 0.05
    """All rates are multiplied by this; they fall linearly to zero over the run."""
    weight_decay: float = 0.0
    """Cautious decay of the matrices."""
    raise_at: float = 0.8
    """Mean reward at which a task's next level joins."""
    eval_every: int = 60
    """Steps between evaluations on held-out items; -1 only at the end. There is one before the first step."""
    eval_examples: int = 200
    """Held-out items of each task and level."""
    eval_samples: int = 4
    """Answers to each of them at temperature 1, for pass@k; accuracy is that of the likeliest answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in ("sft", "rl"):
            raise UserError(f"--source must be sft or rl, got {self.source!r}")
        for name, least in (("num_epochs", 1), ("eval_examples", 1), ("eval_samples", 1), ("examples_per_step", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.total_batch_size != -1:
            raise UserError("--total-batch-size is not for chat_rl: --examples-per-step times --num-samples is")
        for name in UNUSED:
            if getattr(self, name) != getattr(TrainFlags, name):
                raise UserError(f"--{name.replace('_', '-')} is not for chat_rl: {UNUSED[name]}")
        if not 0 < self.init_lr_frac < math.inf:
            raise UserError(f"--init-lr-frac must be above 0, got {self.init_lr_frac:g}")
        if self.weight_decay < 0:
            raise UserError(f"--weight-decay cannot be negative, got {self.weight_decay:g}")
        if not 0 < self.raise_at <= 1:
            raise UserError(f"--raise-at is a mean reward, above 0 and at most 1, got {self.raise_at:g}")
        self.sampler()  # which checks its own

    def sampler(self) -> Sampler:
        return Sampler(self.num_samples, self.max_new_tokens, self.temperature, self.top_k)

    def task_names(self) -> list[str]:
        """As they are registered, each once."""
        return list(dict.fromkeys(known_name(name.strip()) for name in self.tasks.split(",") if name.strip()))


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(config.device_type, seed=config.seed, timeout_seconds=config.timeout) as runtime:
        base_dir = get_base_dir()
        run = own_run("rl", config.source, config, config.source_tag, base_dir)
        with only_session(run, runtime):
            return train_in(run, config, runtime, base_dir)


def train_in(run: Path, config: Config, runtime: Runtime, base_dir: Path) -> int:
    """One run, fresh or resumed, to its end, in a folder that is ours alone. Returns the exit code."""
    checkpoint, earlier, config = open_session(run, config, runtime)
    start = (
        resumed_model(checkpoint, runtime)
        if checkpoint
        else starting_model(config.source, run, config.source_tag, config.model_step, runtime, base_dir)
    )
    runtime.print0(f"{runtime.describe()}\n{config.source} model: {start.tag}, step {start.step}; run folder: {run}")
    names = config.task_names()
    levels = {name: make_levels(name, "train", seed=config.seed) for name in names}
    held_out = [task for name in names for task in make_levels(name, "test", size=config.eval_examples)]
    if not levels:
        raise UserError(f"--tasks is empty; choose from {', '.join(REWARDED)}")
    size = sum(len(task) for tasks in levels.values() for task in tasks)
    steps = max(1, size * config.num_epochs // config.examples_per_step)
    steps = GUESSED_STEPS if config.minutes > 0 else steps
    num_steps = earlier.num_steps if earlier else config.num_iterations if config.num_iterations > 0 else steps
    trainer, loader = build(config, start, levels, runtime, num_steps)
    plan = [
        ("tasks", ", ".join(task.name for tasks in levels.values() for task in tasks)),
        ("answers per step", f"{config.examples_per_step} prompts x {config.num_samples}"),
        ("steps", "as --minutes allows" if config.minutes > 0 and not earlier else f"{num_steps:,}"),
    ]
    announce(run, checkpoint, config, num_steps, plan, runtime)
    folder = run / "transcripts"
    loader.watch = partial(keep_rollouts, folder=folder, every=config.eval_every, runtime=runtime)
    look = partial(evaluate, tasks=held_out, start=start, config=config, folder=folder)
    trainer.hooks = [Hook(look, config.eval_every), Hook(lambda trainer: loader.stats(), 1)]
    before = checkpoint.meta["before"] if checkpoint else look(trainer)
    base = {"tag": start.tag, "step": start.step, "recipe": start.recipe, "source": config.source}
    tokens = config.examples_per_step * config.num_samples * config.max_new_tokens
    code = drive(
        trainer,
        script="chat_rl",
        run=run,
        config=config,
        tokenizer=start.tokenizer,
        checkpoint=checkpoint,
        total_batch_tokens=tokens,
        meta={"stage": "rl", "base": base, "before": before},
    )
    if code == 0 and runtime.is_main:
        report(base_dir, run, config, trainer, plan, before, start.tag)
    return code


def build(
    config: Config, start: Start, levels: dict[str, list[Task]], runtime: Runtime, num_steps: int
) -> tuple[Trainer, RolloutLoader]:
    """The trainer's loop around the model, and the loader that samples from it."""
    curricula = [Curriculum(tasks, config.raise_at) for tasks in levels.values()]
    engine = Engine(start.model, start.tokenizer)
    loader = RolloutLoader(
        engine, start.tokenizer, curricula, config.sampler(), config.examples_per_step, runtime, config.seed
    )
    optimizer = make_optimizer(
        start.model, config.optimizer_config(start.recipe), runtime, config.init_lr_frac, config.weight_decay
    )
    schedule = ScheduleConfig(num_steps, warmdown_ratio=1.0)
    rows = config.examples_per_step * config.num_samples
    longest = min(start.model.config.sequence_len, 2 * config.max_new_tokens)
    micro = choose_device_batch(config.device_batch_size, rows, longest, runtime)
    return Trainer(start.model, optimizer, loader, runtime, schedule, micro), loader


# ---------------------------------------------------------------------------------------------------
# Looking on


def evaluate(trainer: Trainer, tasks: Sequence[Task], start: Start, config: Config, folder: Path) -> Record:
    """Accuracy of the likeliest answers and pass@k of drawn ones on held-out items, with transcripts to read."""
    runtime, step = trainer.runtime, trainer.progress.step
    engine, found = cast(RolloutLoader, trainer.loader).engine, {}
    for task in tasks:
        items = range(min(config.eval_examples, len(task)))
        own = items[runtime.rank :: runtime.world_size]
        rates = []
        for samples, temperature in ((1, 0.0), (config.eval_samples, 1.0)):
            flags = AskFlags(samples, 32, config.max_new_tokens, temperature, config.top_k, config.seed)
            outcomes = ask(task, own, engine, start.tokenizer, flags)
            rights = torch.zeros(len(items))
            for outcome in outcomes:
                rights[outcome.index] = outcome.num_right
            rates.append(
                pass_rates(
                    [
                        int(n)
                        for n in runtime.all_reduce_sum(rights.to(runtime.device), "summing right answers").tolist()
                    ],
                    samples,
                )
            )
            if samples == 1:
                name = task.name.replace("/", "_") + (f".rank{runtime.rank}" if runtime.world_size > 1 else "")
                write_transcripts(folder / f"step_{step:06d}" / f"{name}.jsonl", task.name, "test", outcomes)
            if config.eval_samples == 1:
                break
        found[f"accuracy/{task.name}"] = rates[0][1]
        found |= {f"pass@{k}/{task.name}": rate for k, rate in rates[-1].items() if k > 1}
        trainer.raise_if_stop_requested()
    runtime.print0(
        ("\n" if step else "")
        + f"step {step} | held out | "
        + " | ".join(
            f"{name.removeprefix('accuracy/')} {value:.1%}" for name, value in found.items() if name.startswith("acc")
        )
    )
    return found


def keep_rollouts(step: int, groups: list[Group], folder: Path, every: int, runtime: Runtime) -> None:
    """Write down what was sampled in the step after each evaluation, with the rewards."""
    if not runtime.is_main or (step % every if every > 0 else step):
        return
    with atomic_write(folder / f"step_{step:06d}" / "rollouts.jsonl", "w") as file:
        for group in groups:
            question = group.conversation["messages"][0]["content"]
            samples = [{"text": text, "reward": reward} for text, reward in zip(group.texts, group.rewards)]
            file.write(
                json.dumps({"task": group.task.name, "question": question, "samples": samples}, ensure_ascii=False)
                + "\n"
            )


def report(
    base_dir: Path,
    run: Path,
    config: Config,
    trainer: Trainer,
    plan: list[tuple[str, str]],
    before: Record,
    started_from: str,
) -> None:
    """Hand the run's figures to the report."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last: dict[str, Any] = next((line for line in reversed(lines) if any(k.startswith("accuracy/") for k in line)), {})
    values = training_figures(trainer, run, command_line("chat_rl", config))
    values |= {"model": run.name, "started_from": started_from}
    values |= {
        f"{key.partition('/')[2]}, before and after": f"{value:.1%}, {last[key]:.1%}"
        for key, value in before.items()
        if key.startswith("accuracy/") and key in last
    }
    record_stage(base_dir, "chat_rl", values | {"plan": plan, "before": before, "after": last})
    now = trainer.progress
    say(f"{now.step} steps in {values['seconds']:.0f} s; answers to read: {run / 'transcripts'}; saved in {run}")


if __name__ == "__main__":
    _cli.run(main)
