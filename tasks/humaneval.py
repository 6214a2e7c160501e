"""HumanEval: Python functions to complete, judged by running tests (arXiv 2107.03374).

What a model wrote runs in the sandbox (`nanochat/execution.py`), the tests in a process apart from it. Where the
machine has no safe level of it, evaluation is refused.
"""

import re
from collections.abc import Callable
from typing import Any

from nanochat.common import UserError
from nanochat.execution import execute_code
from tasks.answers import ASSISTANT_END, Conversation
from tasks.common import Task, load_hub_rows

Executor = Callable[[str], Any]
"""Another way to run a program, its tests at its end; returns True/False or an object with `success`."""

TIMEOUT_SECONDS = 5.0

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class HumanEval(Task):
    """openai/openai_humaneval, 164 problems, split "test"."""

    def __init__(
        self,
        split: str = "test",
        *,
        executor: Executor | None = None,
        sandbox: str = "",
        sample: bool = False,
        **kwargs: Any,
    ):
        """`sandbox`: the level to run answers at; empty takes the strongest safe one."""
        super().__init__(**kwargs)
        if split != "test":
            raise UserError(f"HumanEval has the split test only, not {split!r}")
        self.split, self.executor, self.sandbox = split, executor, sandbox
        rows = load_hub_rows("openai/openai_humaneval", "openai_humaneval", split, sample=sample)
        self.rows = rows.require("prompt", "canonical_solution", "test", "entry_point")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: Conversation, completion: str, executor: Executor | None = None) -> bool:
        """Whether the completed function passes the problem's tests. Raises UserError where there is no sandbox."""
        program, tests = candidate_program(conversation, completion), tests_program(conversation)
        executor = executor or self.executor
        if executor is None:
            entry_point = conversation["entry_point"]
            return execute_code(
                program, TIMEOUT_SECONDS, tests=tests, entry_point=entry_point, level=self.sandbox
            ).success
        result = executor(f"{program}\n\n{tests}")
        return bool(getattr(result, "success", result))


def candidate_program(conversation: Conversation, completion: str) -> str:
    """The prompt's imports and helpers, and the function as completed."""
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    code = extract_program(completion)
    if re.search(rf"^(?:async\s+)?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        # The prompt's imports and helper functions stay; what the answer defines again replaces them.
        return f"{prompt_head(prompt, entry_point)}\n\n{code}"
    return prompt + code  # the answer goes on where the prompt stops


def tests_program(conversation: Conversation) -> str:
    """The tests and the call that runs them; they may use the prompt's imports and helpers, too."""
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    return f"{prompt_head(prompt, entry_point)}\n\n{conversation['test']}\n\ncheck({entry_point})\n"


def prompt_head(prompt: str, entry_point: str) -> str:
    """What stands in the prompt before the function asked for."""
    return re.split(rf"^def {re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0].rstrip()


def extract_program(completion: str) -> str:
    """The first fenced block of code, or all of the text where there is none."""
    text = completion.split(ASSISTANT_END, 1)[0]
    match = FENCE.search(text)
    return match[1] if match else text
