"""The terminal of a chat: printable text, commands, keyboard input."""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanochat.common import is_writable, visible
from nanochat.engine import Chat


def printable(pieces: Iterable[tuple[str, str]], tool: str) -> Iterator[str]:
    """(kind, text) pieces as text for a terminal, tool calls as [calculator: 12*3 = 36]."""
    before, last = "text", ""
    for kind, text in pieces:
        if kind != before:
            yield transition(before, kind, tool)
        yield visible(text.removeprefix("\n") if last == "\r" else text)  # a line end may be cut in two
        before, last = kind, text[-1:]
    if before != "text":
        yield "]"


def transition(before: str, after: str, tool: str) -> str:
    """The text between a part of one kind and a part of another."""
    if (before, after) == ("python", "python_output"):
        return " = "
    opening = {"text": "", "python": f"[{tool}: ", "python_output": "[output: "}[after]
    return opening if before == "text" else "]" + opening


# ---------------------------------------------------------------------------------------------------
# Commands

HELP = """/clear         start a new conversation
/system TEXT   start a new conversation with this system message; without TEXT: with none
/quit          leave (or Ctrl-D)
Other lines are messages, also those that begin with a slash or a blank.
Ctrl-C stops an answer; pressed twice at the prompt, it leaves. Alt-Enter starts a new line."""


def command(chat: Chat, line: str) -> bool:
    """Run a line that begins with a slash; False if it is a message, as "/etc/hosts is what?" is."""
    name, rest = [*line.split(maxsplit=1), ""][:2]
    if name == "/system" and rest and not chat.chat_model:
        print("a base model continues your last text and reads no system message", file=sys.stderr)
    elif name == "/system":
        chat.clear(system=rest)
    elif rest and name in ("/clear", "/help", "/quit", "/exit"):
        print(f"{name} takes no text; a blank before it makes the line a message", file=sys.stderr)
    elif name == "/clear":
        chat.clear()
    elif name == "/help":
        print(HELP)
    elif not rest and re.fullmatch(r"/\w+", name):
        print(
            f"unknown command {name}; /help lists the commands; a blank before it makes it a message", file=sys.stderr
        )
    else:
        return False
    return True


# ---------------------------------------------------------------------------------------------------
# The keyboard


def terminal_reader(history: Path) -> Callable[[], str]:
    """A reader of messages with line editing and history; Enter sends, Alt-Enter starts a new line.

    Where `history` cannot be written, it is kept in memory only.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    kept: History = FileHistory(str(history)) if is_writable(history.parent) else InMemoryHistory()
    session: PromptSession[str] = PromptSession(history=kept, key_bindings=keys)
    return lambda: session.prompt("\n> ")


@contextlib.contextmanager
def noted_interrupts(noted: list[int]) -> Iterator[None]:
    """Within the block, Ctrl-C appends to `noted` instead of raising KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
