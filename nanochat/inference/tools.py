"""The tools a model may call while it answers, as a table, and what watches an answer for calls.

A tool is a line in a table: its name, the tokens that a call stands between, what runs it, its limits. To add one,
write its runner and put it into the tuple that an Engine is given; nothing else knows which tools there are.

The result is forced into the answer between output tokens. What no tool of the call's tokens understands forces
nothing, and the model goes on by itself.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nanochat.inference.calculator import use_calculator

if TYPE_CHECKING:
    from nanochat.inference.decoding import Tokenizer, TokenSequence

Call = Callable[[], str | None]  # to be run outside the decoding loop
SHORT_RESULT = 64  # tokens that a result may always have; of longer ones a quarter of the answer's room is shown


class Runner(Protocol):
    """Answers the calls of one row. One is made for each row that calls its tool, and closed when the row is done; if
    a call is under way then, on another thread, closing ends it."""

    def __call__(self, text: str) -> str | None: ...  # None: not understood
    def close(self) -> None: ...


@dataclass(frozen=True)
class Tool:
    """One line of the table."""

    name: str
    start: str  # the special tokens that a call stands between
    end: str
    open: Callable[[], Runner]
    slow: bool = False  # runs outside the decoding loop, while other rows go on
    max_call_tokens: int = 1024  # longer calls are not run
    max_output_chars: int = 1000  # of a longer result the beginning is shown


class Calculator:
    """Sums and counts of letters (calculator.py)."""

    def __call__(self, text: str) -> str | None:
        result = use_calculator(text)
        return None if result is None else str(result)

    def close(self) -> None:
        pass


class Python:
    """A Python session in the sandbox, which remembers its variables for as long as the answer lasts."""

    SHOWN = 600  # characters of what was printed before an error

    def __init__(self) -> None:
        from nanochat.execution import PythonSession

        self._new = PythonSession
        self.session = PythonSession(timeout=5.0)

    def __call__(self, text: str) -> str:
        if not self.session.alive:  # a call ended it, and the model was told why
            self.session = self._new(timeout=5.0)
        result = self.session.run(text)
        if result.success:
            return result.stdout.rstrip("\n")
        last_line = (result.stderr.strip().splitlines() or [""])[-1][: self.SHOWN]
        gone = "" if self.session.alive else f" ({result.verdict}: variables are gone)"
        return (result.stdout[: self.SHOWN] + last_line + gone).strip()

    def close(self) -> None:
        self.session.stop()
        self.session.close()


CALCULATOR = Tool("calculator", "<|python_start|>", "<|python_end|>", Calculator)
PYTHON = Tool("python", "<|python_start|>", "<|python_end|>", Python, slow=True)
DEFAULT_TOOLS = (CALCULATOR,)
WITH_PYTHON = (CALCULATOR, PYTHON)  # what the calculator refuses goes to Python


class ToolUse:
    """Follows rows token by token; runs quick calls at once and hands slow ones out."""

    def __init__(self, tokenizer: "Tokenizer", tools: Sequence[Tool] = DEFAULT_TOOLS) -> None:
        special = tokenizer.encode_special
        self.tokenizer = tokenizer
        self._of_start: dict[int, list[Tool]] = {}
        for tool in tools:
            self._of_start.setdefault(special(tool.start), []).append(tool)
        self._output = special("<|output_start|>"), special("<|output_end|>")

    def watch(self, row: "TokenSequence", token: int) -> Call | None:
        """Follow `row` by one token. At the end of a call, queue the result, or return the call if it is a slow one."""
        if token in self._of_start:
            row.calling, row.call = token, []
            return None
        if row.call is None:
            return None
        tools = self._of_start[row.calling]
        if token not in {self.tokenizer.encode_special(tool.end) for tool in tools}:
            row.call.append(token)
            return None
        ids, row.call = row.call, None
        text = self.tokenizer.decode(ids)
        for number, tool in enumerate(tools):
            if len(ids) > tool.max_call_tokens:
                continue
            if tool.slow:
                return lambda: self._try(row, tools[number:], len(ids), text)
            if (result := self._ask(row, tool, text)) is not None:
                self.answer(row, result)
                return None
        return None

    def answer(self, row: "TokenSequence", result: str) -> None:
        """Queue a result: it comes next, whatever the model says."""
        start, end = self._output
        room = max(SHORT_RESULT, (row.max_tokens - len(row.tokens)) // 4)  # the answer is to go on after it
        row.forced += [start, *self.tokenizer.encode(result)[:room], end]

    def _try(self, row: "TokenSequence", tools: Sequence[Tool], num_tokens: int, text: str) -> str | None:
        results = (self._ask(row, tool, text) for tool in tools if num_tokens <= tool.max_call_tokens)
        return next((result for result in results if result is not None), None)

    @staticmethod
    def _ask(row: "TokenSequence", tool: Tool, text: str) -> str | None:
        runner = row.runners.of(tool)
        result = runner(text) if runner else None
        return None if result is None else result[: tool.max_output_chars]


class Runners:
    """What one row's tools hold open."""

    def __init__(self) -> None:
        self._open: dict[str, Runner] = {}
        self._closed = False
        self._lock = threading.Lock()

    def of(self, tool: Tool) -> Runner | None:
        """The row's runner of a tool; None once the row is done."""
        with self._lock:
            if tool.name not in self._open and not self._closed:
                self._open[tool.name] = tool.open()
            return self._open.get(tool.name)

    def close(self) -> None:
        with self._lock:
            self._closed, runners = True, list(self._open.values())
            self._open.clear()
        for runner in runners:
            runner.close()
