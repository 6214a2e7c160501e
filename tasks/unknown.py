"""Questions that cannot be answered, and near-misses that can: does the model say so where it does not know?"""

import re
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import Conversation
from tasks.answers import final_text, reference_text
from tasks.common import Task
from tasks.starter import StarterChat

SENTENCES = 2  # in which an answer has to say that it does not know
DECLINES = re.compile(
    r"\b(?:do(?:n't| not) (?:really |actually )?know|(?:can't|cannot|can not) (?:know|tell|see|say|answer|look)"
    r"|no (?:idea|way)|(?:never|not|haven't) heard|not (?:sure|certain|a word that i know|know)|only know what"
    r"|(?:nobody|no one) (?:knows|can know)|have to (?:tell me|wait)|means nothing to me|unable to|wish i knew"
    r"|couldn't (?:say|tell))\b",
    re.IGNORECASE,
)


class Unknown(Task):
    """Held-out questions of one kind: right if those that cannot be answered are declined, and the others are not.

    Whether an answer that is given is true is not checked.
    """

    def __init__(
        self, split: str = "val", *, answerable: bool | None = None, data_dir: Path | str | None = None, **kwargs: Any
    ):
        """`answerable`: only such questions, or only the others; None for both."""
        super().__init__(**kwargs)
        self.answerable = answerable
        both = list(StarterChat(split, "unknown", data_dir=data_dir))
        self.items = [c for c in both if answerable is None or declines(reference_text(c)) != answerable]
        if not self.items:
            raise UserError(f"the starter conversations have no such questions of split {split!r}")

    @property
    def name(self) -> str:
        return {None: "Unknown", True: "Unknown/answerable", False: "Unknown/unanswerable"}[self.answerable]

    def num_examples(self) -> int:
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        return self.items[index]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the answer declines exactly if the reference does. An empty answer is never right."""
        text = final_text(conversation, completion)
        return bool(text) and declines(text) == declines(reference_text(conversation))

    def reward(self, conversation: Conversation, completion: str) -> float:
        """As `evaluate`; of an answer that is given, the share of the reference's words that it has: else anything said
        with confidence would be rewarded."""
        reference = reference_text(conversation)
        if declines(reference) or not self.evaluate(conversation, completion):
            return float(self.evaluate(conversation, completion))
        wanted, said = (
            set(re.findall(r"\w+", text.lower())) for text in (reference, final_text(conversation, completion))
        )
        return len(wanted & said) / len(wanted)


def declines(text: str) -> bool:
    """Whether an answer says in its first sentences that it does not know."""
    return bool(DECLINES.search(" ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:SENTENCES])))
