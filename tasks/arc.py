"""ARC: grade-school science questions, an easy and a challenge set (arXiv 1803.05457)."""

from typing import Any, ClassVar

from nanochat.conversation import Conversation
from tasks.multiple_choice import MultipleChoice, mc_conversation


class ARC(MultipleChoice):
    """allenai/ai2_arc, one subset and split. Items have three to five choices."""

    repo = "allenai/ai2_arc"
    splits: ClassVar = dict.fromkeys(("ARC-Easy", "ARC-Challenge"), ("train", "validation", "test"))
    columns = ("question", "choices", "answerKey")

    @property
    def name(self) -> str:
        return self.subset

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        # Some items are labelled 1 2 3 4; the answer key uses the same labels.
        return mc_conversation(row["question"], row["choices"]["label"], row["choices"]["text"], row["answerKey"])

    @staticmethod
    def published_texts(row: dict[str, Any]) -> list[str]:
        choices = dict(zip(row["choices"]["label"], row["choices"]["text"]))
        return [row["question"], f"{row['question']} {choices.get(row['answerKey'], '')}"]
