"""The plots of scenes.txt, and its small language of {choices}."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SCENES = Path(__file__).with_name("scenes.txt")


@dataclass
class Plot:
    """The scenes of a plot in order, the versions of each, and what can be asked about it."""

    order: list[str] = field(default_factory=list)  # "search?" may be left out
    five: list[str] = field(default_factory=list)  # in a story of five sentences
    themes: list[str] = field(default_factory=list)  # "a lost kite"
    versions: dict[str, list[tuple[list[str], str]]] = field(default_factory=dict)  # scene -> (conditions, text)
    questions: list[tuple[str, str, str]] = field(default_factory=list)  # scene, question, answer


@cache
def plots() -> dict[str, Plot]:
    """All plots by name; "" has the scenes that belong to all."""
    found = {"": Plot()}
    plot, scene = found[""], ""
    for line in SCENES.read_text(encoding="utf-8").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "==":
            name, _, order = rest.partition(": ")
            plot = found[name] = Plot(order.split())
        elif mark == "=":
            plot.five = rest.split()
        elif mark == "!":
            plot.themes = rest.split("|")
        elif mark == "--":
            scene = rest
        elif mark == "?":
            after, _, rest = rest.partition(" ")
            question, _, answer = rest.partition(" | ")
            plot.questions.append((after, question, answer))
        elif line and mark != "#":
            conditions, text = re.fullmatch(r"(?:\[([^\]]*)\] )?(.*)", line).groups()  # type: ignore[union-attr]
            plot.versions.setdefault(scene, []).append(((conditions or "").split(), text))
    return found


def pieces(text: str) -> list[tuple[str, bool]]:
    """`one {two|{three}} four` -> its top-level pieces; True for what stood between braces, which are taken off."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character == "{":
            if not depth:
                found.append((text[start:at], False))
                start = at + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if not depth:
                found.append((text[start:at], True))
                start = at + 1
    return [piece for piece in [*found, (text[start:], False)] if piece[0] or piece[1]]


def alternatives(text: str) -> list[str]:
    """`a|{b|c}|d` -> its three top-level parts."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
