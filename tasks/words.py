"""Word lists of the spelling tasks: one word per line, most frequent first, train and test disjoint."""

from functools import cache
from pathlib import Path

from nanochat.common import UserError
from tasks.common import check_split, permutation
from tasks.hub import starter_file


@cache
def load_words(split: str, folder: Path | str | None = None) -> tuple[str, ...]:
    """The words of `split` ("train" or "test"), from `folder` or else from the starter data.

    Raises DatasetMissing if the list is missing, UserError if it is empty.
    """
    check_split("word lists", split, ("train", "test"))
    path = starter_file(f"words_{split}.txt", folder)
    words = tuple(path.read_text(encoding="utf-8").split())
    if not words:
        raise UserError(f"{path} holds no words; rebuild it with `python dev/build_starter_data.py`")
    return words


class WordCycle:
    """An endless sequence of words: each pass over the list is a new permutation of it."""

    def __init__(self, words: tuple[str, ...], seed: int):
        self.words = words
        self.seed = seed
        self.orders: dict[int, list[int]] = {}  # pass -> permutation

    def __getitem__(self, index: int) -> str:
        number, place = divmod(index, len(self.words))
        if number not in self.orders:
            self.orders[number] = permutation(len(self.words), (self.seed, number)).tolist()
        return self.words[self.orders[number][place]]
