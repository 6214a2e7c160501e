"""Small Python functions to write, judged by tests in the sandbox."""

from collections.abc import Callable
from typing import Any

from nanochat.execution import execute_code
from tasks.answers import Conversation, keyed_random
from tasks.common import GeneratedTask
from tasks.humaneval import extract_program

# Signature, what it is to return in words, the expression that does it, and the same as a function of n and the
# arguments. {n} is a number from 2 to 99.
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
CALLS = 5  # that the tests make
TIMEOUT_SECONDS = 2.0


class Code(GeneratedTask):
    """Write `f` as told. The number in the task decides the split: every fifth is held out."""

    def __init__(self, size: int = 1000, split: str = "train", *, sandbox: str = "", **kwargs: Any):
        """`sandbox`: the level to run answers at; empty takes the strongest safe one."""
        super().__init__(size, split, **kwargs)
        self.sandbox = sandbox

    def get_example(self, index: int) -> Conversation:
        rng = keyed_random("Code", self.seed, self.split, index)
        numbers = [n for n in range(2, 100) if (n % 5 == 0) == (self.split == "test")]
        signature, words, expression, function = rng.choice(FUNCTIONS)
        n = rng.choice(numbers)
        reference = f"def f{signature}:\n    return {expression.format(n=n)}"
        question = f"Write a Python function f{signature} that returns {words.format(n=n)}."
        calls = [tuple(rng.randint(-200, 200) for _ in range(signature.count(",") + 1)) for _ in range(CALLS)]
        if signature.count(","):  # what is easily got wrong by answers that look at one of the numbers only
            calls += [(a, b) for b, a in calls]
        else:
            calls += [(n - 1,), (n,), (n + 1,)]
        tests = "\n".join(f"assert f(*{call}) == {function(n, *call)!r}" for call in calls)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]
        return {"messages": messages, "tests": tests}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the function passes its tests. Raises UserError where there is no sandbox."""
        program = extract_program(completion)
        if "def f" not in program:
            return False
        return execute_code(
            program, TIMEOUT_SECONDS, tests=conversation["tests"], entry_point="f", level=self.sandbox
        ).success
