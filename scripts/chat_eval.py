"""Measure a chat model's skills on held-out items: `python -m scripts.chat_eval`."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, get_base_dir, is_writable, say
from nanochat.common.ranges import Range
from nanochat.engine import Engine
from nanochat.report import accuracy_values, record_stage
from nanochat.reporting.console import print_table
from nanochat.runtime import Runtime
from nanochat.train.commands import command_line
from scripts import _cli
from tasks.common import Task
from tasks.evaluation import (
    CHATCORE,
    TABLE_COLUMNS,
    AskFlags,
    TaskScore,
    chat_core,
    earlier_shares,
    score_task,
    write_transcripts,
)
from tasks.registry import TASKS, known_name, open_tasks

STAGE = {"sft": "chat_eval", "rl": "chat_eval_rl"}  # of the report


@dataclass
class Config(_cli.ModelConfig):
    """Measure a chat model's skills on held-out items. -1 means "all" or "the last"."""

    source: Annotated[Literal["sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: sft or rl."""
    task_name: Annotated[str, tyro.conf.arg(aliases=["-a"])] = ""
    """Tasks separated by | or commas; empty: those that need no download; all: also benchmarks whose data is found."""
    split: str = ""
    """Split of each task, such as validation; empty: the one that the task is meant to be evaluated on."""
    embedded_sample: bool = False
    """Use only the few items of public benchmarks that are in the package: to try the code, so the report gets no
    figures."""
    max_problems: Annotated[int, tyro.conf.arg(aliases=["-x"]), Range(1, unset=-1)] = 200
    """Items per task; -1 takes all."""
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1)] = 1
    """Answers per item, with -t above 0; an item scores its share of right answers, and pass@k is reported too."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"]), Range(1)] = 32
    """Items decoded together."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"]), Range(1)] = 512
    """Longest answer."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"]), Range(0)] = 0.0
    """0 takes the most likely token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"]), Range(0)] = 50
    """Sample among the k most likely tokens; 0 is off."""
    sandbox: str = ""
    """For HumanEval: bubblewrap, landlock or unsafe (no protection); empty: bubblewrap, else landlock."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    names = [n.strip() for n in config.task_name.replace("|", ",").split(",") if n.strip()]
    if names == ["all"]:
        names = list(TASKS)
    names = [known_name(name, TASKS) for name in names] or [name for name, spec in TASKS.items() if spec.starter]
    if config.num_samples > 1 and config.temperature == 0:
        raise UserError("-n asks for several answers, which at -t 0 are all the same: give a temperature, such as -t 1")
    skip_missing = config.task_name.strip() == "all"
    tasks, missing = open_tasks(names, config.split or None, config.embedded_sample, config.sandbox, skip_missing)
    with Runtime.create(config.device_type) as runtime:
        for reason in missing:
            runtime.print0(f"left out: {reason}")
        return evaluate(config, tasks, runtime)


def evaluate(config: Config, tasks: dict[str, Task], runtime: Runtime) -> int:
    started = time.perf_counter()
    base_dir = get_base_dir(to_write=False)
    model, tokenizer, meta = load_model(config.source, runtime, model_tag=config.model_tag, step=config.step)
    run = meta["model_tag"]
    runtime.print0(f"{runtime.describe()}\nchat model: {run}, step {meta['step']}")
    engine = Engine(model, tokenizer)
    folder = base_dir / "chat_eval" / f"{config.source}_{run}_{meta['step']:06d}"
    flags = AskFlags(config.num_samples, config.batch_size, config.max_new_tokens, config.temperature, config.top_k)
    scores: dict[str, TaskScore] = {}
    samples: list[dict[str, Any]] = []
    for name, task in tasks.items():
        split = getattr(task, "split", "") or config.split or TASKS[name].split
        label = label_of(name, split, config)
        scores[label], outcomes = score_task(name, task, split, config.max_problems, engine, flags, runtime)
        samples += [
            {"task": label, "prompt": o.conversation["messages"][0]["content"], **asdict(o.samples[0])}
            for o in outcomes[:3]
        ]
        suffix = f".rank{runtime.rank}" if runtime.world_size > 1 else ""
        if is_writable(base_dir):
            file = label.replace(",", "").replace(" ", "_")
            write_transcripts(folder / f"{file}{suffix}.jsonl", name, split, outcomes)
    if runtime.is_main:
        if is_writable(base_dir):
            say(f"every question and answer: {folder}")
        # Another model of the same name and step has other weights, and its own figures.
        checkpoint = f"{config.source}/{run}/{meta['step']}/{meta['weights'][:12]}"
        values = {"seconds": time.perf_counter() - started, "model": run, "step": meta["step"]}
        report(config, scores, checkpoint, values, samples)
    return 0


def label_of(name: str, split: str, config: Config) -> str:
    """The task's name, with what keeps its figures from standing for the task: they stand beside those that do."""
    notes = [split] if split != TASKS[name].split else []  # the model may have been trained on it
    if config.num_samples > 1 or config.temperature > 0:
        notes.append(f"{config.num_samples} x at temperature {config.temperature:g}")
    if config.embedded_sample and not TASKS[name].starter:
        notes.append("embedded sample")
    return ", ".join([name, *notes])


def report(
    config: Config, scores: dict[str, TaskScore], checkpoint: str, values: dict[str, Any], samples: list[dict[str, Any]]
) -> None:
    """Print the table and ChatCORE, and record them."""
    base_dir, stage = get_base_dir(to_write=False), STAGE[config.source]
    rows = [score.table_row(name) for name, score in scores.items()]
    columns = [*TABLE_COLUMNS, "of several answers"] if any(row[-1] for row in rows) else TABLE_COLUMNS
    print_table("", [row[: len(columns)] for row in rows], columns)
    if config.embedded_sample:
        say("--embedded-sample: nothing is recorded in the report")
        return
    results = {name: (score.right, score.total) for name, score in scores.items()}
    values = {
        **values,
        "checkpoint": checkpoint,
        **accuracy_values(results, {name: score.guessing for name, score in scores.items()}),
        "splits": {name: score.split for name, score in scores.items()},
        "sizes": {name: score.size for name, score in scores.items()},
        "samples": samples,
        "command": command_line("chat_eval", config),
    }
    shares = {name: score.shares for name, score in scores.items()}
    earlier, sizes = earlier_shares(base_dir, stage, checkpoint)
    core = chat_core({**earlier, **shares}, {**sizes, **values["sizes"]}) if CHATCORE.keys() & scores.keys() else None
    if core:
        say(core.describe())
        values |= core.report_values()
    record_stage(base_dir, stage, values)


if __name__ == "__main__":
    _cli.run(main, memory_flags="--batch-size or --max-new-tokens")
