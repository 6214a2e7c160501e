"""Generated stories and their check, questions about them, and questions that cannot be answered."""

import random
import re

import pytest

from dev.starter import clean, identity, qa, reading, unknown
from dev.starter.stories import Story, stories
from dev.starter.stories.check import problem
from dev.starter.stories.plots import alternatives, pieces, plots
from dev.starter.stories.requests import request
from nanochat.common import UserError
from tasks.stories import Stories, name_problem, sentences
from tasks.unknown import Unknown, declines

GOOD = 'Once there was a girl named Mina. She had a red kite. One day the kite was gone. "Oh no," said Mina. She cried.'
CAST = [("Mina", "she"), ("kite", "it"), ("Leo", "he"), ("Ada", "she")]


@pytest.mark.parametrize("plot", [name for name in plots() if name])
def test_every_plot_tells_stories_and_answers_its_questions(plot: str) -> None:
    told = [Story(random.Random(f"{plot} {i}"), plot).run() for i in range(12)]
    assert sum(not story.broken_off for story in told) >= 11 and len({story.text for story in told}) == 12
    for story in told:
        assert not re.search(r"[{}|$~]", story.text)
        for question, answer in story.questions():
            assert question.endswith("?") and not re.search(r"[{}|$~]", question + answer), (question, answer)


def test_every_scene_of_a_plot_exists() -> None:
    common = plots()[""].versions
    for name, plot in plots().items():
        scenes = {scene.rstrip("?") for scene in [*plot.order, *plot.five, *(after for after, _, _ in plot.questions)]}
        assert scenes <= plot.versions.keys() | common.keys(), name
        assert not name or (plot.themes and len(plot.five) in (5, 4))


def test_stories_are_the_same_for_the_same_seed() -> None:
    first, again, other = ([story.text for story in stories(20, seed)] for seed in (4, 4, 5))
    assert first == again and not set(first) & set(other)
    five = [story.text for story in stories(20, 4, five=True)]
    assert all(len(sentences(text)) == 5 for text in five)


def test_names_and_things_come_up_before_they_are_used() -> None:
    """Another way to see it than the check's: the first mention of each name, and of "the" of the main thing."""
    for story in stories(150, 9):
        for slot in "ab":
            entity = story.cast[slot]
            if entity.known:
                before = story.text[: story.text.index(entity.name)]
                assert re.search(rf"(?:named|{entity.relation or 'named'}) $", before), story.text
        thing = story.cast["o"]
        if thing.known and f"the {thing.noun}" in story.text:
            assert re.search(rf"\b(?:an?|his|her|'s)(?: \w+)? {thing.noun}\b", story.text), story.text


def test_nothing_is_spoiled_at_a_picnic_that_was_not_brought() -> None:
    told = [story.text for story in stories(150, 9, five=True) if story.plot == "picnic"]
    for text in told:
        brought, _, after = text.partition("unpacked ")[2].partition(".")
        assert all(food in brought for food in ("cake", "lemonade") if food in after), text
        assert not ("rain came" in after and ("guests" in after or "merrier" in after)), text
    assert len(told) > 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, ""),
        (GOOD.replace("girl named Mina", "girl named Ada"), "Mina comes up unannounced"),
        (GOOD.replace("She had a red kite. ", ""), "kite comes up unannounced"),
        (GOOD.replace("She cried", "He cried"), "He means nobody"),
        (GOOD.replace("She had a", "Her friend Ada came. She had a"), "She means"),
        (GOOD + ' "Where', "quote"),
        (GOOD + " it was late.", ""),  # not a sentence of its own for the splitter
        (GOOD.replace("a red", "a orange"), "mark"),
    ],
)
def test_the_check_finds_what_is_wrong(text: str, expected: str) -> None:
    found = problem(text, CAST)
    assert expected in found if expected else not found, found


def test_braces_and_alternatives() -> None:
    assert pieces("a {b|{c}} d") == [("a ", False), ("b|{c}", True), (" d", False)]
    assert alternatives("a|{b|c}|") == ["a", "{b|c}", ""]


def test_requests_name_what_the_story_has() -> None:
    for story in stories(60, 3, five=True):
        asked, told = request(story, five=True)
        assert told == story.text and re.search("five[- ]sentence|five sentences", asked), asked
        for name in re.findall(r"named (\w+)", asked):
            assert name in told


def test_answers_about_a_story_are_found_in_it() -> None:
    for story in stories(60, 11):
        for _, answer in reading.about_story(story):
            names = re.findall(r"\b[A-Z][a-z]+\b", answer[1:])
            assert all(name in story.text for name in names), (answer, story.text)
    asked = list(reading.stories(stories(60, 12)))
    assert sum("not" in answer for _, answer in asked) < 20
    assert all("?" in question for question, _ in asked)


def test_questions_about_leads() -> None:
    lead = "Oslo is the capital and most populous city of Norway. It has a harbor."
    (question, answer), *none = reading.leads({"Oslo": lead, "Rain": "Rain is water that falls."})
    assert not none and "What is Oslo the capital of?" in question and lead in question
    assert answer == "Oslo is the capital of Norway."


def test_everyday_questions_have_one_answer_and_none_is_held_out() -> None:
    everything, kept_out = list(qa.everyday(set())), {clean.key("Why is there wind?")}
    blocks = identity.blocks(qa.EVERYDAY).values()
    assert len(blocks) > 150 and all(len(block.answers) == 1 and block.questions for block in blocks)
    assert len({clean.key(q) for block in blocks for q in block.questions}) == sum(len(b.questions) for b in blocks)
    assert len(list(qa.everyday(kept_out))) == len(everything) - 4
    assert not any(declines(answer) or len(answer.split()) > 70 for _, answer in everything)


class FakeFacts(unknown.Facts):
    def __init__(self) -> None:
        self.countries = [{"country": "Norway", "capital": "Oslo", "population": "5,000,000", "language": "Norwegian"}]
        self.people = [("Ada Lovelace", "Ada Lovelace was a mathematician.")]
        self.words = [("harbor", "a place for ships")]


def test_unknown_questions_are_held_out_by_wording_and_by_name() -> None:
    sizes = {"unknown": 250, "known": 150}
    train, held_out = (unknown.pairs(FakeFacts(), side, sizes) for side in (False, True))
    assert train == unknown.pairs(FakeFacts(), False, sizes) and len(train) == 400
    declined = [declines(answer) for _, answer in train]
    assert 0.4 < sum(declined) / len(declined) < 0.7 and 150 < len(held_out) <= 240
    invented = [{unknown.invented(random.Random(i), side) for i in range(500)} for side in (False, True)]
    assert not invented[0] & invented[1] and min(map(len, invented)) > 400
    texts = {question.lower().rstrip("?!.") for question, _ in train}
    assert not {question.lower().rstrip("?!.") for question, _ in held_out} & texts
    for block in unknown.contents()[1]:
        assert not set(block.questions[True]) & set(block.questions[False])
        if block.kind == "unknown":
            assert all(declines(answer) for answer in block.answers), block.answers
        else:
            assert not any(declines(answer) for answer in block.answers), block.answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I don't know that. Ask me something else.", True),
        ("Sorry, I can't know that.", True),
        ("I have never heard of Flarp.", True),
        ("The capital of Norway is Oslo.", False),
        ("It is blue. It was built long ago. I don't know who built it.", False),  # not in the first sentences
        ("You know it already: it is Oslo.", False),
    ],
)
def test_declining(text: str, expected: bool) -> None:
    assert declines(text) == expected


TOLD = (
    "There was a girl named Mina. She had a dog called Rex. One day Rex ran away. Mina looked for him."
    " She found him and laughed."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TOLD, ""),
        (TOLD.replace("Mina looked", "Anna looked").replace("One day Rex", "One day Anna and Rex"), "Anna"),
        (TOLD.replace("a dog called Rex", "a dog"), "Rex"),
        (TOLD.replace("One day Rex", "Then a cat named Mina"), "twice"),
        (TOLD.replace("She found him", "Mina found Mina"), "two characters"),
        (TOLD.replace("named Mina", "with red shoes").replace("Mina looked", "She looked").replace("Rex", "it"), "no"),
        ("A boy named Tim had a hat. It was red. Tim lost it. He was sad. She found it.", "both he and she"),
        ("A boy named Tim had a hat. Tim lost it. It rained. The sun came out. It was warm.", "forgotten"),
        ("On Monday Mrs. Hill met her friend Leo. They ate cake on Monday. Leo laughed. Mrs. Hill sang.", ""),
    ],
)
def test_a_told_story_keeps_its_names(text: str, expected: str) -> None:
    found = name_problem(text)
    assert expected in found if expected else not found, found


def test_fifty_requests_for_stories() -> None:
    task = Stories()
    assert len({task[i]["messages"][0]["content"] for i in range(len(task))}) == len(task) == 50
    assert task.evaluate(task[0], TOLD)
    assert not task.evaluate(task[0], TOLD.split(". ")[0] + ".") and not task.evaluate(task[0], "")
    asked = next(c for c in task if "named Oscar" in c["messages"][0]["content"])
    told = TOLD.replace("girl named Mina", "boy named Oscar").replace("Mina", "Oscar").replace("She", "He")
    assert task.evaluate(asked, told) and not task.evaluate(asked, TOLD)
    assert len(sentences('"Hi!" said Mrs. Hill. "Who are you?" asked Leo. They sat down.')) == 3
    with pytest.raises(UserError, match="test"):
        Stories("train")


def test_the_reward_of_an_answer_is_the_share_of_the_reference() -> None:
    task = Unknown(answerable=True)
    conversation = task[0]
    reference = conversation["messages"][-1]["content"]
    assert task.reward(conversation, reference) == 1 and task.reward(conversation, "nonsense") == 0
    assert task.reward(conversation, "I do not know.") == 0
