"""Arithmetic answered by calling the calculator: `What is 12 + 7?` -> `12+7` -> `19`.

A hash of the numbers and the operation decides whether a problem belongs to the training or the test split; 3 + 5 and
5 + 3 are the same problem.
"""

import random

from nanochat.conversation import Conversation
from tasks.answers import calculator_call, exchange, has_right_number
from tasks.common import GeneratedTask, in_test_split

# {a} and {b} are the operands in the order of the expression.
COMMON = (
    "What is {sum}?",
    "what is {sum}",
    "What's {sum}?",
    "Calculate {sum}",
    "Calculate {sum}.",
    "How much is {sum}?",
    "how much is {sum}",
    "Compute {sum}.",
    "Can you calculate {sum}?",
    "Tell me what {sum} is.",
    "{sum}",
    "{sum}?",
    "{sum} =",
)
SYMBOLS = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} plus {b}"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} minus {b}"),
    "*": ("{a} * {b}", "{a}*{b}", "{a} x {b}", "{a} times {b}", "{a} multiplied by {b}"),
    "/": ("{a} / {b}", "{a}/{b}", "{a} divided by {b}"),
}
SPECIAL = {
    "+": ("add {a} and {b}", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "{a}+{b}="),
    "-": ("Subtract {b} from {a}.", "subtract {b} from {a}", "Take {b} away from {a}.", "{a}-{b}="),
    "*": ("Multiply {a} by {b}.", "multiply {a} and {b}", "What is the product of {a} and {b}?", "{a}*{b}="),
    "/": ("Divide {a} by {b}.", "divide {a} by {b}", "How many times does {b} go into {a}?", "{a}/{b}="),
}


class Arithmetic(GeneratedTask):
    """Addition, subtraction, multiplication of numbers below 1000, and exact division."""

    def get_example(self, index: int) -> Conversation:
        rng = self.rng(index)
        operation = rng.choice("+-*/")
        a, b = draw_operands(rng, operation)
        while is_held_out(a, b, operation) != (self.split == "test"):
            a, b = draw_operands(rng, operation)
        call = calculator_call(f"{a}{operation}{b}")
        return exchange(phrase(rng, a, b, operation), [*call, {"type": "text", "text": call[-1]["text"]}])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return has_right_number(conversation, completion)


def is_held_out(a: int, b: int, operation: str) -> bool:
    """Whether `a operation b` belongs to the test split."""
    if operation in "+*":
        a, b = min(a, b), max(a, b)
    return in_test_split(f"{a}{operation}{b}")


def draw_operands(rng: random.Random, operation: str) -> tuple[int, int]:
    """Two numbers of 1 to 3 digits, each length equally likely; divisions have no remainder."""
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    if operation == "/":
        b = rng.randrange(1, 10 ** rng.randint(1, 2))
        return b * rng.randrange(1, 999 // b + 1), b
    if operation == "-" and a < b and rng.random() < 0.9:  # keep negative results rare
        return b, a
    return a, b


def phrase(rng: random.Random, a: int, b: int, operation: str) -> str:
    """The problem as a question."""
    if rng.random() < 0.25:
        return rng.choice(SPECIAL[operation]).format(a=a, b=b)
    return rng.choice(COMMON).format(sum=rng.choice(SYMBOLS[operation]).format(a=a, b=b))
