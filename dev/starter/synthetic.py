"""Cleaning of model-written stories, explanations and answers (dev/starter/synthetic holds them as sampled)."""

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dev.starter.clean import RUDE, cut_to_sentence, is_clean, key, normalise, repetitive

TELLTALE = re.compile(
    r"\b(?:as an ai|language model|i'm sorry|i cannot|i can't|\w+-year-old|th(?:e|is) (?:text|passage|information)"
    r"|overview|in (?:a|two|three|short|simple) (?:short )?(?:sentences?|words|terms)"
    r"|great (?:summary|question|explanation)"
    r"|i'd (?:add|say)|here(?:'s| is| are)|sure[,!]|certainly[,!]|in th(?:is|e) (?:story|context)|to summarize"
    r"|the story (?:ends|is about|tells)|rewrite|let me|my name is|summary|title:|once you understand|imagine you"
    r"|in short|in a very short|i can tell"
    r"|in conclusion|the answer is|a simple (?:sentence|answer)|little one|glad you|hello|rest is history"
    r"|you're (?:talking|asking)|i think|i would)\b",
    re.I,
)
"""Traces of the prompt, and the model talking about its answer instead of giving it."""
STOP = """
what when where which whose about tell please short story write with that this have does make should would could there
their they them then from into explain simple words paragraph give some your child asked good best ways kind little
very who how why and the for you are can did was one two three way something someone
"""
COMMON = frozenset(STOP.split())
"""Words that say nothing about the topic of a question."""


@dataclass(frozen=True)
class Answer:
    """A cleaned sample: kind is story, explain or help."""

    kind: str
    question: str
    text: str


def content_words(text: str) -> set[str]:
    """Words of four letters and more that carry meaning, cut to a crude stem."""
    return {w[:5] for w in key(text).split() if len(w) > 3 and w not in COMMON}


def grounded(title: str, source: str, answer: str) -> bool:
    """True if an explanation keeps to its text: its names and numbers, and most of its words, stand there."""
    known = key(source)
    names = re.findall(r"(?<=[a-z,;] )[A-Z][\w-]+|\b\d[\d,.]*\d\b|\b\d\b", answer)
    words = content_words(answer)
    own = content_words(title) or set(key(title).split())
    covered = len(words & content_words(source)) / max(1, len(words))
    return covered > 0.6 and all(key(n) in known for n in names) and bool(own & (words | set(key(answer).split())))


def acceptable(record: dict, text: str) -> bool:
    """The rules for one cut answer; see the folder's README for what they remove."""
    words = len(text.split())
    least = {"story": 50, "explain": 10, "help": 8}[record["kind"]]
    odd = re.search(r"[^\x20-\x7e\n\u00c0-\u024f–—…]|[*#_|]|\d{5,}|\n- |\d\)|^\d\.|\w-$|\b(\w+) \1 \1\b", text)
    if words < least or odd or TELLTALE.search(text) or RUDE.search(text) or repetitive(text) or not is_clean(text):
        return False
    if not (text[0] == '"' or text[0].isupper()) or text.count('"') % 2:
        return False
    if record["kind"] == "explain":
        opening = content_words(text[:60]) | set(key(text[:60]).split())
        if not opening & (content_words(record["question"]) | set(key(record["question"]).split())):
            return False
        return grounded(record["question"], record["instruction"].split("\n\nNow tell")[0], text)
    topic = content_words(record["question"])
    return not topic or bool(topic & content_words(text))


def load(folder: Path) -> list[Answer]:
    """Every acceptable answer of the *.jsonl.gz files in `folder`, in file order."""
    answers = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
            record = json.loads(line)
            text = normalise(record["answer"])
            if not record["finished"] or text[-1:] not in '.!?"':
                text = cut_to_sentence(text)
            text = re.sub(r"\s*\n\s*", " " if record["kind"] == "explain" else "\n\n", text)
            if text and acceptable(record, text):
                answers.append(Answer(record["kind"], normalise(record["question"]), text))
    return answers
