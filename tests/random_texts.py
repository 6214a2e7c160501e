"""Random texts that tokenizers may split differently, and random conversations."""

import random
from typing import Any

from nanochat.common import SPECIAL_TOKENS

MARK = "\ufdd0"
SPACES = [chr(code) for code in range(0x3001) if chr(code).isspace()]
PIECES = [
    *SPECIAL_TOKENS,
    *("<|", "|>", "<", "|", "<||>", "<|bos|", "|bos|>", "<|BOS|>", "<| bos |>", MARK, "\ufdd1", "\uffff", "\U0010ffff"),
    *(
        "'s",
        "'S",
        "'ſ",
        "'ll",
        "'LL",
        "'Ve",
        "'re",
        "'d",
        "’s",
        "''",
        "'",
        '"',
        "\\n",
        "\0",
        "\x7f",
        "\ufeff",
        "\ufffd",
    ),
    *("e\u0301", "n\u0303\u0323", "\u0301", "a" + "\u0301" * 30, "क्षि", "ก็", "한국", "ﷺ", "ﬁ", "ß", "İ", "K", "\u00ad"),
    *("👩‍👩‍👧", "🇩🇪", "👍🏽", "☺️", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f", "\u200d", "\u200b", "\u202e", "\u2028"),
    *("0", "12", "123", "1234567890", "١٢٣", "Ⅷ", "½", "²", "৪", "𝟘", "一二三", "1,000.50", "0x1F"),
    *(
        "The",
        " quick",
        "hello",
        "привет",
        "你好",
        "γειά",
        "שלום",
        "مرحبا",
        "def f(x):\n\treturn x",
        "https://x.example/?a=1",
    ),
    *("\r\n", "\n\n\n", "  \n", "\n  ", "\t", "    ", " \r", "!!!", "...", "--\n", "?!\r\n\r\n", " $%^&", "{}[]()"),
]


def random_text(rng: random.Random) -> str:
    """A text of up to some hundred characters, now and then with 60,000 of white space; no lone surrogates."""
    kind = rng.random()
    if kind < 0.002:
        run = "".join(rng.choices(SPACES, k=rng.choice([1, 1, 3]))) * 70_000
        parts = ["a", run[: rng.choice([19_999, 20_000, 20_001, 40_000, 60_001])], rng.choice(["", "b", "\n", "!\n"])]
        return "".join(parts[rng.randrange(2) :])
    if kind < 0.1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(40))).decode("utf-8", "replace")
    pieces = []
    for _ in range(rng.randrange(1, 25)):
        draw = rng.random()
        if draw < 0.55:
            pieces.append(rng.choice(PIECES))
        elif draw < 0.7:
            pieces.append(rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 5, 30]))
        elif draw < 0.8:
            pieces.append(" ")
        elif draw < 0.9:
            pieces.append(chr(rng.randrange(0x250)))
        else:
            pieces.append(random_character(rng))
    return "".join(pieces)


def random_character(rng: random.Random) -> str:
    """Any character, of any plane."""
    return chr(code) if not 0xD800 <= (code := rng.randrange(rng.choice([0x3000, 0x10000, 0x110000]))) < 0xE000 else "�"


def random_messages(rng: random.Random) -> list[dict[str, Any]]:
    """Messages of a conversation: a system message or none, then turns, with tools and weights; no neighbouring text
    parts."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": random_text(rng)})
    for turn in range(rng.randrange(1, 7)):
        if turn % 2 == 0:
            messages.append({"role": "user", "content": random_text(rng)})
            continue
        message = {"role": "assistant", "content": random_text(rng) if rng.random() < 0.5 else random_parts(rng)}
        if rng.random() < 0.3:
            message["weight"] = rng.choice([0, 1])
        messages.append(message)
    return messages


def random_parts(rng: random.Random) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for _ in range(rng.randrange(1, 6)):
        kinds = [
            kind for kind in ("text", "python", "python_output") if not (parts and kind == parts[-1]["type"] == "text")
        ]
        parts.append({"type": rng.choice(kinds), "text": random_text(rng)})
    return parts
