"""The whole chat_cli program in a pseudo-terminal, with a model that answers slowly."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C goes to this program
sys.path[:0] = [{root!r}, {tests!r}]
from stubs import START, TOKENIZER, Scripted, chain
from scripts import chat_cli

class Slow(Scripted):
    def __call__(self, idx, kv_cache):
        time.sleep(0.03)
        return super().__call__(idx, kv_cache)

model = Slow(chain(START, "abcdefghijklmnopqrstuvwxyz0123456789."), 400)
chat_cli.load_model = lambda *which, **more: (model, TOKENIZER, {{"step": 1}})
sys.exit(chat_cli.main([]))
"""
PROMPT = ">"
WHOLE = "abcdefghijklmnopqrstuvwxyz0123456789."


class Terminal:
    """The running program with its keyboard and screen."""

    def __init__(self, base: Path) -> None:
        self.keyboard, child_end = pty.openpty()
        fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        code = PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=child_end,
            stdout=child_end,
            stderr=child_end,
            start_new_session=True,
            env={
                **os.environ,
                "NANOCHAT_BASE_DIR": str(base),
                "TERM": "xterm",
                "OMP_NUM_THREADS": "1",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
        )
        os.close(child_end)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def expect(self, text: str, seconds: float = 90.0) -> str:
        """Wait until `text` is on the screen; returns the output before it, without colours."""
        deadline = time.monotonic() + seconds
        while text not in self.plain:
            assert time.monotonic() < deadline, f"{text!r} did not appear: {self.plain!r}"
            if select.select([self.keyboard], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.keyboard, 65536).decode(errors="replace")
                except OSError:  # the program exited
                    assert text in self.plain, f"exited with {self.process.wait()}: {self.plain!r}"
        before, _, self.seen = self.plain.partition(text)
        return before

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\r", "", self.seen)

    def wait(self) -> int:
        """Wait for the exit code, reading the output meanwhile."""
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.keyboard], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.keyboard, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(20)


@pytest.fixture
def terminal(base: Path) -> Iterator[Terminal]:
    base.mkdir()
    made = Terminal(base)
    try:
        made.expect("/help")
        made.expect(PROMPT)
        yield made
    finally:
        if made.process.poll() is None:
            os.killpg(made.process.pid, signal.SIGKILL)
        made.process.wait()
        os.close(made.keyboard)


def test_an_answer_and_quit(terminal: Terminal) -> None:
    terminal.type("hi\r")
    terminal.expect(WHOLE)
    terminal.expect(PROMPT)
    terminal.type("/quit\r")
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_not_the_program(terminal: Terminal) -> None:
    terminal.type("hi\r")
    terminal.expect("abcd")
    terminal.type("\x03")
    before = terminal.expect(" [stopped]")
    assert not before.endswith("9.") and len(before) < len(WHOLE)
    terminal.expect(PROMPT)
    terminal.type("again\r")
    terminal.expect(WHOLE)
    terminal.expect(PROMPT)
    terminal.type("\x03")
    terminal.expect("Ctrl-C again")
    terminal.expect(PROMPT)
    terminal.type("\x03")
    assert terminal.wait() == 0


def test_several_lines_and_history(terminal: Terminal, base: Path) -> None:
    terminal.type("first\x1b\rsecond\r")  # Alt-Enter between
    terminal.expect(WHOLE)
    terminal.expect(PROMPT)
    terminal.type("\x1b[A\x1b[A\x05!\r")  # up into it, up to its first line; at the end of that
    terminal.expect(WHOLE)
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0
    kept = (base / "chat_history").read_text()
    assert "+first\n+second\n" in kept and "+first!\n+second\n" in kept


def test_pasted_lines_are_one_message(terminal: Terminal, base: Path) -> None:
    terminal.type("\x1b[200~one\ntwo\nthree\x1b[201~")
    terminal.expect("three")
    terminal.type("\r")
    terminal.expect(WHOLE)
    terminal.expect(PROMPT)
    terminal.type("\x04")
    assert terminal.wait() == 0 and "+one\n+two\n+three\n" in (base / "chat_history").read_text()


def test_commands(terminal: Terminal) -> None:
    terminal.type("/help\r")
    for name in ("/clear", "/system", "/quit", "Ctrl-C", "Alt-Enter"):
        terminal.expect(name)
    for line in ("/nonsense", "/system Be brief.", "/clear"):
        terminal.expect(PROMPT)
        terminal.type(f"{line}\r")
        terminal.expect("/help" if line == "/nonsense" else line)  # the error names /help
    terminal.expect(PROMPT)
    terminal.type("quit\r")
    assert terminal.wait() == 0
