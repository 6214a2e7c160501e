"""Find benchmark items in the training text by shared runs of thirteen words (GPT-3, arXiv 2005.14165, appendix C).

An item that the model was trained on measures memory, not skill. Texts are compared as words of letters and digits,
ignoring case.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WORD = re.compile(r"[^\W_]+")
NGRAM = 13  # words
MIN_WORDS = 8  # shorter texts match by chance


@dataclass
class Overlap:
    """The items of one benchmark that occur in the training text."""

    items: int
    too_short: int  # items that cannot be checked
    found: dict[int, str] = field(default_factory=dict)  # item -> beginning of the first document that contains it

    def table_row(self, name: str) -> dict[str, str | int | float]:
        """A row of the report's table."""
        return {
            "benchmark": name,
            "items": self.items,
            "too short to check": self.too_short,
            "found in training text": len(self.found),
            "share": len(self.found) / max(1, self.items - self.too_short),
        }


def words_of(text: str) -> list[str]:
    """The text as words: letters and digits, lower case."""
    return WORD.findall(text.lower())


class Index:
    """Hash index of the word runs of all benchmark items."""

    def __init__(self, benchmarks: Mapping[str, Sequence[Sequence[str]]]) -> None:
        """`benchmarks`: for each item the texts any of which identifies it, such as its question and its answer.

        Without the templates that prompts add: training documents do not contain those.
        """
        self.overlaps = {name: Overlap(len(items), 0) for name, items in benchmarks.items()}
        self.runs: dict[int, list[tuple[str, int]]] = {}  # hash of a run -> (benchmark, item) that contain it
        self.lengths: set[int] = set()
        for name, items in benchmarks.items():
            for number, texts in enumerate(items):
                long_enough = [words for text in texts if len(words := words_of(text)) >= MIN_WORDS]
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
        """Record in `overlaps` the items that occur in the documents; returns the number of documents."""
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
    """All runs of `length` consecutive words."""
    return zip(*(words[i:] for i in range(length)))
