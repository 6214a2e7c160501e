"""Find benchmark items in the training text: `python -m scripts.contamination --data=starter`."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir, say, write_json
from nanochat.common.output import ProgressLine
from nanochat.dataset import Corpus
from nanochat.evals.contamination import NGRAM, Index
from nanochat.evals.core_bundle import read_bundle
from nanochat.report import record_stage
from nanochat.reporting.console import print_table
from nanochat.train.config import DataConfig
from scripts import _cli
from tasks.hub import HubTask
from tasks.registry import TASKS, make_task

QUESTION_PREFIX = re.compile(r"^\s*(?:question|passage|context)\s*:\s*", re.IGNORECASE)


@dataclass
class Config(DataConfig):
    """Find benchmark items in the training text by shared runs of thirteen words."""

    tasks: str = ""
    """Benchmarks, separated by commas; empty: all whose data is at hand."""
    eval_bundle: str = ""
    """Folder of the CORE bundle; empty: eval_bundle/ in the base folder, if it is there."""
    max_documents: int = -1
    """Training documents to check; -1 takes all."""


def main(argv: Sequence[str] | None = None) -> None:
    config = _cli.parse(Config, argv)
    base_dir, started = get_base_dir(), time.perf_counter()
    benchmarks, missing = read_benchmarks(config, base_dir)
    for reason in missing:
        say(f"left out: {reason}")
    if not benchmarks:
        raise UserError(
            "no benchmark is at hand: connect to the internet, put their files under NANOCHAT_DATASETS_DIR, or give "
            "the CORE bundle with --eval-bundle"
        )
    corpus = config.open_corpus(base_dir)
    index = Index(benchmarks)
    count = index.check(documents(corpus, config.max_documents))
    found_path = base_dir / "contamination" / "found.json"
    write_json(found_path, {name: overlap.found for name, overlap in index.overlaps.items()})
    rows = [overlap.table_row(name) for name, overlap in index.overlaps.items()]
    cells = [
        (
            str(row["benchmark"]),
            f"{row['found in training text']} of {row['items']} ({row['share']:.2%}); "
            f"{row['too short to check']} too short",
        )
        for row in rows
    ]
    print_table(f"benchmark items in {count:,} documents of {corpus.name}", cells)
    say(f"each found item with its document: {found_path}")
    values = {
        "seconds": time.perf_counter() - started,
        "documents": count,
        "words_in_common": NGRAM,
        "corpus": corpus.name,
        "tables": {"Benchmark items found in the training text": rows},
    }
    record_stage(base_dir, "contamination", values)


def documents(corpus: Corpus, max_documents: int) -> Iterator[str]:
    """The texts of the training documents (all if `max_documents` is negative), with progress lines."""
    progress = ProgressLine(lambda: f"{number:,} documents checked")
    for number, document in enumerate(corpus.iter_documents("train")):
        if 0 <= max_documents <= number:
            break
        progress.show()
        yield document.text
    progress.close()


def read_benchmarks(config: Config, base_dir: Path) -> tuple[dict[str, list[list[str]]], list[str]]:
    """(for each benchmark the texts that identify each item, reasons why others are skipped)."""
    wanted = [name.strip() for name in config.tasks.split(",") if name.strip()]
    if own := [name for name in wanted if name in TASKS and TASKS[name].starter]:
        raise UserError(f"--tasks: {', '.join(own)} is made by this system, not a public benchmark")
    found: dict[str, list[list[str]]] = {}
    missing = []
    for name, spec in TASKS.items():
        if spec.starter or (wanted and name not in wanted):
            continue
        reasons = []
        for split in dict.fromkeys((spec.split, "validation")):  # either is kept out of training
            try:
                found[f"{name} ({split})"] = hub_texts(name, split)
            except UserError as error:
                reasons.append(str(error))
        if not any(key.startswith(f"{name} (") for key in found):
            missing.append(reasons[0])
    folder = Path(config.eval_bundle or base_dir / "eval_bundle")
    if folder.is_dir():
        for core in read_bundle(folder).tasks:
            if not wanted or core.label in wanted:
                found[core.label] = [texts_of_core_item(item) for item in core.items]
    elif config.eval_bundle:
        raise UserError(f"--eval-bundle={config.eval_bundle}: there is no such folder")
    if unknown := [name for name in wanted if name not in found and name not in TASKS]:
        raise UserError(f"--tasks: there is no {', '.join(unknown)}; at hand are {', '.join(found) or 'none'}")
    return found, missing


def hub_texts(name: str, split: str) -> list[list[str]]:
    """The texts of each item of a public benchmark."""
    task = make_task(name, split)
    assert isinstance(task, HubTask)
    return [task.published_texts(row) for row in task.rows]


def texts_of_core_item(item: dict[str, Any]) -> list[str]:
    """The texts that identify an item of the CORE bundle, without a leading "Question:" or the like."""
    if "context_options" in item:
        return [f"{item['context_options'][item['gold']]} {item['continuation']}"]
    question = QUESTION_PREFIX.sub("", item.get("query") or item.get("context") or "")
    answer = item["choices"][item["gold"]] if "choices" in item else item["continuation"]
    return [question, f"{question} {answer}"]


if __name__ == "__main__":
    _cli.run(main)
