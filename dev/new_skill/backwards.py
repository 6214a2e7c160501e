"""A skill of your own, whole: writing a word backwards. See dev/NEW_SKILL.md."""

from typing import Any

from tasks.answers import ASSISTANT_END, Conversation, final_text, keyed_random
from tasks.common import GeneratedTask
from tasks.words import load_words


class Backwards(GeneratedTask):
    """Write a short word backwards, letter by letter: `s e a` -> `a e s`. Train and test use other words."""

    def __init__(self, size: int = 1000, split: str = "train", **kwargs: Any):
        super().__init__(size, split, **kwargs)
        self.words = [word for word in load_words(split) if word.isalpha() and len(word) <= 5]

    def get_example(self, index: int) -> Conversation:
        word = keyed_random("Backwards", self.seed, self.split, index).choice(self.words)
        messages = [
            {"role": "user", "content": f"Write {word} backwards."},
            {"role": "assistant", "content": " ".join(reversed(word))},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return final_text(conversation, completion) == conversation["messages"][-1]["content"]

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The share of letters in their place: partial credit gives a first signal where nothing is right yet."""
        wanted = conversation["messages"][-1]["content"].split()
        given = completion.split(ASSISTANT_END, 1)[0].split()
        return sum(a == b for a, b in zip(wanted, given)) / max(len(wanted), len(given))
