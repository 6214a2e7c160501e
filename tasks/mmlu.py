"""MMLU: multiple-choice questions of 57 subjects (arXiv 2009.03300)."""

from typing import Any

from nanochat.common import UserError
from tasks.answers import Conversation
from tasks.common import load_hub_rows
from tasks.multiple_choice import MultipleChoice, mc_conversation

LETTERS = ("A", "B", "C", "D")
SPLITS = {"all": ("dev", "validation", "test"), "auxiliary_train": ("train",)}


class MMLU(MultipleChoice):
    """cais/mmlu. Subset "all" is for evaluation; "auxiliary_train", split "train", is for training."""

    def __init__(self, subset: str, split: str, *, sample: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if split not in SPLITS.get(subset, ()):
            offered = "; ".join(f"{name} with {', '.join(splits)}" for name, splits in SPLITS.items())
            raise UserError(f"MMLU has {offered}, not {subset!r} with {split!r}")
        self.subset, self.split = subset, split
        rows = load_hub_rows("cais/mmlu", subset, split, sample=sample)
        nested = "train" in rows.table.column_names  # auxiliary_train nests each row once more
        self.rows = rows if nested else rows.require("question", "choices", "answer")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        row = row.get("train") or row
        answer = LETTERS[row["answer"]]
        conversation = mc_conversation(row["question"], LETTERS, row["choices"], answer)
        return {**conversation, "subject": row.get("subject", "")}
