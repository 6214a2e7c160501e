"""A complete example task: writing a word backwards. See dev/NEW_SKILL.md."""

from typing import Any

from nanochat.conversation import Conversation
from tasks.answers import ASSISTANT_END, exchange, final_text
from tasks.common import GeneratedTask
from tasks.words import load_words


class Backwards(GeneratedTask):
    """Write a short word backwards, letter by letter: `s e a` -> `a e s`. Train and test use different words."""

    def __init__(self, size: int = 1000, split: str = "train", **kwargs: Any):
        super().__init__(size, split, **kwargs)
        self.words = [word for word in load_words(split) if word.isalpha() and len(word) <= 5]

    def get_example(self, index: int) -> Conversation:
        word = self.rng(index).choice(self.words)
        return exchange(f"Write {word} backwards.", " ".join(reversed(word)))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return final_text(conversation, completion) == conversation["messages"][-1]["content"]

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The share of letters in the right place: partial credit gives a gradient before any answer is right."""
        expected = conversation["messages"][-1]["content"].split()
        given = completion.split(ASSISTANT_END, 1)[0].split()
        return sum(a == b for a, b in zip(expected, given)) / max(len(expected), len(given))
