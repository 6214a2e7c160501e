"""The tasks that chat_rl knows by name, each as levels of rising difficulty, and how many items it makes of them."""

from collections.abc import Callable, Mapping
from typing import Any

from nanochat.common import UserError
from tasks.arithmetic import Arithmetic
from tasks.code import Code
from tasks.common import Task
from tasks.formats import Format
from tasks.gsm8k import GSM8K
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.starter import Identity
from tasks.wordproblems import LEVELS, WordProblems

TRAIN_SIZE = 4096  # items of a task that has no end

Build = Callable[[str, int, int], list[Task]]  # split, size, seed


def generated(kind: Any) -> Build:
    return lambda split, size, seed: [kind(size=size, split=split, seed=seed)]


def word_problems(split: str, size: int, seed: int) -> list[Task]:
    return [WordProblems(level, size, split, seed=seed) for level in LEVELS]


REWARDED: Mapping[str, Build] = {
    "WordProblems": word_problems,
    "GSM8K": lambda split, size, seed: [GSM8K("main", split)],
    "Arithmetic": generated(Arithmetic),
    "LetterCounting": generated(SpellingBee),
    "Spelling": generated(SimpleSpelling),
    "Identity": lambda split, size, seed: [Identity("train" if split == "train" else "val", stop=size)],
    "Format": generated(Format),
    "Code": generated(Code),
}


def make_levels(name: str, split: str, size: int = TRAIN_SIZE, seed: int = 0) -> list[Task]:
    """The levels of the task called `name` (case aside), easiest first. Held-out items (split "test") do not depend on
    the seed of the training ones.

    Raises UserError for an unknown name, DatasetMissing where its data is not at hand.
    """
    return REWARDED[known_name(name)](split, size, seed if split == "train" else 0)


def known_name(name: str) -> str:
    """The task's name as it is registered; raises UserError naming those there are."""
    for known in REWARDED:
        if known.lower() == name.lower():
            return known
    raise UserError(f"there is no task {name!r} to be trained on by reward; choose from {', '.join(REWARDED)}")
