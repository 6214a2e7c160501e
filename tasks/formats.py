"""Following short instructions about form exactly, with credit for each part that is met."""

from typing import Any

from nanochat.conversation import Conversation
from tasks.answers import ASSISTANT_END, exchange
from tasks.common import GeneratedTask
from tasks.words import load_words

COMMON_WORDS = 800  # use only the most frequent words, which small models know


class Format(GeneratedTask):
    """Repeat a word n times, write it in capitals, or write words as a list. Train and test use different words."""

    def __init__(self, size: int = 1000, split: str = "train", **kwargs: Any):
        super().__init__(size, split, **kwargs)
        self.words = [word for word in load_words(split)[:COMMON_WORDS] if word.isalpha()]

    def get_example(self, index: int) -> Conversation:
        rng = self.rng(index)
        kind = rng.choice(("repeat", "capitals", "list"))
        if kind == "repeat":
            word, times = rng.choice(self.words), rng.randint(2, 5)
            question = f"Write the word {word} {times} times, with commas between."
            return exchange(question, ", ".join([word] * times))
        if kind == "capitals":
            word = rng.choice(self.words)
            return exchange(f"Write the word {word} in capital letters.", word.upper())
        words = rng.sample(self.words, rng.randint(2, 4))
        return exchange(f"Write these words as a list, one on each line: {', '.join(words)}", "\n".join(words))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.reward(conversation, completion) == 1

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The share of expected words, commas and line breaks in the right place; 1 only without any extra."""
        expected = split_form(conversation["messages"][-1]["content"])
        given = split_form(completion.split(ASSISTANT_END, 1)[0].strip())
        return sum(a == b for a, b in zip(expected, given)) / max(len(expected), len(given))


def split_form(text: str) -> list[str]:
    """Words, commas and line breaks."""
    return text.replace(",", " , ").replace("\n", " \n ").split(" ") if text else []
