"""Questions and short answers templated over the real text, and the writing of the finetuning files."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dev.starter import identity, prose, reading
from dev.starter.archives import Reader
from dev.starter.clean import RUDE, fraction, key, sentences, stable_hash, start_sentence
from dev.starter.reference import as_method, capital_of, countries, field, glosses, recipe_list, with_article
from dev.starter.stories import Story, stories
from dev.starter.stories.requests import request
from dev.starter.synthetic import Answer
from dev.starter.talk import chatterbot
from dev.starter.writer import VAL_FRACTION, write_conversations

Pair = tuple[str, str]
CAPS = {"geography": 2000, "words": 4500, "topics": 6000, "recipes": 800, "explain": 1500, "help": 800}
STORIES = {"short": 1800, "five": 1800, "read": 2200}  # stories told, told in five sentences, and asked about
"""Conversations at most, by kind of question, so that none swamps the others."""

WHAT_IS = (
    "What is {x}?",
    "What is {x}?",
    "Tell me about {x}.",
    "What do you know about {x}?",
    "Explain {x}.",
    "Can you tell me about {x}?",
    "what is {x}",
    "Do you know what {x} is?",
)
WHO_WAS = (
    "Who was {x}?",
    "Who was {x}?",
    "Tell me about {x}.",
    "Who was {x}",
    "Do you know who {x} was?",
    "What do you know about {x}?",
    "Can you tell me who {x} was?",
)
WHO_IS = tuple(t.replace(" was", " is") for t in WHO_WAS)
MEANING = (
    "What does {x} mean?",
    'What does "{x}" mean?',
    "What does the word {x} mean?",
    "Define {x}.",
    "what does {x} mean",
    "What is the meaning of {x}?",
    "Explain the word {x}.",
)
THING = (
    "What is {a} {x}?",
    "What is {a} {x}?",
    "What's {a} {x}?",
    "What does {x} mean?",
    "what is {a} {x}",
    "Can you tell me what {a} {x} is?",
)
MAKE = (
    "How do I make {x}?",
    "How can I cook {x}?",
    "Give me a recipe for {x}.",
    "How do you make {x}?",
    "I want to make {x}. What do I need?",
    "how to make {x}",
)
CAPITAL = (
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "Which city is the capital of {x}?",
    "capital of {x}",
    "Tell me the capital of {x}.",
    "Do you know the capital of {x}?",
)


def choose(templates: tuple[str, ...], x: str, **more: str) -> str:
    """One of the templates, picked by the words it is about."""
    return templates[stable_hash(x, "template") % len(templates)].format(x=x, **more)


def geography(readers: dict[str, Reader]) -> Iterator[Pair]:
    """Capitals (both ways, in three wordings), neighbours and location of every country."""
    for name, record in countries(readers["factbook"]).items():
        place = with_article(name)
        capital = capital_of(record)
        if capital and "none" not in capital.lower():
            start = stable_hash(name) % len(CAPITAL)
            for i in range(3):
                yield CAPITAL[(start + i) % len(CAPITAL)].format(x=place), f"The capital of {place} is {capital}."
            if capital != name:
                yield f"{capital} is the capital of which country?", f"{capital} is the capital of {place}."
        borders = re.sub(r" [\d,.]+ km", "", field(record, "Geography", "Land boundaries", "border countries"))
        parts = re.split(r";|  and ", re.sub(r"\([^)]*\)", "", borders))
        near = list(dict.fromkeys(p.strip() for p in parts if p.strip()))
        if 1 < len(near) < 8 and all(re.fullmatch(r"[^\d:]{2,40}", b) for b in near):
            question = choose(("Which countries border {x}?", "What are the neighbours of {x}?"), place)
            yield question, f"{start_sentence(place)} borders {', '.join(near[:-1])} and {near[-1]}."
        where = re.split(r"[;]", field(record, "Geography", "Location"))[0]
        if 10 < len(where) < 200 and ":" not in where and not re.search(r"\d", where):
            yield f"Where is {place}?", f"{start_sentence(place)} is in {where}."


def words(readers: dict[str, Reader], countable: set[str]) -> Iterator[Pair]:
    """Meanings of frequent words with few senses, since the first sense listed need not be the usual one."""
    for word, meanings in glosses(readers["wordnet"], least=25):
        gloss = meanings[0]
        if len(word) < 4 or len(gloss) > 130 or len(meanings) > 2:
            continue
        article = "an" if word[0] in "aeiou" else "a"
        if re.match(r"an? ", gloss) and word in countable:
            yield choose(THING, word, a=article), f"{article.capitalize()} {word} is {gloss}."
        else:
            yield choose(MEANING, word), f'"{word.capitalize()}" means {gloss}.'


def brief(text: str, limit: int = 45) -> str:
    """The first sentence, and the second if both stay under `limit` words; "" if the first is too long."""
    parts = sentences(text)
    if not parts or len(parts[0].split()) > limit:
        return ""
    both = " ".join(parts[:2])
    return both if len(both.split()) <= limit else parts[0]


DIVINE = re.compile(
    r"\b(?:is|was) (?:an?|the) [^.]{0,40}\b(?:god|goddess|deity|king|queen|emperor|pharaoh|prophet|patriarch|apostle"
    r"|saint|disciple|hero)\b"
)
"""Gods and figures of legend are asked for with "who", like people."""


def subject(title: str, answer: str, topic: str, vocabulary: set[str]) -> str:
    """A title as it stands in a sentence: an article where the answer has one, small letters for common nouns."""
    first, _, rest = title.partition(" ")
    proper = topic in ("People", "Geography", "History") or rest != rest.lower() or first[1:] != first[1:].lower()
    name = title if proper or first.lower() not in vocabulary else title[0].lower() + title[1:]
    article = re.match(r"(An?|The) ", answer)
    return f"{article[1].lower()} {name}" if article and not re.match("(An?|The) ", name) else name


def lower_case_words(leads: dict[str, str]) -> set[str]:
    """Words that the leads have in small letters in mid-sentence."""
    return {word for lead in leads.values() for word in re.findall(r"(?<=[a-z,] )[a-z]{3,}", lead)}


def explained(answers: list[Answer], leads: dict[str, str], kinds: dict[str, str]) -> Iterator[Pair]:
    """Model-written explanations, asked for by title."""
    vocabulary = lower_case_words(leads)
    for title, text in generated(answers, "explain", 60):
        if kinds.get(title) == "People":
            yield choose(("Tell me about {x}.", "What do you know about {x}?"), title), text
        else:
            yield choose(WHAT_IS[2:6], subject(title, leads.get(title, text), kinds.get(title, ""), vocabulary)), text


def topics(leads: dict[str, str], kinds: dict[str, str]) -> Iterator[Pair]:
    """What is X, who was X, tell me about X: the first sentence or two of the lead. `kinds`: title -> topic."""
    vocabulary = lower_case_words(leads)
    for title, lead in leads.items():
        answer, name = brief(lead), re.sub(r"\s*\([^)]*\)$", "", title)
        if not answer or re.search(r"[\[\]/]|\(.*\(.*\(|^List|\d{4}s?$", title + answer) or RUDE.search(title + answer):
            continue
        opening = sentences(answer)[0]
        stem = re.escape(name.split()[0].rstrip("s"))
        if not re.match(rf"(?:(?:An?|The|Sir|Pope|Saint|King|Queen) )?{stem}", opening, re.IGNORECASE):
            continue
        person = kinds.get(title) == "People" and not opening.startswith(("The ", "A ", "An "))
        if person or DIVINE.search(opening):
            yield choose(WHO_WAS if re.search(r"\bwas\b", opening) else WHO_IS, name), answer
        else:
            yield choose(WHAT_IS, subject(name, answer, kinds.get(title, ""), vocabulary)), answer


def cooking(readers: dict[str, Reader]) -> Iterator[Pair]:
    """Short recipes: what you need, then the steps."""
    for title, ingredients, steps in recipe_list(readers["recipes"]):
        things = [re.sub(r"\s*\([^)]*\)", "", i).rstrip(".") for i in ingredients]
        answer = f"You need {', '.join(things[:-1])} and {things[-1]}. {as_method(steps)}"
        if len(answer.split()) <= 90 and "(" not in title:
            yield choose(MAKE, title.lower() if title.isascii() else title), answer


def trivia(readers: dict[str, Reader]) -> Iterator[Pair]:
    """Question and answer pairs of general knowledge and computer trouble."""
    for question, answer in chatterbot(readers["chatterbot"], "trivia", "tech_support"):
        if question.endswith(("?", ".")) and not question.startswith("["):
            yield question, answer if answer[-1] in ".!?" else answer + "."


def generated(answers: list[Answer], kind: str, limit: int) -> Iterator[Pair]:
    """Model-written answers of one kind, of at most `limit` words."""
    for answer in answers:
        if answer.kind == kind and len(answer.text.split()) <= limit:
            yield answer.question, answer.text


EVERYDAY = Path(__file__).with_name("everyday.txt")


def everyday(held_out: set[str]) -> Iterator[Pair]:
    """Everyday questions, as written and as typed in a hurry, with the project's own answers.

    None whose key is in `held_out`, or would be if it came with the others.
    """
    for block in identity.blocks(EVERYDAY).values():
        for question in block.questions:
            if key(question) not in held_out and fraction(key(question), "split") >= VAL_FRACTION:
                yield from ((typed, block.answers[0]) for typed in identity.variants(question))


def conversations(
    readers: dict[str, Reader], leads: dict[str, str], answers: list[Answer], countable: set[str]
) -> Iterator[tuple[str, list[str]]]:
    """All but the everyday ones, each kind capped by question hash, as ("qa", [question, answer])."""
    topic_of = prose.topics(readers["wikipedia"])
    kinds: dict[str, Any] = {
        "geography": geography(readers),
        "words": words(readers, countable),
        "topics": topics(leads, topic_of),
        "recipes": cooking(readers),
        "trivia": trivia(readers),
        "explain": explained(answers, leads, topic_of),
        "help": generated(answers, "help", 70),
    }
    for kind, pairs in kinds.items():
        ordered = sorted(set(pairs), key=lambda pair: (stable_hash("\n".join(pair), "cap"), pair))
        for question, answer in ordered[: CAPS.get(kind)]:
            yield "qa", [question, answer]


def for_beginners(story: Story) -> bool:
    """True for stories of one name, and for one in four of those of two: a tiny model mixes them up."""
    named = [entity for entity in story.cast.values() if entity.known and entity.name]
    return len(named) == 1 or stable_hash(story.text, "names") % 4 == 0


def told() -> Iterator[tuple[str, list[str]]]:
    """Generated stories that were asked for, and questions about others."""
    short = (story for story in stories(2 * STORIES["short"], seed=1) if len(story.text.split()) <= 110)
    yield from (("stories", request(story, five=False)) for story in islice(short, STORIES["short"]))
    five = (story for story in stories(3 * STORIES["five"], seed=2, five=True) if for_beginners(story))
    yield from (("stories", request(story, five=True)) for story in islice(five, STORIES["five"]))
    yield from (("reading", turns) for turns in reading.stories(stories(STORIES["read"], seed=3, five=True)))


def split_key(source: str, turns: list[str]) -> str:
    """What decides the side of the split: the question, or for chats the whole opening."""
    return key(" ".join(turns) if source == "smalltalk" and len(turns) > 2 else turns[0])


def write(
    out: Path, split: list[tuple[str, list[str]]], train: list[tuple[str, list[str]]], val: list[tuple[str, list[str]]]
) -> Counter[str]:
    """Write sft_train.parquet and sft_val.parquet; returns conversations by source.

    Those of `split` go to one side by a hash of the question, those of `train` and `val` are split already.
    """
    tidy = ((source, [re.sub(r" {2,}", " ", turn) for turn in turns]) for source, turns in split)
    unique = {(source, tuple(map(key, turns))): (source, turns) for source, turns in tidy}
    kept_out = {key(turns[0]) for _, turns in val}
    sides: tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]] = ([], [])
    for source, turns in unique.values():
        if not kept_out & set(map(key, turns[::2])):
            sides[fraction(split_key(source, turns), "split") < VAL_FRACTION].append((source, turns))
    write_conversations(out / "sft_train.parquet", sides[0] + train)
    write_conversations(out / "sft_val.parquet", sides[1] + val)
    return Counter(source for source, _ in [*sides[0], *sides[1], *train, *val])
