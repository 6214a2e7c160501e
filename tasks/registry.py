"""The tasks that chat_eval and chat_rl know by name, with the score that guessing gets."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Task
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.starter import Identity
from tasks.wordproblems import LEVELS, WordProblems

GENERATED_SIZE = 256  # items of a task that has no end


@dataclass(frozen=True)
class TaskSpec:
    """How to make a task for evaluation. `baseline` is the accuracy of guessing, in [0, 1]."""

    name: str
    build: Callable[..., Task]  # build(split, **kwargs)
    split: str
    baseline: float = 0.0
    starter: bool = False  # needs nothing but the embedded data


def word_problems(level: int, split: str, size: int = GENERATED_SIZE, **kwargs: Any) -> Task:
    return WordProblems(level, size, split, **kwargs)


TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("ARC-Easy", lambda split, **kw: ARC("ARC-Easy", split, **kw), "test", 0.25),
        TaskSpec("ARC-Challenge", lambda split, **kw: ARC("ARC-Challenge", split, **kw), "test", 0.25),
        TaskSpec("MMLU", lambda split, **kw: MMLU("all", split, **kw), "test", 0.25),
        TaskSpec("GSM8K", lambda split, **kw: GSM8K("main", split, **kw), "test"),
        TaskSpec("HumanEval", lambda split, **kw: HumanEval(split, **kw), "test"),
        TaskSpec("SpellingBee", lambda split, **kw: sized(SpellingBee, split, **kw), "test", starter=True),
        TaskSpec("SimpleSpelling", lambda split, **kw: sized(SimpleSpelling, split, **kw), "test", starter=True),
        TaskSpec("Arithmetic", lambda split, **kw: sized(Arithmetic, split, **kw), "test", starter=True),
        *(TaskSpec(f"WordProblems{level}", partial(word_problems, level), "test", starter=True) for level in LEVELS),
        TaskSpec("Identity", lambda split, **kw: Identity(split, **kw), "val", starter=True),
    )
}


def sized(kind: Callable[..., Task], split: str, size: int = GENERATED_SIZE, **kwargs: Any) -> Task:
    return kind(size=size, split=split, **kwargs)


def make_task(name: str, split: str | None = None, **kwargs: Any) -> Task:
    """The task called `name` (case aside), by default of the split that it is evaluated on.

    Raises UserError for an unknown name or split, DatasetMissing where its data is not at hand.
    """
    spec = task_spec(name)
    return spec.build(split or spec.split, **kwargs)


def task_spec(name: str) -> TaskSpec:
    """The registered task called `name`, case aside; raises UserError naming those there are."""
    for known, spec in TASKS.items():
        if known.lower() == name.lower():
            return spec
    raise UserError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
