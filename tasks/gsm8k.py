"""GSM8K: grade-school word problems whose solutions mark their calculations (arXiv 2110.14168).

A solution reads `She sells 16 - 3 = <<16-3=13>>13 eggs.` line by line and ends in `#### 13`. Each
`<<expression=result>>` becomes a calculator call and its output.
"""

import re
from typing import Any

from nanochat.common import UserError
from nanochat.inference.calculator import use_calculator
from tasks.answers import Conversation, final_text, number_after_marker, reference_text
from tasks.common import Task, load_hub_rows

CALL = re.compile(r"<<([^<>]*)>>")
SPLITS = ("train", "test")


class GSM8K(Task):
    """openai/gsm8k. Subset "main" (or "socratic"), split "train" or "test"."""

    def __init__(self, subset: str = "main", split: str = "train", *, sample: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if subset not in ("main", "socratic") or split not in SPLITS:
            raise UserError(f"GSM8K has main and socratic with {', '.join(SPLITS)}, not {subset!r} with {split!r}")
        self.subset, self.split = subset, split
        self.rows = load_hub_rows("openai/gsm8k", subset, split, sample=sample).require("question", "answer")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": solution_parts(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The number after the completion's last `####` must be the reference's; without one it is wrong."""
        reference = number_after_marker(reference_text(conversation))
        assert reference is not None, "a GSM8K solution ends in #### and a number"
        return number_after_marker(final_text(conversation, completion)) == reference


def solution_parts(answer: str) -> list[dict[str, str]]:
    """The solution's text cut at its calculator calls.

    The output shown is what the calculator will show at inference, where it understands the
    expression (`4` for a `4.00` in the data), so that training and use look the same.
    """
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(CALL.split(answer)):
        if i % 2:
            expression, _, result = piece.rpartition("=")
            value = use_calculator(expression)
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result if value is None else str(value)})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
