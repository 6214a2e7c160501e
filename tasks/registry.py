"""Names of tasks: those that chat_eval measures (TASKS) and those that chat_rl trains on (REWARDED)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanochat.common import UserError
from nanochat.execution import choose_level
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.code import Code
from tasks.common import Task
from tasks.formats import Format
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.starter import Identity
from tasks.stories import Stories
from tasks.unknown import Unknown
from tasks.wordproblems import LEVELS, WordProblems

EVAL_SIZE = 256  # items of a generated task in evaluation
TRAIN_SIZE = 4096  # and in reinforcement learning


@dataclass(frozen=True)
class TaskSpec:
    """How to build a task for evaluation."""

    build: Callable[..., Task]  # build(split=split, **kwargs)
    split: str = "test"
    baseline: float = 0.0  # accuracy of guessing, in [0, 1]
    starter: bool = False  # whether it works offline, with the starter data alone


def generated(kind: Callable[..., Task], *args: Any) -> TaskSpec:
    """The spec of a generated task."""
    return TaskSpec(partial(kind, *args, size=EVAL_SIZE), starter=True)


TASKS: dict[str, TaskSpec] = {
    "ARC-Easy": TaskSpec(partial(ARC, "ARC-Easy"), baseline=0.25),
    "ARC-Challenge": TaskSpec(partial(ARC, "ARC-Challenge"), baseline=0.25),
    "MMLU": TaskSpec(partial(MMLU, "all"), baseline=0.25),
    "GSM8K": TaskSpec(GSM8K),
    "HumanEval": TaskSpec(HumanEval),
    "SpellingBee": generated(SpellingBee),
    "SimpleSpelling": generated(SimpleSpelling),
    "Arithmetic": generated(Arithmetic),
    **{f"WordProblems{level}": generated(WordProblems, level) for level in LEVELS},
    "Identity": TaskSpec(Identity, "val", starter=True),
    "Unanswerable": TaskSpec(partial(Unknown, answerable=False), "val", starter=True),
    "Answerable": TaskSpec(partial(Unknown, answerable=True), "val", starter=True),
    "Stories": TaskSpec(Stories, starter=True),
}

# Levels of rising difficulty, each called with size, split ("train" or "test") and seed.
REWARDED: dict[str, Sequence[Callable[..., Task]]] = {
    "WordProblems": [partial(WordProblems, level) for level in LEVELS],
    "GSM8K": [lambda size, split, seed: GSM8K(split=split)],
    "Arithmetic": [Arithmetic],
    "LetterCounting": [SpellingBee],
    "Spelling": [SimpleSpelling],
    "Identity": [lambda size, split, seed: Identity("train" if split == "train" else "val", stop=size)],
    "Unknown": [lambda size, split, seed: Unknown("train" if split == "train" else "val", stop=size)],
    "Answerable": [
        lambda size, split, seed: Unknown("train" if split == "train" else "val", answerable=True, stop=size)
    ],
    "Format": [Format],
    "Code": [Code],
}


def make_task(name: str, split: str | None = None, **kwargs: Any) -> Task:
    """A task of TASKS, by default of its evaluation split.

    Raises UserError for an unknown name or split, DatasetMissing if its data is not available.
    """
    spec = TASKS[known_name(name, TASKS)]
    return spec.build(split=split or spec.split, **kwargs)


def make_levels(name: str, split: str, size: int = TRAIN_SIZE, seed: int = 0) -> list[Task]:
    """The levels of a task of REWARDED, easiest first. The test split ignores `seed`.

    Raises UserError for an unknown name, DatasetMissing if its data is not available.
    """
    levels = REWARDED[known_name(name, REWARDED)]
    return [level(size=size, split=split, seed=seed if split == "train" else 0) for level in levels]


def known_name(name: str, known: Iterable[str]) -> str:
    """The entry of `known` that equals `name` up to case; raises UserError listing them."""
    for candidate in known:
        if candidate.lower() == name.lower():
            return candidate
    raise UserError(f"there is no task {name!r}; choose from {', '.join(known)}")


def open_tasks(
    names: Iterable[str], split: str | None, sample: bool, sandbox: str, skip_missing: bool
) -> tuple[dict[str, Task], list[str]]:
    """(tasks by name, reasons why others were skipped). `sample`: the embedded items of public benchmarks.

    Raises UserError if a task has no such data, split or sandbox, unless `skip_missing`, or if none is left.
    """
    tasks, missing = {}, []
    for name in names:
        try:
            extra: dict[str, Any] = {"sample": True} if sample and not TASKS[name].starter else {}
            if name == "HumanEval":
                extra["sandbox"] = choose_level(sandbox)
            tasks[name] = make_task(name, split, **extra)
        except UserError as error:
            if not skip_missing:
                raise
            missing.append(str(error))
    if not tasks:
        raise UserError("nothing to evaluate: " + "; ".join(missing))
    return tasks, missing
