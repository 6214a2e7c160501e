"""Spelling words out and counting their letters.

Hard for a model that sees tokens, not letters, so the answer's form is chosen for the smallest models:

- Letters are separated by spaces, `a p p l e`: each is one token, the same one wherever it stands
  (but the first).
- The count is left to the calculator, on a string that starts with a space: `" apple".count("p")`.
  With the space the word has the very tokens that it has in the question, so calling the tool is
  copying; without it most words split into other tokens. Double quotes, since the split pattern
  takes `'s` and `'t` for contractions.
"""

from pathlib import Path
from typing import Any

from nanochat.inference.calculator import use_calculator
from tasks.answers import Conversation, final_number, final_text, keyed_random, reference_text
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
    """What both tasks share: words of their split only."""

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
        rng = keyed_random("SimpleSpelling", self.seed, self.split, index)
        question = rng.choice(SPELLING_QUESTIONS).format(word=word)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": spell(word)}]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Every letter, in order, each standing alone; spaces or commas may separate them."""
        said = final_text(conversation, completion).rstrip(".")
        return said.replace(",", " ").split() == reference_text(conversation).split()


class SpellingBee(SpellingTask):
    """`How many r are in strawberry?`: spells the word, counts with the calculator, says the number."""

    def get_example(self, index: int) -> Conversation:
        word = self.words[index]
        rng = keyed_random("SpellingBee", self.seed, self.split, index)
        # Now and then a letter that need not occur, so that "0" is an answer too.
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(COUNTING_QUESTIONS).format(letter=letter, word=word)
        return {"messages": [{"role": "user", "content": question}, counting_answer(word, letter)]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """The number given after the last tool output must be the count."""
        return final_number(final_text(conversation, completion)) == final_number(reference_text(conversation))


def counting_answer(word: str, letter: str) -> Conversation:
    """The assistant's turn: letters, calculator call, its output, the number."""
    call = f'" {word}".count("{letter}")'
    count = use_calculator(call)
    assert count is not None, f"{word!r} and {letter!r} cannot be quoted for the calculator"
    parts = [
        {"type": "text", "text": spell(word) + "\n"},
        {"type": "python", "text": call},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": str(count)},
    ]
    return {"role": "assistant", "content": parts}
