"""Who and what takes part in a story, drawn from lexicon.txt."""

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEXICON = Path(__file__).with_name("lexicon.txt")
HE, SHE, IT = ("he", "him", "his", "himself"), ("she", "her", "her", "herself"), ("it", "it", "its", "itself")
NOUNS = {"animal": "animals", "adult": "adults", "fantasy": "fantasy"}  # kind of character -> list of the lexicon
# "": brother or sister
RELATIONS = {
    "child": ("friend", "friend", "", "cousin", "neighbor"),
    "adult": ("friend", "neighbor", ""),
}
THINGS = {"broke": frozenset({"breaks"}), "stuck": frozenset({"toy", "light"})}  # tags of what a plot is about
AT = re.compile(
    r"\b(?:beach|river|lake|harbor|market|library|school|bakery|station|hospital|office|theater|museum|mill)$"
)
ON = re.compile(r"\b(?:hill|farm|playground|bridge|square)$")
VOWEL_SOUND = re.compile(r"(?i)[aeio]|u(?!ni|s[eu])|hour|honest")


@dataclass
class Entity:
    """Somebody or something in a story."""

    noun: str
    pronouns: tuple[str, str, str, str] = IT  # subject, object, possessive, reflexive
    name: str = ""
    adjective: str = ""
    relation: str = ""  # to the hero: "brother"
    tags: frozenset[str] = frozenset()
    known: bool = False  # it has come up in the story

    def described(self) -> str:
        """ "a red kite"."""
        words = f"{self.adjective} {self.noun}".strip()
        return f"{'an' if VOWEL_SOUND.match(words) else 'a'} {words}"

    def first(self, owner: str = "") -> str:
        """How it is mentioned for the first time. `owner`: "her", for those with a relation to the hero."""
        if self.relation and owner:
            return f"{owner} {self.relation} {self.name}"
        return f"{self.described()} named {self.name}" if self.name else self.described()

    def again(self) -> str:
        """Its name, or "the kite"; "the honey" for a jar of honey."""
        return self.name or f"the {self.noun.rpartition(' of ')[2]}"

    def where(self) -> str:
        """Of a place: "in the park", "at the beach"."""
        return f"{'at' if AT.search(self.noun) else 'on' if ON.search(self.noun) else 'in'} the {self.noun}"


@cache
def lexicon() -> dict[str, list[tuple[str, frozenset[str]]]]:
    """List of words by name, each word with its tags."""
    lists = {}
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, entries = line.partition(": ")
            found = (re.fullmatch(r"([^(]+?)(?: \(([^)]*)\))?", entry.strip()) for entry in entries.split(", "))
            lists[name] = [(match[1], frozenset((match[2] or "").split())) for match in found if match]
    return lists


class Casting:
    """Draws the cast of one story; no two of its names begin with the same letter."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.letters: set[str] = set()

    def pick(self, name: str) -> tuple[str, frozenset[str]]:
        """An entry of a list of the lexicon."""
        return self.rng.choice(lexicon()[name])

    def name(self, kind: str, girl: bool, formal: bool = False) -> str:
        """A new name: Mina, Biscuit, or if `formal` Mrs. Novak."""
        names = "surnames" if formal else "pets" if kind == "animal" else "girls" if girl else "boys"
        found = self.pick(names)[0]
        while found[0] in self.letters:
            found = self.pick(names)[0]
        self.letters.add(found[0])
        return f"{'Mrs.' if girl else 'Mr.'} {found}" if formal else found

    def character(self, kind: str, other: Entity | None = None) -> Entity:
        """Somebody of a kind; of the other sex than `other` as a rule, so that pronouns tell them apart."""
        girl = self.rng.random() < 0.5
        if other and self.rng.random() < 0.8:
            girl = other.pronouns is HE
        noun, tags = self.pick(NOUNS[kind]) if kind in NOUNS else ("girl" if girl else "boy", frozenset[str]())
        girl = (girl or "she" in tags) and "he" not in tags
        name = self.name(kind, girl, formal=kind == "adult" and self.rng.random() < 0.6)
        adjective = self.pick("child traits" if kind == "fantasy" else f"{kind} traits")[0]
        return Entity(noun, SHE if girl else HE, name, adjective, tags=tags | {kind})

    def companion(self, hero: Entity, kind: str, strangers: bool) -> Entity:
        """The second character: a friend, brother or sister, or another animal."""
        other = self.character(kind if self.rng.random() < 0.8 else "animal", hero)
        if other.noun == hero.noun and kind != "child":
            other = self.character("child", hero)
        if not strangers and kind in RELATIONS and kind in other.tags and self.rng.random() < 0.7:
            other.relation = self.rng.choice(RELATIONS[kind]) or ("sister" if other.pronouns is SHE else "brother")
        elif not strangers and self.rng.random() < 0.3:
            other.relation = "friend"
        if other.relation:
            other.tags |= {"rel"}
        return other

    def helper(self, hero: Entity, kind: str) -> Entity:
        """Somebody who comes by: a grown-up, or in stories of animals and wonders another animal."""
        if kind in ("animal", "fantasy") and self.rng.random() < 0.7:
            animal = self.character("animal", hero)
            return Entity(
                animal.noun, animal.pronouns, adjective=self.rng.choice(("old", "wise old", "friendly", "big"))
            )
        noun, tags = self.pick("helpers")
        girl = "she" in tags or ("he" not in tags and self.rng.random() < 0.5)
        named = " " not in noun and self.rng.random() < 0.4
        return Entity(noun, SHE if girl else HE, self.name("adult", girl, formal=True) if named else "")

    def thing(self, wanted: frozenset[str]) -> Entity:
        """What the story is about, with one of the tags if any are wanted; a color or another quality that suits it."""
        fitting = [entry for entry in lexicon()["things"] if not wanted or entry[1] & wanted]
        noun, tags = self.rng.choice(fitting)
        colored = tags & {"toy", "cloth", "breaks", "box", "ride"} and self.rng.random() < 0.7
        adjective = self.pick("colors" if colored else "qualities")[0]
        large, little = adjective in ("big", "heavy"), adjective in ("tiny", "small", "little")
        plain = " " in noun or tags & {"tool"} or (large and "small" in tags) or (little and "big" in tags)
        return Entity(noun, adjective="" if plain else adjective, tags=tags)

    def draw(self, kind: str, plot: str) -> dict[str, Entity]:
        """All that may come up, by slot (see scenes.txt); what does come up is up to the scenes."""
        hero = self.character(kind)
        companion = self.companion(hero, kind, strangers=plot == "friend")
        helper = self.helper(hero, kind)
        taken = {hero.noun, companion.noun, helper.noun}
        visitor = Entity(self.rng.choice([noun for noun, _ in lexicon()["visitors"] if noun not in taken]))
        visitor.adjective = self.rng.choice(("", "", "fat", "curious", "hungry", "big"))
        thing = self.thing(THINGS.get(plot, frozenset()))
        tool = Entity(self.rng.choice([noun for noun, _ in lexicon()["tools"] if not noun.endswith(thing.noun)]))
        outside = self.rng.random() < 0.7
        place, tags = self.pick("outdoor places" if outside else "indoor places")
        here = Entity(place, tags=tags | {"out" if outside else "in"}, known=True)
        food = Entity(self.pick("foods")[0])
        return dict(zip("abcwotfp", (hero, companion, helper, visitor, thing, tool, food, here)))
