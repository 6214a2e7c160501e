"""Which benchmark items stand in the training text: runs of thirteen words in common (GPT-3, arXiv 2005.14165, C).

A model that has read the question, or worse the answer, is not being tested. Items are compared as words, letters
and digits only, without case.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WORD = re.compile(r"[^\W_]+")
NGRAM = 13  # words
SHORTEST = 8  # words; a shorter item is too common a phrase to be told from chance


@dataclass
class Overlap:
    """What was found of one benchmark."""

    items: int
    too_short: int  # items that cannot be checked
    found: dict[int, str] = field(default_factory=dict)  # item -> beginning of the first document that holds it


def words_of(text: str) -> list[str]:
    """The text as words: letters and digits, lower case."""
    return WORD.findall(text.lower())


class Index:
    """The word runs of all benchmark items, to hold training documents against."""

    def __init__(self, benchmarks: Mapping[str, Sequence[Sequence[str]]]) -> None:
        """`benchmarks`: for each item the texts any of which gives it away, such as its question and its answer.

        Templates that prompts add must not be in them: no document has those.
        """
        self.overlaps = {name: Overlap(len(items), 0) for name, items in benchmarks.items()}
        self.runs: dict[int, list[tuple[str, int]]] = {}  # hash of a run -> the items that hold it
        self.lengths: set[int] = set()
        for name, items in benchmarks.items():
            for number, texts in enumerate(items):
                long_enough = [words for text in texts if len(words := words_of(text)) >= SHORTEST]
                self.overlaps[name].too_short += not long_enough
                for words in long_enough:
                    self._add(words, (name, number))

    def _add(self, words: Sequence[str], owner: tuple[str, int]) -> None:
        length = min(NGRAM, len(words))
        self.lengths.add(length)
        for run in runs_of(words, length):
            owners = self.runs.setdefault(hash(run), [])
            if owner not in owners[-1:]:
                owners.append(owner)

    def check(self, documents: Iterable[str]) -> int:
        """Look through documents; returns how many there were."""
        count = 0
        for text in documents:
            count += 1
            words = words_of(text)
            for length in self.lengths:
                for run in runs_of(words, length):
                    for name, number in self.runs.get(hash(run), ()):
                        self.overlaps[name].found.setdefault(number, " ".join(text.split())[:200])
        return count


def runs_of(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    """All runs of so many neighbouring words."""
    return zip(*(words[i:] for i in range(length)))
