"""The word lists behind the spelling tasks: one word a line, most frequent first, train and test disjoint."""

from functools import cache
from importlib import resources
from pathlib import Path

from nanochat.common import UserError
from tasks.common import permutation
from tasks.hub import DatasetMissing


def load_words(split: str, folder: Path | str | None = None) -> tuple[str, ...]:
    """The words of `split` ("train" or "test"), from `folder` or else from the starter data.

    Raises DatasetMissing if the list is not there, UserError if it holds no words.
    """
    if split not in ("train", "test"):
        raise UserError(f"word lists have the splits train and test, not {split!r}")
    return read_words(split, None if folder is None else Path(folder))


@cache
def read_words(split: str, folder: Path | None) -> tuple[str, ...]:
    name = f"words_{split}.txt"
    path = resources.files("nanochat").joinpath("starter", name) if folder is None else folder / name
    try:
        words = tuple(path.read_text(encoding="utf-8").split())
    except FileNotFoundError as error:
        raise DatasetMissing(f"{path} is missing; rebuild it with `python dev/build_starter_data.py`") from error
    if not words:
        raise UserError(f"{path} holds no words; rebuild it with `python dev/build_starter_data.py`")
    return words


class WordCycle:
    """Endless draws from a word list without repeats inside a pass; each pass has an order of its own."""

    def __init__(self, words: tuple[str, ...], seed: int):
        self.words = words
        self.seed = seed
        self.orders: dict[int, list[int]] = {}

    def __getitem__(self, index: int) -> str:
        turn, place = divmod(index, len(self.words))
        if turn not in self.orders:
            self.orders[turn] = permutation(len(self.words), (self.seed, turn)).tolist()
        return self.words[self.orders[turn][place]]
