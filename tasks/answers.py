"""Reading the answer out of what a model wrote. Only the final answer counts, never an echo of the question."""

import hashlib
import random
import re
from decimal import Decimal, InvalidOperation
from typing import Any

Conversation = dict[str, Any]

OUTPUT_END = "<|output_end|>"
ASSISTANT_END = "<|assistant_end|>"
# Decimals, with thousands commas or without; a sign belongs to the number only where no operand precedes it.
NUMBER = re.compile(r"(?:(?<![\w.])-)?\$?(?<![\d.])(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
OPERAND = re.compile(r"(?:[+*/×÷^%-]|(?<![^\W\d])x|\b(?:plus|minus|times|by|and|from|into|add))\s*$", re.IGNORECASE)
ASKED = re.compile(r"[^.!\n]*\?")


def keyed_random(*key: object) -> random.Random:
    """A generator that is a pure function of `key`, whatever its signs and types.

    (`random.seed(1)` and `random.seed(-1)` are the same stream; hashing the key keeps them apart.)
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def text_of(content: str | list[dict[str, str]]) -> str:
    """The plain text of a message, tool parts left out."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def reference_text(conversation: Conversation) -> str:
    """The text after the last tool output in the conversation's last (assistant) message."""
    content = conversation["messages"][-1]["content"]
    assert conversation["messages"][-1]["role"] == "assistant", "a task's conversation ends with the reference answer"
    if isinstance(content, str):
        return content
    last_tool = max((i for i, part in enumerate(content) if part["type"] != "text"), default=-1)
    return text_of(content[last_tool + 1 :])


def final_text(conversation: Conversation, completion: str) -> str:
    """What the model said last: after its last tool output, before the end of its turn, questions echoed removed."""
    text = completion.split(ASSISTANT_END, 1)[0].rsplit(OUTPUT_END, 1)[-1]
    for message in conversation["messages"]:
        if message["role"] == "user" and (question := text_of(message["content"]).strip()):
            text = text.replace(question, " ")
    return text.strip()


def parse_number(text: str) -> Decimal | None:
    """`$1,234.50` -> 1234.50; None if it is not one number."""
    try:
        value = Decimal(text.strip().rstrip(".").replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def number_after_marker(text: str) -> Decimal | None:
    """The number after the last `####`, or None."""
    if "####" not in text:
        return None
    match = NUMBER.match(text.rsplit("####", 1)[1].strip())
    return parse_number(match[0]) if match else None


def final_number(text: str) -> Decimal | None:
    """The number that `text` gives as its answer: the one after `####`, else the last one.

    None if there is none, if it is part of a question, or if it is an operand (`12 + 7` answers nothing).
    """
    if "####" in text:
        return number_after_marker(text)
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    before, after = text[: last.start()], text[last.end() :]
    subtracted = last[0].startswith("-") and before.rstrip()[-1:].isdigit()
    if subtracted or OPERAND.search(before) or ASKED.match(after):
        return None
    return parse_number(last[0])
