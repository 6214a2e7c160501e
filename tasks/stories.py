"""Stories of five sentences on request, and whether a told story keeps its characters' names."""

import re
from typing import Any

from nanochat.conversation import Conversation
from tasks.answers import exchange, final_text
from tasks.common import Task, check_split

SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.!?][\"')]*\s+(?=[\"'(]?[A-Z])")
NAME = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr)\. )?\b[A-Z][a-z]+\b")
NO_NAME = re.compile(
    r"I|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?|January|February|March|April|May|June|July|August|September|October"
    r"|November|December|Christmas|Easter|English|French|Italian|God|Grandma|Grandpa|Mom|Dad|Mother|Father|Surprise"
)
INTRODUCED = re.compile(
    r"\b(?:named|called(?: it| him| her)?|name (?:is|was)|friends?|brothers?|sisters?|cousins?|neighbors?|mother|father"
    r"|aunt|uncle|girl|boy|dog|cat|and),? $"
)
HE, SHE = re.compile(r"\b(?:he|him|his|himself)\b", re.IGNORECASE), re.compile(r"\b(?:she|her|hers|herself)\b", re.I)
THEY = re.compile(r"\b(?:they|them|their)\b", re.IGNORECASE)
OTHERS = re.compile(  # beings that "he" or "she" may mean
    r"\b(?:m[ae]n|wom[ae]n|boys?|girls?|mother|father|sister|king|queen|prince|princess|aunt|uncle|lady|wizard|witch"
    r"|(?!after|n?ever|over|under|(?:an)?other|her|together|better|later|water|corner|letter|for)\w+(?:er|or|ian|man|ist)"
    r"|nurse|cook|guard|pirate|knight|dog|cat|rabbit|mouse|fox|bear|hedgehog|duck|frog|squirrel"
    r"|owl|turtle|goat|pony|donkey|elephant|penguin|crow|sparrow|mole|lamb|hen|otter|raccoon|pig|goose|parrot|monkey|deer"
    r"|swan|snail|horse|bird|dragon|robot|troll|elf|fairy|kitten|puppy|Mr|Mrs)\b"
)
PROMPTS = (
    "Tell me a five-sentence story about {x}.",
    "Write a five-sentence story about {x}.",
    "Tell me a story about {x} in five sentences.",
    "Write a story of five sentences about {x}.",
    "Can you write a five-sentence story about {x}?",
)
SUBJECTS = (
    ("a dog", "a girl named Mina", "a boy named Oscar", "a cat and a ball", "two friends", "a rabbit named Clover"),
    ("a lost key", "a girl and a kite", "a brave mouse", "a storm", "a bear", "a boy who is afraid of the dark"),
    ("a baker", "a dragon", "a fox named Rusty", "a lonely robot", "a birthday", "a seed", "a snowman", "a picnic"),
    ("a boy named Theo and his sister Lily", "an owl", "a princess", "a letter", "sharing", "a girl who wants to swim"),
    ("a turtle", "a broken cup", "a farmer", "an old man", "a hedgehog", "a wizard", "hide-and-seek", "a long walk"),
    ("a goat", "a girl named Rosa and her dog", "a duck", "a train", "a cook", "a boy and a bird", "a strange noise"),
    (
        "a pony",
        "a squirrel named Hazel",
        "a race",
        "a treasure",
        "a sick friend",
        "a fisherman",
        "a new pet",
        "a dream",
    ),
    ("a frog",),
)


class Stories(Task):
    """Fifty requests for stories of five sentences; right if a story has four to six, keeps its names and has those
    that were asked for."""

    def __init__(self, split: str = "test", **kwargs: Any):
        super().__init__(**kwargs)
        check_split("Stories", split, ("test",))
        subjects = [subject for group in SUBJECTS for subject in group]
        self.prompts = [PROMPTS[i % len(PROMPTS)].format(x=subject) for i, subject in enumerate(subjects)]

    def num_examples(self) -> int:
        return len(self.prompts)

    def get_example(self, index: int) -> Conversation:
        """The reference only shows the form; evaluate() does not compare with it."""
        asked = re.findall(r"named (\w+)", self.prompts[index])
        name = asked[0] if asked else "Nora"
        reference = (
            f"Once there was somebody named {name} who had a small friend named Pip. One day Pip was gone. {name}"
            f" looked everywhere. At last {name} found Pip under the stairs. {name} and Pip went home together."
        )
        return exchange(self.prompts[index], reference)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        text = final_text(conversation, completion)
        asked_for = re.findall(r"named (\w+)", conversation["messages"][0]["content"])
        return 4 <= len(sentences(text)) <= 6 and not name_problem(text) and all(name in text for name in asked_for)


def sentences(text: str) -> list[str]:
    """The sentences of a text; speech that is followed by who said it belongs to one sentence."""
    return [part for part in re.sub(SENTENCE_END, lambda m: m[0] + "\0", " ".join(text.split())).split("\0") if part]


def names(text: str) -> list[tuple[str, str]]:
    """(name, what stands before it in its sentence) of every capitalised word that is a name.

    A word at the start of a sentence counts only if it stands within one, or after "named", somewhere else.
    """
    found = [(m[0], sentence[: m.start()]) for sentence in sentences(text) for m in NAME.finditer(sentence)]
    inside = {name for name, before in found if re.search(r"[a-z,;.] $", before) and not NO_NAME.fullmatch(name)}
    return [(name, before) for name, before in found if name in inside]


def name_problem(text: str) -> str:
    """Why a told story does not keep its characters' names, "" if it does.

    Every name has to be introduced where it comes up first (named X, her friend X, or in the first sentence), and only
    once, and must not meet itself; the first one has to come up again, as a name, "he", "she" or "they", in the last
    three sentences; and a sole character must not change between "he" and "she".
    """
    told, lines = names(text), sentences(text)
    if not told:
        return "no character has a name"
    known: list[str] = []
    for name, before in told:
        again = name in known
        if again and re.search(r"\bnamed $|(?<![\"'] )\bcalled $", before):
            return f"{name} is introduced twice"
        if not again and not INTRODUCED.search(before) and not lines[0].startswith(before + name):
            return f"{name} was not introduced"
        known += [] if again else [name]
    for name in known:
        if re.search(
            rf"\b{re.escape(name)} (?:and|found|met|saw|woke|asked|told|gave|helped) {re.escape(name)}\b", text
        ):
            return f"{name} is two characters"
    ending = " ".join(lines[-3:])
    if known[0] not in ending and not any(pronoun.search(ending) for pronoun in (HE, SHE, THEY)):
        return f"{known[0]} is forgotten"
    if len(known) == 1 and HE.search(text) and SHE.search(text) and len(set(OTHERS.findall(text))) < 2:
        return f"{known[0]} is both he and she"
    return ""
