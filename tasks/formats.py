"""Doing exactly what is asked for: short instructions about form, with credit for each part that is met."""

from typing import Any

from tasks.answers import ASSISTANT_END, Conversation, keyed_random
from tasks.common import GeneratedTask
from tasks.words import load_words

COMMON_WORDS = 800  # words are taken from the most frequent of the list, which small models know


class Format(GeneratedTask):
    """Repeat a word so many times, write it in capitals, put words in a list. Train and test use other words."""

    def __init__(self, size: int = 1000, split: str = "train", **kwargs: Any):
        super().__init__(size, split, **kwargs)
        self.words = [word for word in load_words(split)[:COMMON_WORDS] if word.isalpha()]

    def get_example(self, index: int) -> Conversation:
        rng = keyed_random("Format", self.seed, self.split, index)
        kind = rng.choice(("repeat", "capitals", "list"))
        if kind == "repeat":
            word, times = rng.choice(self.words), rng.randint(2, 5)
            question = f"Write the word {word} {times} times, with commas between."
            lines = [", ".join([word] * times)]
        elif kind == "capitals":
            word = rng.choice(self.words)
            question, lines = f"Write the word {word} in capital letters.", [word.upper()]
        else:
            lines = rng.sample(self.words, rng.randint(2, 4))
            question = f"Write these words as a list, one on each line: {', '.join(lines)}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "\n".join(lines)}]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.reward(conversation, completion) == 1

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The share of the wanted words, commas and line ends that stand in their place; 1 only for all and no more."""
        wanted = pieces(conversation["messages"][-1]["content"])
        given = pieces(completion.split(ASSISTANT_END, 1)[0].strip())
        met = sum(a == b for a, b in zip(wanted, given))
        return met / max(len(wanted), len(given))


def pieces(text: str) -> list[str]:
    """Words, commas and line ends."""
    return text.replace(",", " , ").replace("\n", " \n ").split(" ") if text else []
