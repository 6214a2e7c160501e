"""Tells a story: expands the scenes of a plot, and decides between names, pronouns, "a kite" and "the kite"."""

import random
import re

from dev.starter.stories.cast import IT, Casting, Entity
from dev.starter.stories.plots import alternatives, pieces, plots

KINDS = {"child": 45, "animal": 30, "adult": 13, "fantasy": 12}  # of heroes, and how often
HEROES = {  # the kinds of heroes of a plot, where not all are fit for it
    **dict.fromkeys(("earn", "hurt", "found", "swap"), "child adult"),
    **dict.fromkeys(("stage", "fishing", "late"), "child adult fantasy"),
    **dict.fromkeys(("broke", "pet"), "child"),
    "stuck": "child animal",
    "quarrel": "child animal fantasy",
}
SLOT = re.compile(r"([abcwotfp])(?:\.(\w+))?\+?")
FORMS = {"": 0, "o": 1, "s": 2, "r": 3}  # of pronouns
OBJECT = re.compile(  # what stands before an object
    r"\b(?:at|to|for|with|about|by|of|from|beside|behind|toward|met|saw|see|found|woke|followed|asked|told|gave|give|lent"
    r"|hugged|visit|visited|visiting|brought|wrote|let|helped|teach|missed|love|loved|join|thank|thanked|between"
    r"|held|threw|carried|put|bought|painted|took|around) $"
)
INVERTED = re.compile(r'" \w+ $')  # "..." said Mina
PRONOUNS_IN_A_ROW = 3  # then the name comes again


class Story:
    """One story: the state that the scenes read and change, and afterwards its `text`."""

    def __init__(self, rng: random.Random, plot: str = "") -> None:
        self.rng = rng
        self.kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        fitting = [name for name in plots() if name and self.kind in HEROES.get(name, self.kind)]
        self.plot = plot or rng.choice(fitting)
        if self.kind not in HEROES.get(self.plot, self.kind):
            self.kind = HEROES[self.plot].split()[0]
        self.season = rng.choice(("spring", "summer", "autumn", "winter"))
        self.casting = Casting(rng)
        self.cast = self.casting.draw(self.kind, self.plot)
        self.values: dict[str, str] = {}  # of {$name=...}
        self.scenes: list[str] = []  # told so far
        self.spent: set[str] = set()  # their texts: none is told twice
        self.parts: list[str] = []  # the story so far, by scene
        self.now: list[Entity] = []  # mentioned in the sentence that is being told
        self.last: list[Entity] = []  # and in the one before
        self.row = 0  # pronouns in a row
        self.broken_off = False  # a scene that has to be there could not be told

    def run(self, five: bool = False) -> "Story":
        """Tell all scenes of the plot, or those of a story of five sentences."""
        plot = plots()[self.plot]
        for scene in plot.five if five else plot.order:
            if not (scene.endswith("?") and self.rng.random() < 0.5):
                told = self.tell(scene.rstrip("?"))
                self.broken_off |= not told and not scene.endswith("?")
        self.text = tidy(" ".join(self.parts))
        return self

    def characters(self) -> list[tuple[str, str]]:
        """(name or noun, pronoun) of all that came up but the place, for the check."""
        known = [entity for slot, entity in self.cast.items() if entity.known and slot != "p"]
        return [(entity.again().removeprefix("the "), entity.pronouns[0]) for entity in known]

    def questions(self) -> list[tuple[str, str]]:
        """What can be asked about the story, with the answers."""
        asked = [q for q in plots()[self.plot].questions if q[0] in self.scenes]
        return [(tidy(self.aside(question)), tidy(self.aside(answer))) for _, question, answer in asked]

    # -- scenes

    def can_tell(self, conditions: list[str], text: str) -> bool:
        """Whether a version of a scene fits: its conditions hold, and its characters are there or come with it."""
        brought = {condition[1] for condition in conditions if condition[0] == "+"}
        for slot in "bcw":
            wanted = re.search(rf"\{{{slot}[.}}+]", text) or slot in conditions or slot in brought
            if wanted and self.cast[slot].known == (slot in brought):
                return False
        return all(self.holds(condition) for condition in conditions if ":" in condition)

    def holds(self, condition: str) -> bool:
        """`p:town`, `s:winter`, `$kind:bake`, `arc:lost`; with a ! in front the opposite."""
        slot, _, tag = condition.removeprefix("!").partition(":")
        if slot.startswith("$"):
            found = self.values.get(slot[1:]) == tag
        else:
            found = tag == {"s": self.season, "arc": self.plot}.get(slot) or tag in getattr(
                self.cast.get(slot), "tags", ()
            )
        return found != condition.startswith("!")

    def tell(self, scene: str) -> bool:
        """Tell one scene; False if no version of it fits."""
        versions = plots()[self.plot].versions.get(scene) or plots()[""].versions[scene]
        fitting = [text for conditions, text in versions if text not in self.spent and self.can_tell(conditions, text)]
        if not fitting:
            return False
        text = self.rng.choice(fitting)
        self.spent.add(text)
        self.scenes.append(scene)
        self.parts.append("")
        self.end_sentence()
        self.expand(text)
        return True

    def aside(self, text: str) -> str:
        """A text about the story, outside of it: with names and definite nouns only."""
        self.parts.append("")
        for piece, braced in pieces(text):
            slot = SLOT.fullmatch(piece) if braced else None
            if slot:
                entity = self.cast[slot[1]]
                self.parts[-1] += entity.described() if slot[2] == "a2" else entity.again()
            else:
                self.parts[-1] += self.values[piece[1:].rstrip("+")] if braced else piece
        return self.parts.pop()

    # -- words

    def expand(self, text: str) -> None:
        """Tell a text with its {choices} and {slots}."""
        for piece, braced in pieces(text):
            if braced:
                self.group(piece)
            else:
                self.parts[-1] += piece
                if re.search(r"[.!?][\"']?\s", piece):
                    self.end_sentence()

    def group(self, inner: str) -> None:
        """Tell what stands between braces."""
        if slot := SLOT.fullmatch(inner):
            words = self.refer(slot[1], slot[2] or "")
            opens = not self.parts[-1] or re.search(r"[.!?]\" $", self.parts[-1])
            self.parts[-1] += words[0].upper() + words[1:] if opens else words
        elif silent := re.fullmatch(r"\$(\w+)=~(.*)", inner):
            name, value = silent.groups()
            self.values[name] = self.cast[value].again() if value in self.cast else self.aside(value)
        elif named := re.fullmatch(r"\$(\w+)=(.*)", inner):
            before = len(self.parts[-1])
            self.expand(self.rng.choice(alternatives(named[2])))
            self.values[named[1]] = self.parts[-1][before:]
        elif inner in ("home", "den", "hall"):
            self.parts[-1] += self.casting.pick(f"{inner}s")[0]
        elif inner == "season":
            self.parts[-1] += self.season
        else:
            self.expand(self.rng.choice(alternatives(inner)))

    def end_sentence(self) -> None:
        self.last, self.now = self.now, []

    def refer(self, slot: str, form: str) -> str:
        """The words for an entity where they stand now: an introduction, a name, a noun or a pronoun."""
        entity = self.cast[slot]
        if slot == "p":
            return {"in": entity.where(), "to": f"to the {entity.noun}"}.get(form, f"the {entity.noun}")
        if form == "n":
            return entity.noun
        if form == "adj":
            return entity.adjective
        if self.parts[-1].count('"') % 2:  # within quoted speech
            return entity.again()
        owner = self.refer("a", "s") if form == "a" or (entity.relation and not entity.known) else ""
        if form == "a":
            words = f"{owner} {'' if entity.known else entity.adjective} {entity.noun}"
        elif not entity.known:
            words = entity.first(owner) + ("'s" if form == "s" else "")
        else:
            form = "o" if not form and OBJECT.search(self.parts[-1]) else form
            if form != "m" and not INVERTED.search(self.parts[-1]) and self.may_use_pronoun(entity, form):
                words = entity.pronouns[FORMS[form]]
            else:
                words = entity.again() + ("'s" if form == "s" else "")
        entity.known = True
        if entity not in self.now:
            self.now.append(entity)
        return words

    def may_use_pronoun(self, entity: Entity, form: str) -> bool:
        """Whether a pronoun can only mean this entity here, and is not one too many."""
        if form == "r" or (form == "s" and self.now[:1] == [entity]):  # the subject's own
            return True
        around = self.now + self.last
        if entity not in around or any(e.pronouns is entity.pronouns and e is not entity for e in around):
            return False
        if entity in self.now:
            return True
        self.row = (self.row + 1) % (PRONOUNS_IN_A_ROW + 1)
        return self.row > 0 and self.rng.random() < (0.5 if entity.pronouns is IT else 0.75)


def tidy(text: str) -> str:
    """Capitals at the start of sentences, the right article, single spaces, no doubled marks."""
    text = re.sub(r"\s+([,.!?])", r"\1", re.sub(r" {2,}", " ", text))
    text = re.sub(r"\b([Aa]) (?=[aeio]|u(?!ni|s[eu])|hour|honest)", r"\1n ", text)
    text = re.sub(r"(^|[.!?] )([\"']?[a-z])", lambda m: m[1] + m[2].upper(), text)
    return re.sub(r"([.!?])\.", r"\1", text).strip()
