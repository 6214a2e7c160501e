"""Measure a chat model's skills on held-out items: `python -m scripts.chat_eval`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat.checkpoint_manager import find_run, load_model
from nanochat.common import UserError, get_base_dir, say, sha256_file
from nanochat.engine import Engine
from nanochat.execution import choose_level
from nanochat.ranges import Range
from nanochat.report import accuracy_values, load_report, record_stage
from nanochat.reporting.console import print_table
from nanochat.reporting.view import wilson_interval
from nanochat.runtime import Runtime
from nanochat.train.run import command_line
from scripts import _cli
from tasks.common import Task
from tasks.evaluation import (
    CHATCORE,
    AskFlags,
    ChatCore,
    ask_on_all_ranks,
    chat_core,
    constant_share,
    pass_rates,
    write_transcripts,
)
from tasks.registry import TASKS, known_name, make_task

STAGE = {"sft": "chat_eval", "rl": "chat_eval_rl"}  # of the report


@dataclass
class Config:
    """Measure a chat model's skills on held-out items. -1 means "all" or "the last"."""

    source: Annotated[Literal["sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: sft or rl."""
    task_name: Annotated[str, tyro.conf.arg(aliases=["-a"])] = ""
    """Tasks separated by | or commas; empty runs the embedded skills, all whatever data is at hand."""
    split: str = ""
    """Another split than the one that a task is meant to be evaluated on, such as validation."""
    embedded_sample: bool = False
    """Of public benchmarks, use the few embedded items: to try the code, not to report a score."""
    max_problems: Annotated[int, tyro.conf.arg(aliases=["-x"]), Range(1, unset=-1)] = 200
    """Items per task; -1 takes all."""
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"]), Range(1)] = 1
    """Answers per item (with -t above 0); an item counts by its share of right ones, pass@k is shown beside."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"]), Range(1)] = 32
    """Items decoded together."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"]), Range(1)] = 128
    """Longest answer."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"]), Range(0)] = 0.0
    """0 takes the most likely token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"]), Range(0)] = 50
    """Sample among the k most likely tokens; 0 is off."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Its step; -1 takes the last."""
    device_type: str = ""
    """cuda, mps or cpu; empty picks the best there is."""
    sandbox: str = ""
    """Where HumanEval runs the model's code: bubblewrap, landlock or, protecting from nothing, unsafe; empty takes the
    strongest of the first two."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    names = [n.strip() for n in config.task_name.replace("|", ",").split(",") if n.strip()]
    if names == ["all"]:
        names = list(TASKS)
    names = [known_name(name, TASKS) for name in names] or [name for name, spec in TASKS.items() if spec.starter]
    if config.num_samples > 1 and config.temperature == 0:
        raise UserError("-n asks for several answers, which at -t 0 are all the same: give a temperature, such as -t 1")
    tasks, missing = open_tasks(config, names)
    with Runtime.create(config.device_type) as runtime:
        for reason in missing:
            runtime.print0(f"left out: {reason}")
        return evaluate(config, tasks, runtime)


def open_tasks(config: Config, names: list[str]) -> tuple[dict[str, Task], list[str]]:
    """(the tasks by name, reasons why others are left out). With `-a all` what is not at hand is no error."""
    tasks, missing = {}, []
    for name in names:
        try:
            extra: dict[str, Any] = {"sample": True} if config.embedded_sample and not TASKS[name].starter else {}
            if name == "HumanEval":
                extra["sandbox"] = choose_level(config.sandbox)
            tasks[name] = make_task(name, config.split or None, **extra)
        except UserError as error:  # no such data, no such split, no sandbox
            if config.task_name.strip() != "all":
                raise
            missing.append(str(error))
    if not tasks:
        raise UserError("nothing to evaluate: " + "; ".join(missing))
    return tasks, missing


def evaluate(config: Config, tasks: dict[str, Task], runtime: Runtime) -> int:
    started = time.perf_counter()
    base_dir = get_base_dir()
    run = find_run(base_dir, config.source, config.model_tag or None)
    model, tokenizer, meta = load_model(
        config.source,
        runtime,
        base_dir=base_dir,
        model_tag=run.name,
        step=None if config.step < 0 else config.step,
        compute_dtype=runtime.dtype,
    )
    runtime.print0(f"{runtime.describe()}\nchat model: {run.name}, step {meta['step']}")
    engine = Engine(model, tokenizer)
    folder = base_dir / "chat_eval" / f"{config.source}_{run.name}_{meta['step']:06d}"
    results: dict[str, tuple[float, int]] = {}
    shares: dict[str, list[float]] = {}
    guesses: dict[str, float] = {}
    samples: list[dict[str, str]] = []
    rows = []
    flags = AskFlags(config.num_samples, config.batch_size, config.max_new_tokens, config.temperature, config.top_k)
    for name, task in tasks.items():
        total = len(task) if config.max_problems < 0 else min(config.max_problems, len(task))
        rights, outcomes = ask_on_all_ranks(task, total, engine, flags, runtime)
        per_item = 1 if task.eval_type == "categorical" else config.num_samples
        shares[name] = [right / per_item for right in rights]
        right = sum(rights) / per_item
        right = int(right) if right.is_integer() else right
        results[name] = (right, total)
        low, high = wilson_interval(right, total)
        split = getattr(task, "split", "") or config.split or TASKS[name].split
        rates = pass_rates(rights, per_item)
        more = "  ".join(f"pass@{k} {rate:.1%}" for k, rate in rates.items() if k > 1)
        guesses[name] = guessing(name, task)
        rows.append(
            (
                name,
                split,
                f"{right:g}",
                str(total),
                f"{right / total:.1%}",
                f"{low:.1%} - {high:.1%}",
                f"{guesses[name]:.1%}",
                more,
            )
        )
        samples += [
            {"prompt": o.conversation["messages"][0]["content"], "text": o.samples[0].text} for o in outcomes[:3]
        ]
        suffix = f".rank{runtime.rank}" if runtime.world_size > 1 else ""
        write_transcripts(folder / f"{name}{suffix}.jsonl", name, split, outcomes)
    # Another model of the same name and step has other weights, and its own figures.
    saved = sha256_file(run / f"{meta['step']:06d}" / "manifest.json")[:12]
    # Another split may be what the model was trained on: no part of ChatCORE.
    usual = all(config.split in ("", TASKS[name].split) for name in tasks)
    checkpoint = f"{config.source}/{run.name}/{meta['step']}/{saved}" + ("/sample" if config.embedded_sample else "")
    checkpoint += "" if usual else f"/{config.split}"
    known = earlier_shares(base_dir, STAGE[config.source], checkpoint)
    core = None if config.embedded_sample or not usual else chat_core({**known, **shares})
    if runtime.is_main:
        show(rows, core)
        say(f"every question and answer: {folder}")
        values: dict[str, Any] = {
            "seconds": time.perf_counter() - started,
            "model": run.name,
            "step": meta["step"],
            "checkpoint": checkpoint,
            **accuracy_values(results, guesses),
            "splits": {row[0]: row[1] for row in rows},
            "samples": samples,
            "command": command_line("chat_eval", config),
        }
        if core:
            values |= {
                "chatcore": core.value,
                "chatcore_interval": [core.low, core.high],
                "chatcore_missing": core.missing,
            }
        record_stage(base_dir, STAGE[config.source], values)
    return 0


def guessing(name: str, task: Task) -> float:
    """The accuracy of guessing, or of always giving the same answer where that is more. Over more items than may be
    asked: among a few, any answer is a frequent one."""
    items = min(len(task), 2000)
    constant = constant_share([task[i] for i in range(items)]) if items >= 50 else None
    return max(TASKS[name].baseline, constant or 0.0)


def earlier_shares(base_dir: Path, stage: str, checkpoint: str) -> dict[str, list[float]]:
    """What the report already knows of this very model, so that its tasks may be evaluated one command at a time."""
    try:
        known = load_report(base_dir).get(stage) or {}
    except UserError:  # no report yet
        return {}
    if known.get("checkpoint") != checkpoint:
        return {}
    found = {}
    for name, (right, total) in known["counts"].items():
        whole = int(right)  # of an item with several answers the report keeps no single shares: one has the rest
        if total and name in CHATCORE:
            found[name] = ([1.0] * whole + [right - whole] + [0.0] * total)[:total]
    return found


def show(rows: Sequence[tuple[str, ...]], core: ChatCore | None) -> None:
    """The results as a table, and ChatCORE."""
    columns = ["task", "split", "right", "of", "accuracy", "95% interval", "guessing"]
    if any(row[-1] for row in rows):
        columns.append("of several answers")
    print_table("", [row[: len(columns)] for row in rows], columns)
    if core:
        partial = f"; partial, without {', '.join(core.missing)}" if core.missing else ""
        say(f"ChatCORE {core.value:.4f} (95% {core.low:.4f} to {core.high:.4f}{partial})")


if __name__ == "__main__":
    _cli.run(main)
