"""Stories as answers: a request that names what the story has, and the story."""

from dev.starter.clean import stable_hash
from dev.starter.stories.cast import VOWEL_SOUND
from dev.starter.stories.plots import plots
from dev.starter.stories.teller import Story, tidy

SHORT = (
    "Tell me a story about {x}.",
    "Tell me a short story about {x}.",
    "Write a short story about {x}.",
    "Can you tell me a story about {x}?",
    "Please tell me a story about {x}.",
    "I would like to hear a story about {x}.",
    "Tell me a bedtime story about {x}.",
    "tell me a story about {x}",
    "Make up a story about {x}.",
    "Do you know a story about {x}?",
)
FIVE = (
    "Tell me a five-sentence story about {x}.",
    "Tell me a story about {x} in five sentences.",
    "Write a story of five sentences about {x}.",
    "Can you write a five-sentence story about {x}?",
    "Write a five-sentence story about {x}.",
    "Please tell me a story about {x}. It should have five sentences.",
)
ANY = (
    "Tell me a story.",
    "Can you tell me a story?",
    "tell me a story",
    "Tell me a bedtime story.",
    "Write a short story.",
)
ANY_FIVE = ("Tell me a story in five sentences.", "Write a five-sentence story.", "Tell me a five-sentence story.")


def subject(story: Story) -> str:
    """What a story can be said to be about: its hero, its hero and a thing, its theme; "" for anything."""
    hero, companion, thing = (story.cast[slot] for slot in "abo")
    pick = stable_hash(story.text, "subject") % 10
    someone = f"{'an' if VOWEL_SOUND.match(hero.noun) else 'a'} {hero.noun}"
    if pick < 3:
        return someone
    if pick < 5:
        return f"{someone} named {hero.name}"
    if pick == 5 and companion.known:
        return f"{hero.name} and {companion.name}"
    if pick == 6 and thing.known:
        return f"{someone} and a {thing.noun}"
    themes = plots()[story.plot].themes
    return "" if pick == 9 else story.aside(themes[stable_hash(story.text, "theme") % len(themes)])


def request(story: Story, five: bool) -> list[str]:
    """[request, story]."""
    about, pick = subject(story), stable_hash(story.text, "request")
    templates = (FIVE if five else SHORT) if about else (ANY_FIVE if five else ANY)
    return [tidy(templates[pick % len(templates)].format(x=about)), story.text]
