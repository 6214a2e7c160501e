"""The tasks of a reinforcement learning run: what is trained on, what is measured, and the answers to read."""

import json
from collections.abc import Sequence
from pathlib import Path

from nanochat.common import UserError, atomic_write
from nanochat.engine import Engine
from nanochat.execution import choose_level
from nanochat.rl import Group
from nanochat.runtime import Runtime
from nanochat.train.reinforcement import RLConfig
from nanochat.trainer import Record, Trainer
from tasks.common import Task
from tasks.evaluation import AskFlags, ask_on_all_ranks, pass_rates, write_transcripts
from tasks.registry import REWARDED, known_name, make_levels


def open_tasks(config: RLConfig) -> tuple[list[list[Task]], list[Task]]:
    """(the levels of each task to train on, held-out tasks to evaluate on)."""
    names = list(dict.fromkeys(known_name(n.strip(), REWARDED) for n in config.tasks.split(",") if n.strip()))
    if not names:
        raise UserError(f"--tasks is empty; choose from {', '.join(REWARDED)}")
    if "Code" in names:
        choose_level("")  # raises UserError now if there is no sandbox
    levels = [make_levels(name, "train", seed=config.seed) for name in names]
    return levels, [task for name in names for task in make_levels(name, "test", size=config.eval_examples)]


def evaluate(trainer: Trainer, tasks: Sequence[Task], engine: Engine, config: RLConfig, folder: Path) -> Record:
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
