"""The fixed validation set, nanochat/starter/val.parquet, and the check that nothing trained on repeats it.

It was drawn once, by `draw`, from the corpus of November 2026 and from texts written for it (dev/starter/validation).
It stays as it is whatever the training text becomes, so that bits per byte compare across tokenizers and versions of
the corpus: the build reads it, writes one only where there is none, and a test holds its hash.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from dev.starter.clean import deduplicate, is_clean, key, normalise, stable_hash
from dev.starter.synthetic import Answer
from dev.starter.talk import Conversation, as_text

OVERLAP_WORDS = 13
"""A training text with so many words in a row of the validation set is left out, as is usual for benchmarks."""
SIZES = {"wikipedia": 0.42, "chitchat": 0.42, "help": 0.08}
"""MB drawn of each source, by document hash. The texts written for the set are taken whole."""
OWN = {"own_stories": "stories.txt", "own_answers": "answers.txt", "own_talks": "talks.txt"}


def load(path: Path) -> list[tuple[str, str]]:
    """The (source, text) of the set, in its order."""
    return [(row["source"], row["text"]) for row in pq.read_table(path, columns=["source", "text"]).to_pylist()]


def content_hash(docs: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of all documents and their order, whatever wrote the file."""
    digest = hashlib.sha256()
    for source, text in docs:
        digest.update(f"{source}\0{text}\0\0".encode())
    return digest.hexdigest()


def runs_of_words(text: str) -> Iterator[str]:
    """Every OVERLAP_WORDS words in a row, without punctuation and case; of a shorter text all its words."""
    words = key(text).split()
    for at in range(max(1, len(words) - OVERLAP_WORDS + 1)):
        yield " ".join(words[at : at + OVERLAP_WORDS])


class HeldOut:
    """Tells whether a text repeats a part of the held-out documents."""

    def __init__(self, docs: Iterable[tuple[str, str]]) -> None:
        self.runs = {run for _, text in docs for run in runs_of_words(text)}

    def overlaps(self, text: str) -> bool:
        """True if the text has OVERLAP_WORDS words in a row that a held-out document has too."""
        return any(run in self.runs for run in runs_of_words(text))


LAUGHS = re.compile(r"\b(?:(?:ha|he){2,}h?|lol|lmao|omg|xd|laugh out loud)\b", re.I)


def plain(talk: str, known: set[str]) -> bool:
    """True for talk with few slips of the keys and little laughing, whose turns mostly begin with a capital."""
    words, turns = key(talk).split(), talk.split("\n")
    slips = sum(word not in known for word in words)
    capitals = sum(turn[0].isupper() for turn in turns)
    return slips <= len(words) / 60 and len(LAUGHS.findall(talk)) <= len(words) / 60 and capitals > 0.6 * len(turns)


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, in small letters."""
    counts = Counter[str]()
    for text in texts:
        counts.update(key(text).split())
    return counts


def draw(leads: dict[str, str], conversations: list[Conversation], answers: list[Answer]) -> list[tuple[str, str]]:
    """The (source, text) of a new set: encyclopaedia leads, talk, everyday answers, and the texts written for it."""
    folder = Path(__file__).with_name("validation")
    own = [
        (source, normalise(text))
        for source, name in OWN.items()
        for text in (folder / name).read_text(encoding="utf-8").split("\n\n")
    ]
    pool = [("wikipedia", lead) for lead in leads.values() if len(lead) < 1500]
    talks = [as_text(c) for c in conversations if c.rating >= 5]
    known = {word for word, count in word_counts(map(as_text, conversations)).items() if count >= 40}
    known |= word_counts([*leads.values(), *(a.text for a in answers)]).keys()
    pool += [("chitchat", text) for text in talks if 200 < len(text) < 2500 and plain(text, known)]
    pool += [("help", f"{a.question}\n{a.text}") for a in answers if a.kind == "help" and 120 < len(a.text) < 600]
    left = {source: megabytes * 1e6 for source, megabytes in SIZES.items()}
    drawn = []
    pool = [(source, normalise(text)) for source, text in pool]
    for source, text in sorted(deduplicate(pool), key=lambda d: (stable_hash(d[1], "validation"), d)):
        if is_clean(text) and left[source] > 0:
            left[source] -= len(text.encode())
            drawn.append((source, text))
    return own + drawn
