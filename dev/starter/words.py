"""Word lists for spelling and letter counting: common dictionary words, train and test disjoint."""

import re
from collections import Counter
from pathlib import Path

from dev.starter.archives import Reader
from dev.starter.clean import RUDE, fraction
from dev.starter.reference import glosses

TEST_FRACTION = 0.1


def write(out: Path, wordnet: Reader, docs: list[tuple[str, str]], least: int = 4) -> tuple[int, int]:
    """Write words_train.txt and words_test.txt; returns their lengths.

    Kept: lemmas of 3-12 letters a-z that the corpus has at least `least` times in lower case. The most
    frequent come first. A word goes to the test by its hash alone.
    """
    counts = Counter[str]()
    for _, text in docs:
        counts.update(re.findall(r"(?<![\w'])[a-z]{3,12}(?![\w'])", text))
    lemmas = {word for word, _ in glosses(wordnet, least=1)}
    kept = [w for w in lemmas if counts[w] >= least and re.fullmatch("[a-z]{3,12}", w) and not RUDE.search(w)]
    kept.sort(key=lambda w: (-counts[w], w))
    test = [w for w in kept if fraction(w, "word") < TEST_FRACTION]
    train = [w for w in kept if fraction(w, "word") >= TEST_FRACTION]
    (out / "words_train.txt").write_text("\n".join(train) + "\n", encoding="utf-8")
    (out / "words_test.txt").write_text("\n".join(test) + "\n", encoding="utf-8")
    return len(train), len(test)
