"""The CORE bundle on disk, as published: core.yaml, eval_meta_data.csv, eval_data/**/*.jsonl.

Everything is validated on reading, and errors name file and line: a wrong gold answer would otherwise only lower the
score a little.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import yaml
from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from nanochat.common import UserError
from nanochat.common.files import check_value, read_file

# Tasks whose chance level the two published lists of baselines disagree on, in percent: (v1, v2).
# The published GPT-2 figures, and those of this system, use v1.
REVISED_BASELINES = {
    "commonsense_qa": (20.0, 40.3),
    "agi_eval_lsat_ar": (20.0, 25.0),
    "bigbench_language_identification": (9.1, 25.0),
}


class Entry(TypedDict):
    """A task in core.yaml."""

    label: str
    dataset_uri: Annotated[str, StringConstraints(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]  # a file below eval_data/
    num_fewshot: Annotated[list[Annotated[int, Field(ge=0, le=1000)]], Field(min_length=1)]
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    continuation_delimiter: NotRequired[str]
    has_categories: NotRequired[bool]


class Entries(TypedDict):
    icl_tasks: list[Entry]


@dataclass
class CoreTask:
    """One of the 22 tasks. `items` hold, by kind: query, choices, gold; context_options, continuation, gold;
    context, continuation; and category, if the task has categories."""

    label: str
    kind: str
    num_fewshot: int
    delimiter: str  # between context and continuation
    baseline: float  # accuracy of guessing, 0 to 1
    items: list[dict[str, Any]]
    has_categories: bool = False  # DCLM's harness averages over them


@dataclass
class Bundle:
    """The tasks that were read, the labels of tasks without data, and the labels of tasks that were not requested."""

    tasks: list[CoreTask]
    missing: list[str]
    left_out: list[str]


def read_bundle(folder: Path, baselines: str = "v1", only: str = "") -> Bundle:
    """Read a bundle. `only`: labels separated by commas. `baselines`: v1 or v2.

    Raises UserError if the folder is not a bundle, a task does not exist, or data is invalid.
    """
    config_file, meta_file = folder / "core.yaml", folder / "eval_meta_data.csv"
    for file in (config_file, meta_file):
        if not file.is_file():
            raise UserError(
                f"{folder} is not a CORE bundle: it has no {file.name}; delete a half-downloaded one, "
                "or name another with --eval-bundle"
            )
    chances = read_baselines(meta_file, baselines)
    entries = read_entries(config_file)
    wanted = [label.strip() for label in only.split(",") if label.strip()] or [entry["label"] for entry in entries]
    if unknown := sorted(set(wanted) - {entry["label"] for entry in entries}):
        known = ", ".join(entry["label"] for entry in entries)
        raise UserError(f"no CORE task is called {', '.join(unknown)}; there are: {known}")
    tasks, missing = [], []
    for entry in entries:
        label = entry["label"]
        if label not in wanted:
            continue
        path = folder / "eval_data" / entry["dataset_uri"]
        if not path.is_file():
            missing.append(label)
            continue
        if label not in chances:
            raise UserError(f"{meta_file} has no random baseline for {label}")
        kind, shots, categories = entry["icl_task_type"], entry["num_fewshot"][0], entry.get("has_categories", False)
        items = read_items(path, kind, categories)
        delimiter = entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(label, kind, shots, delimiter, chances[label], items, categories))
    if not tasks:
        raise UserError(
            f"{folder} holds no data of {', '.join(missing)}: was the download interrupted? Delete the "
            "folder and try again"
        )
    return Bundle(tasks, missing, [entry["label"] for entry in entries if entry["label"] not in wanted])


def read_entries(path: Path) -> list[Entry]:
    """The tasks of core.yaml, validated."""
    try:
        values = yaml.safe_load(read_file(path))
        return check_value(values, path, Entries, extra="ignore")["icl_tasks"]
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not a list of CORE tasks: {' '.join(str(error).split())[:200]}") from error


def read_baselines(path: Path, version: str) -> dict[str, float]:
    """Accuracy of guessing by task, 0 to 1."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            found = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a table of tasks with a 'Random baseline' in percent: {error}") from error
    if wrong := [label for label, percent in found.items() if not 0 <= percent < 100]:
        raise UserError(f"{path}: the random baseline of {wrong[0]} must be from 0 to below 100 percent")
    for label, chances in REVISED_BASELINES.items():
        if label in found:
            found[label] = chances[version == "v2"]
    return {label: percent / 100 for label, percent in found.items()}


def read_items(path: Path, kind: str, has_categories: bool = False) -> list[dict[str, Any]]:
    """The items of a task's jsonl, validated."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(check_item(json.loads(line), kind, has_categories))
            except (json.JSONDecodeError, ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
    if not items:
        raise UserError(f"{path} is empty")
    return items


def check_item(item: Any, kind: str, has_categories: bool = False) -> dict[str, Any]:
    """The item. Raises ValueError unless it is a valid item of that kind."""
    texts = {"multiple_choice": ("query",), "schema": ("continuation",), "language_modeling": ("context",)}[kind]
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    for key in (*texts, "category") if has_categories else texts:
        if not isinstance(item.get(key), str):
            raise ValueError(f"{key!r} must be text")
    if kind == "language_modeling":
        if not isinstance(item.get("continuation"), str) or not item["continuation"].strip():
            raise ValueError("'continuation' must be text that is not empty")
        return item
    options_key = "choices" if kind == "multiple_choice" else "context_options"
    options, gold = item.get(options_key), item.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        raise ValueError(f"{options_key!r} must be a list of at least two texts")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"'gold' must be a number from 0 to {len(options) - 1}, got {gold!r}")
    return item
