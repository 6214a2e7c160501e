"""For tests of conversations: a tokenizer whose ids can be read, and short ways to write messages."""

from collections.abc import Sequence

from nanochat.common import SPECIAL_TOKENS


class Spelled:
    """A tokenizer of one id per character, special tokens below zero: ids can be read back as a template."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode_special(self, name: str) -> int:
        return -1 - SPECIAL_TOKENS.index(name)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(SPECIAL_TOKENS[-1 - i] if i < 0 else chr(i) for i in ids)


SPELLED = Spelled()
TOOL_ANSWER = [
    {"type": "text", "text": "Let me see. "},
    {"type": "python", "text": "2+2"},
    {"type": "python_output", "text": "4"},
    {"type": "text", "text": "It is 4."},
]


def talk(*contents: object, system: str | None = None) -> dict:
    """A conversation of alternating turns, the user first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def spell(ids: Sequence[int]) -> str:
    return SPELLED.decode(ids).replace("<|", "<").replace("|>", ">")
