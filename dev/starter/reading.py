"""Questions about a text that is given: a generated story, or an encyclopaedia lead."""

import re
from collections.abc import Iterable, Iterator

from dev.starter.clean import sentences, stable_hash, start_sentence
from dev.starter.stories import Story, stories as generate

ASK = ("{text}\n\n{question}", "Read this text: {text}\n\n{question}", "{question}\n\n{text}", "{text} {question}")
EVENTS = (
    "founded|established|born|built|completed|released|published|discovered|elected|invented|created|opened|launched"
)
PLACES = "city|town|village|river|mountain|island|lake|country|region|province|state|university|museum|building|bridge"
NATION = r"[A-Z][a-z]+(?:ese|ish|ian|an|ch|eek|ss|i)"
NOT_SAID = {  # asked about a story that does not say it
    "What was the name of {name}'s {relative}?": ("aunt", "teacher", "doctor"),
    "How much did {name} {measure}?": ("weigh", "sleep that night"),
    "What color were {name}'s {part}?": ("eyes", "socks"),
    "In which year {rest}?": ("did this happen", "was {name} born"),
}
NO_ANSWER = ("The text does not say.", "That is not said in the story.", "I don't know. The text does not say it.")


def ask(text: str, question: str, answer: str) -> list[str]:
    """[text and question, answer]."""
    form = ASK[stable_hash(text + question, "ask") % len(ASK)]
    return [form.format(text=text, question=question), answer]


def about_story(story: Story) -> list[tuple[str, str]]:
    """Questions on who, what and where of a story, and what its plot lets one ask."""
    hero, companion, thing = (story.cast[slot] for slot in "abo")
    found = story.questions()
    found += [
        (
            f"What kind of {'animal' if 'animal' in hero.tags else 'person'} was {hero.name}?",
            f"{hero.name} was {hero.described()}.",
        )
    ]
    if hero.noun in ("girl", "boy"):
        found[-1] = (f"Was {hero.name} a girl or a boy?", f"{hero.name} was a {hero.noun}.")
    if companion.relation and companion.known:
        found += [(f"Who was {companion.name}?", f"{companion.name} was {hero.name}'s {companion.relation}.")]
        found += [(f"What was the name of {hero.name}'s {companion.relation}?", f"{companion.name}.")]
    if thing.known and thing.adjective in (
        "red",
        "blue",
        "green",
        "yellow",
        "purple",
        "brown",
        "white",
        "black",
        "gray",
        "pink",
    ):
        found += [(f"What color was the {thing.noun}?", f"The {thing.noun} was {thing.adjective}.")]
    return found


def not_said(story: Story) -> tuple[str, str]:
    """A question that the story does not answer."""
    pick = stable_hash(story.text, "not said")
    form, rest = list(NOT_SAID.items())[pick % len(NOT_SAID)]
    question = re.sub(r"\{(?!name)\w+\}", rest[pick // 7 % len(rest)], form).format(name=story.cast["a"].name)
    return question, NO_ANSWER[pick // 50 % len(NO_ANSWER)]


def stories(told: Iterable[Story]) -> Iterator[list[str]]:
    """One question about each story; one in eight has no answer in it."""
    for story in told:
        pick, questions = stable_hash(story.text, "reading"), about_story(story)
        yield ask(story.text, *(not_said(story) if pick % 8 == 0 else questions[pick // 8 % len(questions)]))


def documents(count: int, read: int) -> Iterator[str]:
    """Generated stories to pretrain on; the last `read` of them with their questions and answers."""
    for number, story in enumerate(generate(count, seed=0)):
        asked = about_story(story) if number >= count - read else []
        yield "\n".join([story.text, *(f"{question} {answer}" for question, answer in asked)])


def leads(titles: dict[str, str], limit: int = 90) -> Iterator[list[str]]:
    """Questions about leads of at most `limit` words, where a rule finds one: when, capital of what, where, and who."""
    for title, lead in titles.items():
        name = re.sub(r"\s*\([^)]*\)$", "", title)
        first = sentences(lead)[0]
        found = []
        if not first.startswith(name) or len(lead.split()) > limit:
            continue
        if event := re.search(rf"\b(was|were) ({EVENTS}) in (?:[A-Z][a-z]+ )?(\d{{4}})\b", first):
            found += [(f"When {event[1]} {name} {event[2]}?", f"{name} {event[1]} {event[2]} in {event[3]}.")]
        if city := re.match(
            rf"{re.escape(name)} is the capital(?: and [a-z ]*city)? of ([A-Z][\w ]+?)(?:[.,]| and )", first
        ):
            found += [(f"What is {name} the capital of?", f"{name} is the capital of {city[1]}.")]
        if person := re.match(
            rf"{re.escape(name)} (is|was) (an? ({NATION}) ([a-z -]+?))(?:,| and | who | from |\.| best | known )", first
        ):
            found += [(f"What {person[1]} {name}?", f"{name} {person[1]} {person[2]}.")]
            found += [(f"Which nationality did {name} have?", f"{name} {person[1]} {person[3]}.")]
        if place := re.match(
            rf"{re.escape(name)} (is|was) (?:an?|the) (?:[a-z-]+ )*(?:{PLACES}) in ((?:the )?[A-Z][\w ]+?)[.,]", first
        ):
            found += [(f"Where {place[1]} {name}?", f"{name} {place[1]} in {place[2]}.")]
        if found:
            question, answer = found[stable_hash(lead, "lead") % len(found)]
            yield ask(lead, question, start_sentence(answer))
