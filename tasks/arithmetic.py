"""Sums that the model answers by calling the calculator: `What is 12 + 7?` -> `12+7` -> `19`.

A sum belongs to the training or the test split by a hash of its numbers and operation, order aside
where order does not matter, so no seed, size or phrasing lets one split produce an item of the other.
"""

import hashlib
import random

from nanochat.inference.calculator import use_calculator
from tasks.answers import Conversation, final_number, final_text, keyed_random, reference_text
from tasks.common import GeneratedTask

TEST_SHARE = 10  # one sum in so many is held out

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
        rng = keyed_random("Arithmetic", self.seed, self.split, index)
        operation = rng.choice("+-*/")
        a, b = draw_operands(rng, operation)
        while is_held_out(a, b, operation) != (self.split == "test"):
            a, b = draw_operands(rng, operation)
        question = phrase(rng, a, b, operation)
        return {"messages": [{"role": "user", "content": question}, calculated_answer(f"{a}{operation}{b}")]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The number given after the last tool output must be the result."""
        return final_number(final_text(conversation, completion)) == final_number(reference_text(conversation))


def is_held_out(a: int, b: int, operation: str) -> bool:
    """Whether `a operation b` belongs to the test split."""
    if operation in "+*":
        a, b = min(a, b), max(a, b)
    return hashlib.sha256(f"{a}{operation}{b}".encode()).digest()[0] % TEST_SHARE == 0


def draw_operands(rng: random.Random, operation: str) -> tuple[int, int]:
    """Two numbers of 1 to 3 digits, each length as likely; a division comes out whole."""
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    if operation == "/":
        b = rng.randrange(1, 10 ** rng.randint(1, 2))
        return b * rng.randrange(1, 999 // b + 1), b
    if operation == "-" and a < b and rng.random() < 0.9:  # negative results are rarer in life, too
        return b, a
    return a, b


def phrase(rng: random.Random, a: int, b: int, operation: str) -> str:
    """The sum as somebody would ask for it."""
    if rng.random() < 0.25:
        return rng.choice(SPECIAL[operation]).format(a=a, b=b)
    return rng.choice(COMMON).format(sum=rng.choice(SYMBOLS[operation]).format(a=a, b=b))


def calculated_answer(expression: str) -> Conversation:
    """The assistant's turn: the calculator call, its output, the same number as the answer."""
    result = use_calculator(expression)
    assert result is not None, expression
    parts = [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": str(result)},
        {"type": "text", "text": str(result)},
    ]
    return {"role": "assistant", "content": parts}
