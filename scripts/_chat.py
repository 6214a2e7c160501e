"""A conversation with a model: its messages, what still fits the context, answers as printable pieces, and the
keyboard at the other end."""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat.conversation import Message, drop_oldest_turns, parse_answer, render_prompt
from nanochat.engine import AnswerStream, Engine
from nanochat.gpt import GPT
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import DEFAULT_TOOLS, Tool

# A terminal obeys escape sequences, so a model must not be able to print one.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Chat:
    """One conversation. `stream` an answer, then `remember` what of it was said."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Any,
        sampling: SamplingParams,
        max_tokens: int,
        seed: int,
        answers: bool = True,
        tools: Sequence[Tool] = DEFAULT_TOOLS,
    ) -> None:
        """`answers`: the model was taught to answer; one that was not continues the text it is given."""
        self.engine, self.tokenizer = Engine(model, tokenizer, tools=tools), tokenizer
        self.tool = "calculator" if len(tools) == 1 else "python"
        self.sampling, self.max_tokens, self.seed, self.answers = sampling, max_tokens, seed, answers
        # An answer may take what the prompt leaves, and always half the context if it is long enough.
        self.prompt_limit = self.engine.max_context - min(max_tokens, self.engine.max_context // 2)
        self.system = ""
        self.clear()

    def clear(self, system: str | None = None) -> None:
        """Start anew, with another system message if one is given (empty: none)."""
        self.system = self.system if system is None else system
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.said: list[int] = []
        self.turn = self.forgotten = 0

    def stream(self, text: str, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The model's answer to `text` in pieces, none of which cuts a character, until `should_stop` says so.

        Raises UserError, and forgets `text`, if it is too long for the model.
        """
        prompt = self._prompt(text)
        self.turn, self.said = self.turn + 1, []
        return printable(self._generate(prompt, should_stop), self.tool)

    def _prompt(self, text: str) -> list[int]:
        self.forgotten = 0
        if not self.answers:
            ids = self.tokenizer.encode(text)
            return [self.tokenizer.encode_special("<|bos|>"), *ids[-(self.prompt_limit - 1) :]]
        messages = [*self.messages, {"role": "user", "content": text}]
        kept = drop_oldest_turns(self.tokenizer, messages, self.prompt_limit)
        self.forgotten = len(messages) - len(kept)
        self.messages = kept
        return render_prompt(self.tokenizer, kept)

    def _generate(self, prompt: list[int], should_stop: Callable[[], bool]) -> Iterator[tuple[str, str]]:
        stream = AnswerStream(self.tokenizer)
        settings = self.sampling
        for (token,), _ in self.engine.generate(
            prompt,
            max_tokens=self.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=self.seed + self.turn - 1,
            should_stop=should_stop,
        ):
            self.said.append(token)
            yield from stream.feed(token)
        yield from stream.finish()

    def remember(self) -> None:
        """Keep what was said as the assistant's turn; a question with no answer at all is taken back."""
        if not self.answers or not self.messages or self.messages[-1]["role"] != "user":
            return
        if self.said:
            self.messages.append({"role": "assistant", "content": parse_answer(self.tokenizer, self.said)})
        else:
            self.messages.pop()


def printable(pieces: Iterable[tuple[str, str]], tool: str = "calculator") -> Iterator[str]:
    """Text for a terminal, calculator calls as [calculator: 12*3 = 36]."""
    before = "text"
    for kind, text in pieces:
        if kind != before:
            yield transition(before, kind, tool)
        before = kind
        yield CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if before != "text":
        yield "]"


def transition(before: str, after: str, tool: str) -> str:
    """What marks the passage from one kind of part to another."""
    if (before, after) == ("python", "python_output"):
        return " = "
    opening = {"text": "", "python": f"[{tool}: ", "python_output": "[output: "}[after]
    return opening if before == "text" else "]" + opening


# ---------------------------------------------------------------------------------------------------
# The keyboard


def terminal_reader(history: Path) -> Callable[[], str]:
    """Reads a message with line editing and history; Enter sends it, Alt-Enter starts a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), key_bindings=keys)
    return lambda: session.prompt("\n> ")


def pipe_reader() -> Callable[[], str]:
    """Reads a message per line from standard input."""

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    return read


@contextlib.contextmanager
def noted_interrupts(noted: list[int]) -> Iterator[None]:
    """While inside, Ctrl-C adds to the list instead of raising wherever the program happens to be."""
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
