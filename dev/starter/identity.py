"""The assistant's own words: who and what nanochat is, its limits, and everyday greetings.

They are kept in identity.txt, readable and editable, as blocks of questions and answers.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

from dev.starter.clean import key, stable_hash

TEXT = Path(__file__).with_name("identity.txt")


@dataclass
class Block:
    """Questions (trained on), held-out questions, and the answers that fit any of them."""

    tag: str
    questions: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


@lru_cache
def blocks(path: Path = TEXT) -> dict[str, Block]:
    """Title -> block; the tag is the word in brackets before the title, if any."""
    found = {}
    for chunk in re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip()):
        lines = [line for line in chunk.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        tag, title = re.fullmatch(r"(?:\[(\w+)\] )?(.+)", lines[0]).groups()  # type: ignore[union-attr]
        block = found[title] = Block(tag or "")
        for line in lines[1:]:
            kind, text = line[:3], line[3:].strip()
            {"Q: ": block.questions, "V: ": block.held_out, "A: ": block.answers}[kind].append(text)
    return found


def variants(question: str) -> list[str]:
    """The question as written, in lower case, without its end mark, and both."""
    bare = question.rstrip("?!.")
    return list(dict.fromkeys([question, question.lower(), bare, bare.lower()]))


def held_out() -> list[list[str]]:
    """[question, answer] for validation: one answer for each held-out question."""
    pairs = []
    for block in blocks().values():
        for question in block.held_out:
            pairs.append([question, block.answers[stable_hash(question, "answer") % len(block.answers)]])
    return pairs


def train() -> list[list[str]]:
    """Identity conversations to train on: every question with every answer, typed variants, and longer chats.

    None contains a held-out question (compared by letters and digits alone).
    """
    singles = []
    for block in blocks().values():
        if block.tag == "smalltalk":
            continue
        for question in block.questions:
            for i, typed in enumerate(variants(question)):
                first = stable_hash(question, "first")
                for j in range(len(block.answers) if i == 0 else 1):
                    singles.append([typed, block.answers[(first + i + j) % len(block.answers)]])
    kept_out = {key(question) for question, _ in held_out()}
    return [c for c in singles + chats() if not kept_out & set(map(key, c[::2]))]


def smalltalk() -> list[tuple[str, list[str]]]:
    """Greetings, thanks, goodbyes and the like: ("smalltalk", [question, answer])."""
    return [
        ("smalltalk", [question, answer])
        for block in blocks().values()
        if block.tag == "smalltalk"
        for question, answer in product(block.questions, block.answers)
    ]


CHATS = (
    ("hello", "who are you"),
    ("hello", "name"),
    ("hello", "how are you", "who are you"),
    ("hello", "how are you", "mood", "name"),
    ("how are you", "what are you", "what can you do"),
    ("who are you", "what can you do", "thanks"),
    ("name", "maker", "bye"),
    ("hello", "name", "human", "thanks", "bye"),
    ("who are you", "how it works", "size"),
    ("what are you", "human", "feelings"),
    ("hello", "who are you", "what can you do", "joke"),
    ("name", "name"),
    ("who are you", "other assistants", "limits"),
    ("mood", "who are you"),
    ("joke", "praise", "who are you"),
    ("thanks", "who are you"),
    ("bored", "name"),
    ("hello", "sad", "what can you do"),
    ("what can you do", "languages", "internet"),
    ("who are you", "memory", "licence"),
)
"""Orders of blocks that make a sensible chat."""


def chats(each: int = 24) -> list[list[str]]:
    """Several turns on end: for every order of CHATS, `each` conversations with hash-chosen words."""
    out = []
    for titles in CHATS:
        for i in range(each):
            turns: list[str] = []
            for at, title in enumerate(titles):
                block, pick = blocks()[title], stable_hash(f"{titles}{i}{at}", "chat")
                asked = block.questions[pick % len(block.questions)]
                typed = variants(asked)
                turns += [typed[pick // 1000 % len(typed)], block.answers[pick // 97 % len(block.answers)]]
            out.append(turns)
    return out
