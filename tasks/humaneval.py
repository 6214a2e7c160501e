"""HumanEval: Python functions to complete, checked by running tests (arXiv 2107.03374).

Answers run in the sandbox (`nanochat/execution.py`), the tests in a separate process. Evaluation raises UserError on a
machine without a safe sandbox level.
"""

import re
from typing import Any, ClassVar

from nanochat.conversation import Conversation
from nanochat.execution import execute_code
from tasks.answers import ASSISTANT_END, exchange
from tasks.hub import HubTask

TIMEOUT_SECONDS = 5.0

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class HumanEval(HubTask):
    """openai/openai_humaneval, 164 problems, split "test"."""

    repo = "openai/openai_humaneval"
    splits: ClassVar = {"openai_humaneval": ("test",)}
    columns = ("prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, split: str = "test", *, sandbox: str = "", **kwargs: Any):
        """`sandbox`: the level to run answers at; empty takes the strongest safe one."""
        super().__init__("openai_humaneval", split, **kwargs)
        self.sandbox = sandbox

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        solution = row["prompt"] + row["canonical_solution"]
        return exchange(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completed function passes the problem's tests. Raises UserError if there is no sandbox."""
        program, tests = candidate_program(conversation, completion), tests_program(conversation)
        return passes_tests(program, tests, conversation["entry_point"], TIMEOUT_SECONDS, self.sandbox)

    @staticmethod
    def published_texts(row: dict[str, Any]) -> list[str]:
        return [row["prompt"], row["prompt"] + row["canonical_solution"]]


def passes_tests(program: str, tests: str, entry_point: str, timeout: float, sandbox: str = "") -> bool:
    """Run the tests against a program in the sandbox; `timeout` in seconds."""
    return execute_code(program, timeout, tests=tests, entry_point=entry_point, level=sandbox).success


def candidate_program(conversation: Conversation, completion: str) -> str:
    """The prompt's imports and helpers, and the completed function."""
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    code = extract_program(completion)
    if re.search(rf"^(?:async\s+)?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        # Keep the prompt's imports and helper functions; definitions in the answer override them.
        return f"{prompt_head(prompt, entry_point)}\n\n{code}"
    return prompt + code  # the answer continues the prompt


def tests_program(conversation: Conversation) -> str:
    """The tests and the call that runs them, after the prompt's imports and helpers."""
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    return f"{prompt_head(prompt, entry_point)}\n\n{conversation['test']}\n\ncheck({entry_point})\n"


def prompt_head(prompt: str, entry_point: str) -> str:
    """The part of the prompt before the function to complete."""
    return re.split(rf"^def {re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0].rstrip()


def extract_program(completion: str) -> str:
    """The first fenced code block, or all of the text if there is none."""
    text = completion.split(ASSISTANT_END, 1)[0]
    match = FENCE.search(text)
    return match[1] if match else text
