"""Word problems in GSM8K's format, made up from a seed, at three levels of difficulty.

    1   one step: Anna has 12 apples. She buys 5 more. How many apples does Anna have now?
    2   two steps: ... She buys 5 more. She gives away 3. ...
    3   three steps and larger numbers

A solution names each step's calculation, which becomes a calculator call, and ends in `#### 14`. A problem belongs to
the training or the test split by a hash of its numbers and operations: no seed, size or phrasing lets one split
produce a problem of the other.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from tasks.answers import Conversation, final_text, keyed_random, number_after_marker, reference_text
from tasks.common import GeneratedTask
from tasks.gsm8k import solution_parts

LEVELS = (1, 2, 3)
TEST_SHARE = 10  # one problem in so many is held out

PEOPLE = (
    ("Anna", "She"),
    ("Ben", "He"),
    ("Clara", "She"),
    ("David", "He"),
    ("Emma", "She"),
    ("Frank", "He"),
    ("Grace", "She"),
    ("Henry", "He"),
    ("Julia", "She"),
    ("Leo", "He"),
    ("Mary", "She"),
    ("Tom", "He"),
)
THINGS = (
    "apples",
    "balls",
    "books",
    "cards",
    "coins",
    "cookies",
    "eggs",
    "flowers",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stones",
    "toys",
)

# How a quantity changes. {n} is the number, {things} what is counted.
EVENTS = {
    "+": (
        "{She} buys {n} more.",
        "{She} finds {n} more.",
        "{She} gets {n} more from a friend.",
        "A friend gives {name} {n} more.",
    ),
    "-": ("{She} gives away {n}.", "{She} loses {n}.", "{She} sells {n}.", "{n} of them get lost."),
    "*": ("Then the number of {things} grows to {n} times as many.", "{She} ends up with {n} times as many."),
    "/": (
        "{She} shares them equally among {n} boxes and keeps one box.",
        "{She} splits them into {n} equal piles and keeps one.",
    ),
}
# Single steps that are no change of what somebody has. {a} and {b} in the order of the calculation.
SINGLE = {
    "+": (
        "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
        "There are {a} {things} in one box and {b} in another. How many {things} are there in both?",
    ),
    "-": (
        "There are {a} {things} in a box. {name} takes out {b}. How many {things} are left in the box?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
    ),
    "*": (
        "There are {a} boxes with {b} {things} in each. How many {things} are there in all?",
        "{name} has {a} bags. Each bag holds {b} {things}. How many {things} does {name} have?",
    ),
    "/": (
        "{name} puts {a} {things} into {b} boxes, the same number in each. How many {things} are in each box?",
        "{a} {things} are shared equally by {b} children. How many {things} does each child get?",
    ),
}


@dataclass(frozen=True)
class Problem:
    """A first number and what is done to it, step by step; every number on the way is whole and not negative."""

    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(repr((self.first, self.steps)).encode()).digest()[0] % TEST_SHARE == 0

    def values(self) -> list[int]:
        """The number after each step."""
        found = [self.first]
        for operation, n in self.steps:
            last = found[-1]
            found.append({"+": last + n, "-": last - n, "*": last * n, "/": last // n}[operation])
        return found[1:]


class WordProblems(GeneratedTask):
    """Problems of one level."""

    def __init__(self, level: int = 1, size: int = 1000, split: str = "train", *, seed: int = 0, **kwargs: Any):
        super().__init__(size, split, seed=seed, **kwargs)
        if level not in LEVELS:
            raise UserError(f"WordProblems has the levels {', '.join(map(str, LEVELS))}, not {level!r}")
        self.level = level

    @property
    def name(self) -> str:
        return f"WordProblems/{self.level}"

    def get_example(self, index: int) -> Conversation:
        rng = keyed_random("WordProblems", self.level, self.seed, self.split, index)
        problem = draw(rng, self.level)
        while problem.held_out != (self.split == "test"):
            problem = draw(rng, self.level)
        things = rng.choice(THINGS)
        messages = [
            {"role": "user", "content": tell(rng, problem, things)},
            {"role": "assistant", "content": solution_parts(solve(problem, things))},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The number after the completion's last `####` must be the problem's."""
        answer = number_after_marker(reference_text(conversation))
        assert answer is not None
        return number_after_marker(final_text(conversation, completion)) == answer


def draw(rng: random.Random, level: int) -> Problem:
    """A problem of that level."""
    largest = 99 if level == 3 else 50
    first = rng.randint(2, largest)
    steps: list[tuple[str, int]] = []
    value = first
    for _ in range(level):
        operation, n = draw_step(rng, value, level, [operation for operation, _ in steps])
        steps.append((operation, n))
        value = Problem(value, ((operation, n),)).values()[0]
    return Problem(first, tuple(steps))


def draw_step(rng: random.Random, value: int, level: int, before: Sequence[str]) -> tuple[str, int]:
    """What is done to `value`: one operation is not used twice in a row, division only where it comes out whole."""
    divisors = [n for n in range(2, 11) if value % n == 0 and value > n]
    allowed = [op for op in "+-*/" if op != (before or " ")[-1]]
    allowed = [
        op
        for op in allowed
        if (op != "/" or (divisors and level != 2)) and (op != "-" or value > 2) and (op != "*" or value <= 100)
    ]
    operation = rng.choice(allowed)
    if operation == "+":
        return "+", rng.randint(2, 99 if level == 3 else 30)
    if operation == "-":
        return "-", rng.randint(1, value - 1)
    return operation, rng.choice(divisors) if operation == "/" else rng.randint(2, 9 if level == 3 else 5)


def tell(rng: random.Random, problem: Problem, things: str) -> str:
    """The problem as a story that ends in a question."""
    (name, she), (other, _) = rng.sample(PEOPLE, 2)
    if len(problem.steps) == 1 and rng.random() < 0.5:
        operation, n = problem.steps[0]
        return rng.choice(SINGLE[operation]).format(a=problem.first, b=n, name=name, other=other, things=things)
    story = [f"{name} has {problem.first} {things}."]
    for operation, n in problem.steps:
        story.append(rng.choice(EVENTS[operation]).format(n=n, name=name, She=she, things=things))
    return " ".join([*story, f"How many {things} does {name} have now?"])


def solve(problem: Problem, things: str) -> str:
    """The solution as GSM8K writes it."""
    lines, value = [], problem.first
    for (operation, n), result in zip(problem.steps, problem.values()):
        lines.append(f"<<{value}{operation}{n}={result}>>{result} {things}.")
        value = result
    return "\n".join([*lines, f"#### {value}"])
