"""The terminal of a chat: printable text and keyboard input."""

import contextlib
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# A terminal executes escape sequences, so a model must not be able to print one.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(pieces: Iterable[tuple[str, str]], tool: str) -> Iterator[str]:
    """(kind, text) pieces as text for a terminal, tool calls as [calculator: 12*3 = 36]."""
    before = "text"
    for kind, text in pieces:
        if kind != before:
            yield transition(before, kind, tool)
        before = kind
        yield CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if before != "text":
        yield "]"


def transition(before: str, after: str, tool: str) -> str:
    """The text between a part of one kind and a part of another."""
    if (before, after) == ("python", "python_output"):
        return " = "
    opening = {"text": "", "python": f"[{tool}: ", "python_output": "[output: "}[after]
    return opening if before == "text" else "]" + opening


# ---------------------------------------------------------------------------------------------------
# The keyboard


def terminal_reader(history: Path) -> Callable[[], str]:
    """A reader of messages with line editing and history; Enter sends, Alt-Enter starts a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), key_bindings=keys)
    return lambda: session.prompt("\n> ")


@contextlib.contextmanager
def noted_interrupts(noted: list[int]) -> Iterator[None]:
    """Within the block, Ctrl-C appends to `noted` instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
