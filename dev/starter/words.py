"""Word lists for spelling and letter counting: common words, train and test disjoint."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from dev.starter.archives import Reader
from dev.starter.clean import RUDE, fraction
from dev.starter.reference import glosses

TEST_FRACTION = 0.1
ENDING = 5  # letters at most after a stem: `-ingly`


def write(out: Path, wordnet: Reader, docs: list[tuple[str, str]]) -> tuple[int, int]:
    """Write words_train.txt and words_test.txt; returns their lengths."""
    counts = Counter[str]()
    for _, text in docs:
        counts.update(re.findall(r"(?<![\w'])[a-z]{3,12}(?![\w'])", text))
    train, test = split(counts, {word for word, _ in glosses(wordnet, least=1)})
    (out / "words_train.txt").write_text("\n".join(train) + "\n", encoding="utf-8")
    (out / "words_test.txt").write_text("\n".join(test) + "\n", encoding="utf-8")
    return len(train), len(test)


def split(counts: Mapping[str, int], dictionary: set[str], least: int = 4) -> tuple[list[str], list[str]]:
    """Words to train on and to test on, of those counted at least `least` times, the most frequent first.

    Tested are words of the dictionary, chosen by their hash alone. Trained on are all others but the forms of tested
    words: words are spelled token by token, so each token that a test needs should be in several of these.
    """
    kept = sorted((w for w in counts if counts[w] >= least and not RUDE.search(w)), key=lambda w: (-counts[w], w))
    test = [w for w in kept if w in dictionary and fraction(w, "word") < TEST_FRACTION]
    stems, tested = {w[:-1] for w in test}, set(test)
    return [w for w in kept if w not in tested and (w in dictionary or not is_form(w, stems))], test


def is_form(word: str, stems: set[str]) -> bool:
    """Whether a word is one of `stems`, words less their last letter, with an ending: `juggling` of `juggl`."""
    return any(word[:end] in stems for end in range(max(2, len(word) - ENDING), len(word) + 1))
