"""HumanEval: Python functions to complete, judged by running tests (arXiv 2107.03374).

Running what a model wrote is left to an `executor`, which must be a sandbox. There is none by
default: without one, evaluation is refused.
"""

import re
from collections.abc import Callable
from typing import Any

from nanochat.common import UserError
from tasks.answers import ASSISTANT_END, Conversation
from tasks.common import Task, load_hub_rows

Executor = Callable[[str], Any]
"""Takes a program; returns True/False or an object with `success`, true only if it ran to its very end."""

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class HumanEval(Task):
    """openai/openai_humaneval, 164 problems, split "test"."""

    def __init__(self, split: str = "test", *, executor: Executor | None = None, sample: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if split != "test":
            raise UserError(f"HumanEval has the split test only, not {split!r}")
        self.split, self.executor = split, executor
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
        """Whether the completed function passes the problem's tests. Raises UserError without an executor."""
        executor = executor or self.executor
        if executor is None:
            raise UserError("HumanEval runs code that a model wrote; it needs a sandbox (pass executor=...)")
        result = executor(test_program(conversation, completion))
        return bool(getattr(result, "success", result))


def test_program(conversation: Conversation, completion: str) -> str:
    """The prompt's imports, the function as completed, the tests, the call that runs them."""
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    code = extract_program(completion)
    if re.search(rf"^(?:async\s+)?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        # The prompt's imports and helper functions stay; what the answer defines again replaces them.
        code = f"{prompt_head(prompt, entry_point)}\n\n{code}"
    else:
        code = prompt + code  # the answer goes on where the prompt stops
    return f"{code}\n\n{conversation['test']}\n\ncheck({entry_point})\n"


test_program.__test__ = False  # type: ignore[attr-defined]  # its name is no reason for pytest to collect it


def prompt_head(prompt: str, entry_point: str) -> str:
    """What stands in the prompt before the function asked for."""
    return re.split(rf"^def {re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0].rstrip()


def extract_program(completion: str) -> str:
    """The first fenced block of code, or all of the text where there is none."""
    text = completion.split(ASSISTANT_END, 1)[0]
    match = FENCE.search(text)
    return match[1] if match else text
