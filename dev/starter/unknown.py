"""Questions that nobody could answer from here, declined, and questions of the same shapes that can be answered.

unknown.txt holds them, with slots for names. Of held-out questions both the wordings and the made-up names are kept
out of training; the countries, people and words asked about in them are known from training in other wordings.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dev.starter.archives import Reader
from dev.starter.clean import fraction, stable_hash, start_sentence
from dev.starter.identity import variants
from dev.starter.qa import brief
from dev.starter.reference import capital_of, countries, field as fact, glosses, with_article
from dev.starter.stories.cast import lexicon
from dev.starter.stories.plots import alternatives, pieces

TEXT = Path(__file__).with_name("unknown.txt")
TRAIN = {"unknown": 3000, "known": 3400}
HELD_OUT = 120
"""Questions of each kind. A wording that has used up its names is asked less often."""
TRAINED_ONLY = ("object", "spot")
"""Lists of unknown.txt that no held-out question uses."""


@dataclass
class Block:
    """Wordings for training and held-out ones, and the answers that go with any of them."""

    kind: str  # unknown or known
    questions: dict[bool, list[str]] = field(default_factory=lambda: {False: [], True: []})  # by held out
    answers: list[str] = field(default_factory=list)


@cache
def contents() -> tuple[dict[str, list[str]], list[Block]]:
    """The lists and the blocks of unknown.txt."""
    lists, blocks = {}, list[Block]()
    for line in TEXT.read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            name, _, entries = line[2:].partition(": ")
            lists[name] = [entry.strip() for entry in entries.split(",")]
        elif title := re.match(r"\[(\w+)\]", line):
            blocks.append(Block(title[1]))
        elif line.startswith(("Q: ", "V: ")):
            blocks[-1].questions[line[0] == "V"].append(line[3:])
        elif line.startswith("A: "):
            blocks[-1].answers.append(line[3:])
    return lists, blocks


def invented(rng: random.Random, held_out: bool, ending: bool = True) -> str:
    """A word that does not exist; those of the held-out questions are others than those of training."""
    lists, _ = contents()
    while True:
        parts = ["onset", "vowel"] * rng.choice((2, 3, 3)) + ["ending"] * ending
        word = "".join(rng.choice(lists[part]) for part in parts)
        if (fraction(word, "invented") < 0.3) == held_out:
            return word


class Facts:
    """What the answerable questions are about: countries, people and words of the sources."""

    def __init__(self, readers: dict[str, Reader], leads: dict[str, str], topics: dict[str, str]) -> None:
        self.countries = []
        for name, record in countries(readers["factbook"]).items():
            capital = capital_of(record)
            people = re.match(r"[\d,]+\b", fact(record, "People and Society", "Population", "total"))
            spoken = re.match(
                r"[A-Z][a-z]+(?= \(official|$| \d|,)", fact(record, "People and Society", "Languages", "Languages")
            )
            if capital and people and spoken and 3 < len(name) < 20 and name != "Dominican":
                values = (with_article(name), capital, people[0], spoken[0])
                self.countries.append(dict(zip(("country", "capital", "population", "language"), values)))
        people = [title for title, topic in topics.items() if topic == "People" and title in leads]
        first = [(title, brief(leads[title], 30)) for title in sorted(people, key=stable_hash)]
        self.people = [pair for pair in first if pair[1].startswith(pair[0]) and " was " in pair[1][:40]][:300]
        self.words = [(word, meanings[0]) for word, meanings in glosses(readers["wordnet"], least=400)[:3000]]
        self.words = [pair for pair in self.words if len(pair[0]) > 4 and len(pair[1]) < 60]


def slots(rng: random.Random, facts: Facts, held_out: bool) -> dict[str, str]:
    """A value for every slot of unknown.txt."""
    lists, _ = contents()
    # Another draw would change all held-out questions after it.
    drawn = {name: entries for name, entries in lists.items() if not (held_out and name in TRAINED_ONLY)}
    values = {name: rng.choice(entries) for name, entries in drawn.items()} | rng.choice(facts.countries)
    for this in ("day", "month"):
        values[f"next{this}"] = lists[this][(lists[this].index(values[this]) + 1) % len(lists[this])]
    values |= {"word": invented(rng, held_out), "thing": invented(rng, held_out), "number": str(rng.randint(5, 90))}
    values["place"] = invented(rng, held_out, rng.random() < 0.5).capitalize()
    values["person"] = " ".join(invented(rng, held_out, ending).capitalize() for ending in (False, True))
    for slot, key in (("name", rng.choice(("girls", "boys"))), ("petname", "pets")):
        values[slot] = rng.choice([name for name, _ in lexicon()[key] if (fraction(name, "told") < 0.2) == held_out])
    values["real_person"], values["about_person"] = rng.choice(facts.people)
    values["real_word"], values["gloss"] = rng.choice(facts.words)
    return values


def filled(text: str, values: dict[str, str], rng: random.Random) -> str:
    """A text with its {choices} made and its {slots} filled."""

    def piece(inner: str) -> str:
        return values[inner] if inner in values else filled(rng.choice(alternatives(inner)), values, rng)

    return "".join(piece(inner) if braced else inner for inner, braced in pieces(text))


def ask(block: Block, held_out: bool, rng: random.Random, draw: Callable[[], dict[str, str]]) -> list[str]:
    """[question, answer] from one of the block's wordings."""
    values = draw()
    question, _, own = rng.choice(block.questions[held_out]).partition("| ")
    values["made"] = values["thing" if "{thing}" in question else "word"]
    answer = own.strip() or rng.choice(block.answers)
    asked = filled(question, values, rng)
    if not held_out and rng.random() < 0.3:
        asked = rng.choice(variants(asked))
    answer = filled(answer, values, rng).strip()
    return [asked, start_sentence(answer)]


def pairs(facts: Facts, held_out: bool, sizes: dict[str, int] = TRAIN, seed: int = 22) -> list[list[str]]:
    """[question, answer] of both kinds, none twice; `sizes` of each kind, HELD_OUT if held out.

    In training a question comes again with another answer: most of those without a name in them, such as "What time
    is it?", would otherwise be there once, and many times behind a sentence that answers them.
    """
    rng = random.Random(f"{seed} {held_out}")
    found: dict[str, list[str]] = {}
    for kind, size in sizes.items():
        usable = [block for block in contents()[1] if block.kind == kind and block.questions[held_out]]
        kept: dict[str, list[str]] = {}
        for number in range(8 * size):
            pair = ask(usable[number % len(usable)], held_out, rng, lambda: slots(rng, facts, held_out))
            kept.setdefault(pair[0].lower() if held_out else "\n".join(pair).lower(), pair)
            if len(kept) == (HELD_OUT if held_out else size):
                break
        found |= kept
    return list(found.values())
