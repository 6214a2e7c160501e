"""Small Python functions to write, checked by tests in the sandbox."""

from collections.abc import Callable
from typing import Any

from nanochat.conversation import Conversation
from tasks.answers import exchange
from tasks.common import GeneratedTask
from tasks.humaneval import extract_program, passes_tests

# Signature, description, expression, and the same as a function of n and the arguments; {n} is from 2 to 99.
FUNCTIONS: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    ("(x)", "x plus {n}", "x + {n}", lambda n, x: x + n),
    ("(x)", "x minus {n}", "x - {n}", lambda n, x: x - n),
    ("(x)", "x times {n}", "x * {n}", lambda n, x: x * n),
    ("(x)", "the rest of x divided by {n}", "x % {n}", lambda n, x: x % n),
    ("(a, b)", "the larger of a and b, plus {n}", "max(a, b) + {n}", lambda n, a, b: max(a, b) + n),
    ("(a, b)", "{n} times the sum of a and b", "{n} * (a + b)", lambda n, a, b: n * (a + b)),
    ("(x)", "whether x is larger than {n}", "x > {n}", lambda n, x: x > n),
    ("(x)", "the square of x, plus {n}", "x * x + {n}", lambda n, x: x * x + n),
)
NUM_CALLS = 5  # random calls per test program
TIMEOUT_SECONDS = 2.0


class Code(GeneratedTask):
    """Write a function `f`. The number n in the description decides the split: multiples of five are held out."""

    def get_example(self, index: int) -> Conversation:
        rng = self.rng(index)
        numbers = [n for n in range(2, 100) if (n % 5 == 0) == (self.split == "test")]
        signature, description, expression, function = rng.choice(FUNCTIONS)
        n = rng.choice(numbers)
        num_arguments = signature.count(",") + 1
        calls = [tuple(rng.randint(-200, 200) for _ in range(num_arguments)) for _ in range(NUM_CALLS)]
        # Edge cases: swapped arguments catch answers that use only one of them; n itself and its neighbours.
        calls += [(a, b) for b, a in calls] if num_arguments == 2 else [(n - 1,), (n,), (n + 1,)]
        tests = "\n".join(f"assert f(*{call}) == {function(n, *call)!r}" for call in calls)
        question = f"Write a Python function f{signature} that returns {description.format(n=n)}."
        return exchange(question, f"def f{signature}:\n    return {expression.format(n=n)}", tests=tests)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the function passes its tests. Raises UserError if there is no sandbox."""
        program = extract_program(completion)
        return "def f" in program and passes_tests(program, conversation["tests"], "f", TIMEOUT_SECONDS)
