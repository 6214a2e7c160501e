"""Spelling words and counting their letters.

This is hard for a model that sees tokens rather than letters, so the answer's format suits the smallest models:

- Letters are separated by spaces, `a p p l e`: each is one token, the same one at every position except the first.
- The calculator does the counting, on a string that starts with a space: `" apple".count("p")`. With the space, the
  word has the same tokens as in the question, so the model can copy it; without, most words split into other tokens.
  The quotes are double because the split pattern takes `'s` and `'t` for contractions.
"""

from pathlib import Path
from typing import Any

from nanochat.conversation import Conversation
from tasks.answers import calculator_call, exchange, final_text, has_right_number, reference_text
from tasks.common import GeneratedTask
from tasks.words import WordCycle, load_words

SPELLING_QUESTIONS = (
    "Spell the word: {word}",
    "Spell the word {word}",
    "Spell {word}",
    "spell {word}",
    "How do you spell {word}?",
    "how do you spell {word}",
    "How is {word} spelled?",
    "Can you spell {word}?",
    "Can you spell the word {word}?",
    "Please spell {word}.",
    "Please spell the word {word} for me.",
    "Spell out {word}.",
    "Spell {word} letter by letter.",
    "Write {word} letter by letter.",
    "What are the letters of {word}?",
    "What letters are in the word {word}?",
)

COUNTING_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are in the word {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter} are there in the word {word}?",
    "How many {letter} in {word}?",
    "how many {letter} are in {word}",
    "how many {letter} in {word}",
    "How many {letter}s are in {word}?",
    "How many {letter}s are in the word {word}?",
    "How many {letter}'s are in {word}?",
    "How many {letter}'s are there in the word {word}?",
    "How many times does {letter} appear in {word}?",
    "How many times does {letter} occur in {word}?",
    "How many times is {letter} in {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "How many times does the letter {letter} appear in the word {word}?",
    "How often does {letter} appear in {word}?",
    "How often does the letter {letter} occur in {word}?",
    "How many letters {letter} are in {word}?",
    "how many letters {letter} does {word} have",
    "How many {letter} does {word} have?",
    "How many {letter} does the word {word} contain?",
    "Count the {letter} in {word}.",
    "Count the {letter}s in {word}.",
    "Count the letter {letter} in {word}.",
    "Count the letter {letter} in the word {word}.",
    "count {letter} in {word}",
    "Count how many {letter} are in {word}.",
    "Count how many times {letter} appears in {word}.",
    "Tell me how many {letter} are in {word}.",
    "Can you count the {letter} in {word}?",
    "Can you tell me how many {letter} are in {word}?",
    "Please count the letter {letter} in {word}.",
    "What is the number of {letter} in {word}?",
    "What is the count of {letter} in {word}?",
    "Find the number of {letter} in {word}.",
    'How many "{letter}" are in {word}?',
    "How many '{letter}' are in {word}?",
    'How many "{letter}" are in "{word}"?',
    "In {word}, how many {letter} are there?",
)


def spell(word: str) -> str:
    """`apple` -> `a p p l e`."""
    return " ".join(word)


class SpellingTask(GeneratedTask):
    """A task over the words of its split."""

    def __init__(
        self,
        size: int = 1000,
        split: str = "train",
        *,
        seed: int = 0,
        words_dir: Path | str | None = None,
        **kwargs: Any,
    ):
        super().__init__(size, split, seed=seed, **kwargs)
        self.words = WordCycle(load_words(split, words_dir), seed)


class SimpleSpelling(SpellingTask):
    """`Spell the word: apple` -> `a p p l e`."""

    def get_example(self, index: int) -> Conversation:
        word = self.words[index]
        return exchange(self.rng(index).choice(SPELLING_QUESTIONS).format(word=word), spell(word))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Every letter, in order, separated by spaces or commas."""
        answer = final_text(conversation, completion).rstrip(".")
        return answer.replace(",", " ").split() == reference_text(conversation).split()


class SpellingBee(SpellingTask):
    """`How many r are in strawberry?`: spell the word, count with the calculator, answer with the number."""

    def get_example(self, index: int) -> Conversation:
        word = self.words[index]
        rng = self.rng(index)
        # Sometimes a letter that need not occur, so that "0" is an answer too.
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(COUNTING_QUESTIONS).format(letter=letter, word=word)
        call = calculator_call(f'" {word}".count("{letter}")')
        spelled, count = ({"type": "text", "text": text} for text in (spell(word) + "\n", call[-1]["text"]))
        return exchange(question, [spelled, *call, count])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return has_right_number(conversation, completion)
