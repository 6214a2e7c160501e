"""ARC: grade-school science questions, an easy and a challenge set (arXiv 1803.05457)."""

from typing import Any

from nanochat.common import UserError
from tasks.answers import Conversation
from tasks.common import load_hub_rows
from tasks.multiple_choice import MultipleChoice, mc_conversation

SUBSETS = ("ARC-Easy", "ARC-Challenge")
SPLITS = ("train", "validation", "test")


class ARC(MultipleChoice):
    """allenai/ai2_arc, of one subset and split. Three to five choices an item."""

    def __init__(self, subset: str, split: str, *, sample: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if subset not in SUBSETS or split not in SPLITS:
            raise UserError(f"ARC has {', '.join(SUBSETS)} with {', '.join(SPLITS)}, not {subset!r} with {split!r}")
        self.subset, self.split = subset, split
        rows = load_hub_rows("allenai/ai2_arc", subset, split, sample=sample)
        self.rows = rows.require("question", "choices", "answerKey")

    @property
    def name(self) -> str:
        return self.subset

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        # Some items are labelled 1 2 3 4; the answer key uses the same labels.
        return mc_conversation(row["question"], row["choices"]["label"], row["choices"]["text"], row["answerKey"])
