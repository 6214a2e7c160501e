"""Simple stories, generated: a plot and a cast are drawn, the scenes told one by one, and the text checked.

cast.py draws who and what takes part from lexicon.txt, plots.py reads the plots from scenes.txt, teller.py tells a
story, check.py reads the finished text again without knowing how it was told. `python -m dev.starter.stories` shows a
few.
"""

import itertools
import random
from collections.abc import Iterator

from dev.starter.clean import sentences
from dev.starter.stories.check import problem
from dev.starter.stories.teller import Story

LENGTHS = range(5, 17)  # sentences


def stories(count: int, seed: int, five: bool = False) -> Iterator[Story]:
    """`count` different stories that pass the check, or such of five sentences; the same ones for the same seed."""
    lengths = range(5, 6) if five else LENGTHS
    seen: set[str] = set()
    for number in itertools.count():
        if len(seen) == count:
            return
        story = Story(random.Random(f"{seed} {number}")).run(five)
        fits = not story.broken_off and len(sentences(story.text)) in lengths and story.text not in seen
        if fits and not problem(story.text, story.characters()):
            seen.add(story.text)
            yield story
