"""GSM8K: grade-school word problems whose solutions mark their calculations (arXiv 2110.14168).

A solution reads `She sells 16 - 3 = <<16-3=13>>13 eggs.` line by line and ends in `#### 13`. Each
`<<expression=result>>` becomes a calculator call and its output.
"""

import re
from typing import Any, ClassVar

from nanochat.conversation import Conversation
from tasks.answers import calculator_call, exchange, has_right_marked_number
from tasks.hub import HubTask

CALL = re.compile(r"<<([^<>]*)>>")


class GSM8K(HubTask):
    """openai/gsm8k. Subset "main" or "socratic", split "train" or "test"."""

    repo = "openai/gsm8k"
    splits: ClassVar = dict.fromkeys(("main", "socratic"), ("train", "test"))
    columns = ("question", "answer")

    def __init__(self, subset: str = "main", split: str = "train", **kwargs: Any):
        super().__init__(subset, split, **kwargs)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return exchange(row["question"], solution_parts(row["answer"]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return has_right_marked_number(conversation, completion)

    @staticmethod
    def published_texts(row: dict[str, Any]) -> list[str]:
        return [row["question"], row["answer"]]


def solution_parts(answer: str) -> list[dict[str, str]]:
    """The message parts of a solution, split at its calculator calls."""
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(CALL.split(answer)):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += calculator_call(expression, result)
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
