"""MMLU: multiple-choice questions of 57 subjects (arXiv 2009.03300)."""

from typing import Any, ClassVar

from nanochat.conversation import Conversation
from tasks.multiple_choice import MultipleChoice, mc_conversation

LETTERS = ("A", "B", "C", "D")


class MMLU(MultipleChoice):
    """cais/mmlu. Subset "all" is for evaluation; "auxiliary_train", split "train", is for training."""

    repo = "cais/mmlu"
    splits: ClassVar = {"all": ("dev", "validation", "test"), "auxiliary_train": ("train",)}
    columns = ("question", "choices", "answer")

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        conversation = mc_conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
        return {**conversation, "subject": row.get("subject", "")}

    @staticmethod
    def published_texts(row: dict[str, Any]) -> list[str]:
        return [row["question"], f"{row['question']} {row['choices'][row['answer']]}"]
