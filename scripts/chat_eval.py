"""Measure a chat model's skills on held-out items: `python -m scripts.chat_eval`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from nanochat.checkpoint_manager import find_run, load_model
from nanochat.common import UserError, get_base_dir
from nanochat.engine import Engine
from nanochat.report import accuracy_values, record_stage
from nanochat.report_view import wilson_interval
from nanochat.runtime import Runtime
from nanochat.session import command_line
from scripts import _cli
from tasks.common import Task
from tasks.registry import TASKS, make_task, task_spec


@dataclass
class Config:
    """Measure a chat model's skills on held-out items. -1 means "all" or "the last"."""

    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: sft or rl."""
    task_name: Annotated[str, tyro.conf.arg(aliases=["-a"])] = ""
    """Tasks separated by | or commas; empty runs the embedded skills."""
    max_problems: Annotated[int, tyro.conf.arg(aliases=["-x"])] = 200
    """Items per task; -1 takes all."""
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Answers per item; an item counts by its share of right ones."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 32
    """Items decoded together."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 128
    """Longest answer."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    """0 takes the most likely token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Sample among the k most likely tokens; 0 is off."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Its step; -1 takes the last."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    if config.source not in ("sft", "rl"):
        raise UserError(f"-i must be sft or rl, got {config.source!r}")
    names = [n.strip() for n in config.task_name.replace("|", ",").split(",") if n.strip()]
    names = [task_spec(name).name for name in names] or [name for name, spec in TASKS.items() if spec.starter]
    sizes = (config.num_samples, config.batch_size, config.max_new_tokens)
    if config.max_problems == 0 or min(sizes) < 1 or config.temperature < 0 or config.top_k < 0:
        raise UserError("-x, -n, -b and -m must be positive (-x -1 is all), -t and -k not negative")
    with Runtime.create(config.device_type) as runtime:
        return evaluate(config, names, runtime)


def evaluate(config: Config, names: list[str], runtime: Runtime) -> int:
    started = time.perf_counter()
    base_dir = get_base_dir()
    run = find_run(base_dir, config.source, config.model_tag or None)
    model, tokenizer, meta = load_model(config.source, runtime, base_dir=base_dir, model_tag=run.name,
                                        step=None if config.step < 0 else config.step,
                                        compute_dtype=runtime.dtype)  # fmt: skip
    runtime.print0(f"{runtime.describe()}\nchat model: {run.name}, step {meta['step']}")
    engine = Engine(model, tokenizer)
    results: dict[str, tuple[float, int]] = {}
    samples: list[dict[str, str]] = []
    table = Table("task", "right", "of", "accuracy", "95% interval")
    for name in names:
        task = make_task(name)
        right, total, examples = run_task(config, task, engine, tokenizer)
        low, high = wilson_interval(right, total)
        results[name] = (right, total)
        samples += examples
        table.add_row(name, f"{right:g}", str(total), f"{right / total:.1%}", f"{low:.1%} - {high:.1%}")
    if runtime.is_main:
        Console().print(table)
        values: dict[str, Any] = {
            "seconds": time.perf_counter() - started,
            "model": run.name,
            "step": meta["step"],
            "checkpoint": f"{config.source}/{run.name}/{meta['step']}",
            **accuracy_values(results, {name: TASKS[name].baseline for name in names}),
            "samples": samples,
            "command": command_line("chat_eval", config),
        }
        record_stage(base_dir, "chat_eval", values)
    return 0


def run_task(config: Config, task: Task, engine: Engine, tokenizer: Any) -> tuple[float, int, list[dict[str, str]]]:
    """(sum of correct, number of items, a few transcripts)."""
    total = len(task) if config.max_problems < 0 else min(config.max_problems, len(task))
    conversations = [task[i] for i in range(total)]
    prompts = [tokenizer.render_for_completion(c) for c in conversations for _ in range(config.num_samples)]
    completions = engine.generate_many(prompts, max_tokens=config.max_new_tokens, temperature=config.temperature,
                                       top_k=config.top_k, batch_size=config.batch_size, seed=42)  # fmt: skip
    texts = [tokenizer.decode(c) for c in completions]
    correct = [float(task.evaluate(conversations[i // config.num_samples], text)) for i, text in enumerate(texts)]
    shown = [{"prompt": c["messages"][0]["content"], "text": texts[i * config.num_samples]}
             for i, c in enumerate(conversations[:3])]  # fmt: skip
    right = sum(correct) / config.num_samples
    return int(right) if right.is_integer() else right, total, shown


if __name__ == "__main__":
    _cli.run(main)
