"""Conversations between people (chitchat-dataset) and greetings and trivia (chatterbot-corpus)."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import yaml

from dev.starter.archives import Reader
from dev.starter.clean import RUDE, is_clean, normalise

PRIVATE = re.compile(
    r"\d{7,}|\d{3}[-. ]\d{3,4}[-. ]\d{4}|\S+@\S+|\b(?:snapchat|instagram|facebook|whatsapp|kik|skype)\b", re.I
)
ABOUT_THE_TASK = re.compile(
    r"chit ?chat|\bmturk|\bturk(?:er)?\b|\bprompts?\b|\bratings?\b|\brate (?:me|you|this|each|the)\b|feeding the ai"
    r"|this (?:web)?(?:app|site)\b|\b(?:chat ?)?bots?\b|timer|survey|refresh|(?:end|this|the) chat\b|competition"
    r"|open source|disqualif|\bsocial media|data ?set|conversation partner|gift ?card|\bprizes?\b|perceptions? lab"
    r"|(?:\d|many|more|earn|get|got|for|your|my|the|of) points\b|finish button|disconnect|leader ?board|byu\b"
    r"|credits?\b.*\bclass|\bchatters?\b|\bmoderators?\b|your real name|two people on|shooting to win",
    re.I,
)
"""Talk about the site that collected the conversations."""
HUMAN = re.compile(
    r"\b(?:my|the) (?:name|wife|husband|girlfriend|boyfriend|gf|bf|mom|mum|mother|dad|father|sister|brother|son|job"
    r"|daughter|kids?|baby|birthday|parents|boss|roommate|hometown|dog|cat|house|apartment|school|college|class(?:es)?"
    r"|friends?|step ?dad|step ?mom|grand\w+)\b"
    r"|\b(?:i live|i work|i am from|im from|i'm from|i was born|i grew up|i study|i studied|i drive|i went|i slept"
    r"|i ate|i just (?:ate|woke|got)|i was (?:in|at|a|on)|nice to meet you|years? old|college|university|married|hungry"
    r"|i'?m a (?:guy|girl|man|woman|dude|student|teacher|nurse|male|female|mom|dad)|hungover|drunk|tired|sick|homework"
    r"|graduat\w*|semester|finals|exams?|church|mission|professor|midterms?|major|freshman|sophomore|high school"
    r"|my (?:first|last) \w+|when i was|pregnant)\b|\b(?:im|i'?m|i am) \d\d?\b",
    re.I,
)
"""Said by the assistant, these claim the life of a person."""
STRANGERS = re.compile(
    r"\b(?:we (?:spoke|chatted|talked|just|were)|(?:chat|talk|speak)(?:ted|ed|ing)? (?:again|before|earlier|yesterday)"
    r"|you(?:'?re| are)? (?:back|again)|it'?s (?:me|you)\b|its (?:me|you)\b|hello again|me again|real person|other chat"
    r"|block you|done with|no one else|yesterday|last (?:night|time)|remember me|user ?name|i'?m back|internet|wifi"
    r"|browser|page|switched|online|new here|actual person|this thing|hike the y|econ)\b"
    r"|\b(?:hey|hi|hello|hii+|heyy+|thanks|bye) (?!there|how|hi\b|hey|hello|what|are|i\b|i'm|so|my|friend|again|it|you"
    r"|to|for)[A-Za-z]+\b",
    re.I,
)
"""Signs that two people know each other, by name or from an earlier chat."""
OPENING = re.compile(
    r"(?:hi+|hey+|hello+|yo|sup|howdy|good (?:morning|evening|afternoon)|what'?s up|how)\b|[^.]{8,120}\?$", re.I
)
ASKS_WHO = re.compile(
    r"\b(?:your name|who (?:are|r) (?:you|u)|where (?:are|r|do) (?:you|u)|where you from|how old|what do you do|asl"
    r"|(?:are|r) (?:you|u) (?:a |an )?(?:human|real|robot|person|guy|girl|boy|man|woman|male|female|married|single|done"
    r"|in school|from)|what are you (?:up to|doing)|do you have (?:a|any|kids|pets))\b",
    re.I,
)


@dataclass(frozen=True)
class Conversation:
    """Turns of two speakers in strict alternation, and the lowest of its ratings (0 if unrated)."""

    turns: tuple[str, ...]
    rating: int


def tidy_message(text: str) -> str:
    """One message: normalised, shouting repeats shortened (soooooo -> sooo), emoticon junk removed."""
    text = normalise(text).replace("\n", " ")
    text = re.sub(r"([A-Za-z!?.])\1{3,}", r"\1\1\1", text)
    text = re.sub(r"'{2,}", '"', text)
    return re.sub(r"[^\x20-\x7eà-ÿÀ-ß€£–—…]+", "", text).strip()


def join_messages(messages: list[str]) -> str:
    """A run of messages as one turn; messages without an end mark get a full stop."""
    closed = [m if re.search(r"[.!?,:;)\-]$", m) else m + "." for m in messages[:-1]]
    return " ".join([*closed, messages[-1]])


def gibberish(turns: tuple[str, ...]) -> bool:
    """True for keyboard mashing, one-word talk and shouting."""
    words = " ".join(turns).split()
    if len(words) < 4 * len(turns) or len(set(map(str.lower, words))) < 0.35 * len(words):
        return True
    vowelless = [w for w in words if len(w) > 3 and w.isalpha() and not re.search(r"[aeiouy]", w, re.I)]
    odd = vowelless + [w for w in words if len(w) > 22]
    shouted = [w for w in words if len(w) > 3 and w.isupper()]
    return len(odd) > 0.03 * len(words) or len(shouted) > 0.15 * len(words)


def presentable(turn: str) -> bool:
    """False for a turn that has to go, and that a conversation is cut at."""
    return not (
        RUDE.search(turn)
        or PRIVATE.search(turn)
        or ABOUT_THE_TASK.search(turn)
        or not is_clean(turn)
        or len(turn) > 600
    )


def chitchat(reader: Reader, at_least: int = 4) -> list[Conversation]:
    """Conversations, cut where a turn is rude, private or about the site that collected them.

    Stretches of fewer than `at_least` turns, and gibberish, are dropped.
    """
    kept = []
    for _, record in sorted(json.loads(reader.text("chitchat_dataset/dataset.json")).items()):
        runs: list[tuple[str, list[str]]] = []
        for message in (m for group in record["messages"] for m in group):
            text = tidy_message(message["text"])
            if not text:
                continue
            if runs and runs[-1][0] == message["sender"]:
                runs[-1][1].append(text)
            else:
                runs.append((message["sender"], [text]))
        ratings = record.get("ratings") or {}
        everything = (join_messages(messages) for _, messages in runs)
        for fine, stretch in groupby(everything, key=presentable):
            turns = tuple(stretch) if fine else ()
            if len(turns) >= at_least and not gibberish(turns):
                kept.append(Conversation(turns, min(ratings.values(), default=0)))
    return kept


def as_text(conversation: Conversation) -> str:
    """One turn a line."""
    return "\n".join(conversation.turns)


def smalltalk(conversations: list[Conversation], turns: int = 8, chars: int = 900) -> Iterator[list[str]]:
    """The opening of each well-rated conversation, as user and assistant turns in alternation.

    It is cut before the first exchange in which a question or answer is about the life of a person, since
    the assistant is not one, and to `turns` and `chars`.
    """
    for conversation in conversations:
        if conversation.rating < 5 or not OPENING.match(conversation.turns[0]):
            continue
        kept: list[str] = []
        for user, assistant in zip(conversation.turns[::2], conversation.turns[1::2]):
            personal = ASKS_WHO.search(user) or HUMAN.search(assistant) or STRANGERS.search(f"{user} {assistant}")
            length = sum(map(len, [*kept, user, assistant]))
            if personal or max(len(user), len(assistant)) > 300 or len(kept) >= turns or length > chars:
                break
            kept += [user, assistant]
        if len(kept) >= 4 or (len(kept) == 2 and len(kept[1].split()) >= 4):
            yield kept


def chatterbot(reader: Reader, *topics: str) -> Iterator[tuple[str, str]]:
    """(question, answer) pairs of the English topics named, duplicates removed."""
    seen = set()
    for topic in topics:
        for entry in yaml.safe_load(reader.text(f"data/english/{topic}.yml"))["conversations"]:
            if not isinstance(entry, list) or len(entry) < 2:
                continue
            question, answer = (normalise(str(part)).replace("\n", " ") for part in entry[:2])
            bad = RUDE.search(question + answer) or not is_clean(question + answer) or len(answer) > 250
            if not bad and (question, answer) not in seen:
                seen.add((question, answer))
                yield question, answer
