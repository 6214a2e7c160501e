"""Reinforcement learning on tasks whose answers can be checked: `python -m scripts.chat_rl`.

The flags are in nanochat/train/reinforcement.py, sampling and learning in nanochat/rl.py, tasks and evaluation in
tasks/rl_tasks.py.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nanochat.common import say, warn
from nanochat.engine import Engine
from nanochat.reporting.curves import read_metrics
from nanochat.rl import Curriculum, RolloutLoader, Sampler, SignalWatch, what_was_learnt
from nanochat.runtime import Runtime
from nanochat.train.reinforcement import RLConfig as Config, build_step, find_horizon
from nanochat.train.run import Run, open_run
from nanochat.train.starting_model import finetuning_dir, open_starting_model
from nanochat.trainer import Hook, Record, Trainer
from scripts import _cli
from tasks.common import Task
from tasks.rl_tasks import evaluate, keep_rollouts, open_tasks


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    with Runtime.create(
        config.device_type, seed=config.seed, timeout_seconds=config.timeout, deterministic=config.deterministic
    ) as runtime:
        return train(config, runtime)


def train(config: Config, runtime: Runtime) -> int:
    """One RL run, fresh or resumed, to its end. Returns the exit code."""
    folder = finetuning_dir("rl", config.source, config, config.source_tag, runtime)
    with open_run("chat_rl", folder, config, runtime) as run:
        config, checkpoint = run.config, run.checkpoint
        levels, held_out = open_tasks(config)
        start = open_starting_model(checkpoint, config.source, folder, config.source_tag, config.model_step, runtime)
        engine = Engine(start.model, start.tokenizer)
        loader = make_loader(config, engine, levels, folder, runtime)
        num_steps = run.planned_steps or find_horizon(config, sum(len(task) for tasks in levels for task in tasks))
        trainer = Trainer(build_step(config, start, runtime, num_steps), loader)
        plan = [
            ("tasks", ", ".join(task.name for tasks in levels for task in tasks)),
            ("answers per step", f"{config.examples_per_step} prompts x {config.num_samples}"),
            ("steps", "as --minutes allows" if config.ends_on_time else f"{num_steps:,}"),
        ]
        run.begin(num_steps, plan)
        evaluate_held_out = partial(evaluate, tasks=held_out, engine=engine, config=config, folder=folder)
        trainer.hooks = [
            Hook(evaluate_held_out, config.eval_every),
            Hook(SignalWatch(loader, runtime), 1),
        ]
        began = time.perf_counter()
        before = checkpoint.meta["before"] if checkpoint else evaluate_held_out(trainer)
        evaluation_seconds = checkpoint.meta.get("evaluation_seconds") if checkpoint else time.perf_counter() - began
        trainer.hooks[0].seconds = evaluation_seconds  # what --minutes keeps for the last one
        run.shown = {
            "model": folder.name,
            "started_from": start.base["tag"],
            "started_from_stage": start.base["source"],
            "before": before,
            "sizes": {task.name: min(config.eval_examples, len(task)) for task in held_out},
            "tables": {"Plan": [{"": name, "planned": value} for name, value in plan]},
        }
        return run.train(
            trainer,
            start.tokenizer,
            total_batch_tokens=config.examples_per_step * config.num_samples * config.max_new_tokens,
            meta={"stage": "rl", "base": start.base, "before": before, "evaluation_seconds": evaluation_seconds},
            report=partial(report, run, trainer, before),
        )


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


def report(run: Run[Config], trainer: Trainer, before: Record) -> None:
    """Put the run's figures into the report, with the accuracies before and after."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    done = (line for line in reversed(lines) if line.get("step") == trainer.progress.step)
    last: Record = next((line for line in done if any(k.startswith("accuracy/") for k in line)), {})
    values: Record = {"after": last} if last else {}
    if not last:
        warn("the evaluation after the last step was stopped: python -m scripts.chat_eval -i rl measures the model")
    for key in before:
        if key.startswith("accuracy/") and key in last:
            name = key.removeprefix("accuracy/")
            values[f"{name}, before and after"] = f"{before[key]:.1%}, {last[key]:.1%}"
    learnt = what_was_learnt(lines)
    run.report(trainer, values | ({"learnt": learnt} if learnt else {}))
    if learnt:
        warn(learnt)
    say(f"answers to read: {run.folder / 'transcripts'}")


if __name__ == "__main__":
    _cli.run(main, memory_flags="--device-batch-size or --max-new-tokens")
