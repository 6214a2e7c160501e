"""Word problems in GSM8K's format, generated from a seed, at three levels of difficulty.

    1   one step: Anna has 12 apples. She buys 5 more. How many apples does Anna have now?
    2   two steps: ... She buys 5 more. She gives away 3. ...
    3   three steps and larger numbers

A solution contains each step's calculation, which becomes a calculator call, and ends in `#### 14`. A hash of the
numbers and operations decides whether a problem belongs to the training or the test split.
"""

import operator
import random
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import Conversation
from tasks.answers import exchange, has_right_marked_number
from tasks.common import GeneratedTask, in_test_split, keyed_random
from tasks.gsm8k import solution_parts

LEVELS = (1, 2, 3)

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

# How a quantity changes: by {n} of {things}.
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
# One-step problems that do not change what a person has. {a} and {b} in the order of the calculation.
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

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Problem:
    """A number and the operations applied to it; every intermediate result is a non-negative integer."""

    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def held_out(self) -> bool:
        """Whether this is a problem of the test split."""
        return in_test_split(repr((self.first, self.steps)))

    def results(self) -> list[int]:
        """The result of each step."""
        values = [self.first]
        for operation, n in self.steps:
            values.append(APPLY[operation](values[-1], n))
        return values[1:]


class WordProblems(GeneratedTask):
    """Word problems of one level."""

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
        problem = draw_problem(rng, self.level)
        while problem.held_out != (self.split == "test"):
            problem = draw_problem(rng, self.level)
        things = rng.choice(THINGS)
        return exchange(story(rng, problem, things), solution_parts(solution(problem, things)))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return has_right_marked_number(conversation, completion)


def draw_problem(rng: random.Random, level: int) -> Problem:
    """A random problem of a level."""
    problem = Problem(rng.randint(2, 99 if level == 3 else 50), ())
    for _ in range(level):
        problem = Problem(problem.first, (*problem.steps, draw_step(rng, problem, level)))
    return problem


def draw_step(rng: random.Random, problem: Problem, level: int) -> tuple[str, int]:
    """A next step: another operation than the last one, and division only without remainder."""
    value = [problem.first, *problem.results()][-1]
    divisors = [n for n in range(2, 11) if value % n == 0 and value > n]
    possible = {"+": True, "-": value > 2, "*": value <= 100, "/": bool(divisors) and level != 2}
    last = problem.steps[-1][0] if problem.steps else ""
    operation = rng.choice([op for op in "+-*/" if possible[op] and op != last])
    if operation == "/":
        return "/", rng.choice(divisors)
    low, high = {"+": (2, 99 if level == 3 else 30), "-": (1, value - 1), "*": (2, 9 if level == 3 else 5)}[operation]
    return operation, rng.randint(low, high)


def story(rng: random.Random, problem: Problem, things: str) -> str:
    """The problem in words, ending in a question."""
    (name, she), (other, _) = rng.sample(PEOPLE, 2)
    if len(problem.steps) == 1 and rng.random() < 0.5:
        operation, n = problem.steps[0]
        return rng.choice(SINGLE[operation]).format(a=problem.first, b=n, name=name, other=other, things=things)
    sentences = [f"{name} has {problem.first} {things}."]
    for operation, n in problem.steps:
        sentences.append(rng.choice(EVENTS[operation]).format(n=n, name=name, She=she, things=things))
    return " ".join([*sentences, f"How many {things} does {name} have now?"])


def solution(problem: Problem, things: str) -> str:
    """The solution in GSM8K's format."""
    lines, value = [], problem.first
    for (operation, n), result in zip(problem.steps, problem.results()):
        lines.append(f"<<{value}{operation}{n}={result}>>{result} {things}.")
        value = result
    return "\n".join([*lines, f"#### {value}"])
