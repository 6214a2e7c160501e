"""The tools a model may call while it answers, and a session that follows one sequence for calls.

A Tool is a line of a table: its name, the tokens around a call, its runner, its limits. To add one, write its runner
and put it into the tuple that an Engine is given; nothing else lists the tools.

The result is forced into the answer between output tokens. If no tool with a call's tokens understands it, nothing is
forced and the model continues by itself.
"""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from nanochat.common import warn
from nanochat.conversation import Tokenizer
from nanochat.execution import PythonSession
from nanochat.inference.calculator import use_calculator

Call = Callable[[], str | None]  # a slow call, to be run outside the decoding loop; returns the result
MIN_RESULT_TOKENS = 64  # a result may always have so many; a longer one a quarter of the answer's remaining tokens
CALL_THREADS = 8  # slow calls at once; more wait, as do the sequences that make them


class Runner(Protocol):
    """Answers one sequence's calls of a tool. Made at the first call, closed when the sequence is done; closing ends a
    call under way on another thread."""

    def __call__(self, text: str) -> str | None: ...  # None: not understood
    def close(self) -> None: ...


@dataclass(frozen=True)
class Tool:
    """One line of the table."""

    name: str
    start: str  # the special tokens around a call
    end: str
    open: Callable[[], Runner]
    slow: bool = False  # runs outside the decoding loop, while other sequences go on
    max_call_tokens: int = 1024  # longer calls are not run
    max_output_chars: int = 1000  # a longer result is cut


class Calculator:
    """Arithmetic and letter counts (calculator.py)."""

    def __call__(self, text: str) -> str | None:
        result = use_calculator(text)
        return None if result is None else str(result)

    def close(self) -> None:
        pass


class Python:
    """A Python session in the sandbox; variables live as long as the answer."""

    MAX_CHARS = 600  # of the output before an error, and of the error

    def __init__(self) -> None:
        self.session = PythonSession(timeout=5.0)
        self._closed, self._lock = False, threading.Lock()  # another thread may close it during a call

    def __call__(self, text: str) -> str:
        if not self.session.alive:  # ended by an earlier call, whose result said so
            session = PythonSession(timeout=5.0)
            with self._lock:
                self.session = session
                if self._closed:
                    self._close_session()
        result = self.session.run(text)
        if result.success:
            return result.stdout.rstrip("\n")
        last_line = (result.stderr.strip().splitlines() or [""])[-1][: self.MAX_CHARS]
        gone = "" if self.session.alive else f" ({result.verdict}: variables are gone)"
        return (result.stdout[: self.MAX_CHARS] + last_line + gone).strip()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close_session()

    def _close_session(self) -> None:
        self.session.stop()
        self.session.close()


CALCULATOR = Tool("calculator", "<|python_start|>", "<|python_end|>", Calculator)
PYTHON = Tool("python", "<|python_start|>", "<|python_end|>", Python, slow=True)
DEFAULT_TOOLS = (CALCULATOR,)
WITH_PYTHON = (CALCULATOR, PYTHON)  # tried in this order: Python gets the calls that the calculator refuses


class ToolTable:
    """The tools of an engine, by the id of the token that starts a call. Immutable; sessions share it."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Tool] = DEFAULT_TOOLS) -> None:
        special = tokenizer.encode_special
        self.tokenizer, self.tools = tokenizer, tuple(tools)
        self.by_start: dict[int, list[Tool]] = {}
        for tool in tools:
            self.by_start.setdefault(special(tool.start), []).append(tool)
        self.ends = {start: {special(tool.end) for tool in same} for start, same in self.by_start.items()}
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")


class ToolSession:
    """Tool use of one sequence: the call being written, the runners it holds open, the tokens to be forced next.

    `room` is how many tokens the sequence may still have.
    """

    def __init__(self, table: ToolTable) -> None:
        self.forced: deque[int] = deque()  # tokens that come next whatever the model predicts
        self._table = table
        self._start = -1  # the token that began the call
        self._call: list[int] | None = None  # its tokens so far; None outside a call
        self._runners: dict[str, Runner] = {}
        self._closed = False
        self._lock = threading.Lock()  # slow calls run on other threads

    def observe(self, token: int, room: int) -> Call | None:
        """Follow a token that the model chose. At the end of a call, force the result, or return a slow call to run."""
        if token in self._table.by_start:
            self._start, self._call = token, []
        elif self._call is not None:
            if token in self._table.ends[self._start]:
                ids, self._call = self._call, None
                return self._run(ids, room)
            self._call.append(token)
        return None

    def catch_up(self, tokens: Sequence[int], room: int) -> Call | None:
        """Follow the beginning of an answer, as `observe` its tokens; only a call that it ends with is run.

        Where it ends within a quick tool's result, the rest of that is forced.
        """
        starts = [i for i, token in enumerate(tokens) if token in self._table.by_start]
        call = None
        for token in tokens[starts[-1] :] if starts else ():
            if self.forced and self.forced[0] == token:
                self.forced.popleft()
                continue
            self.forced.clear()
            call = self.observe(token, room)
        return call

    def force(self, result: str, room: int) -> None:
        """Force a result as the next tokens, cut so that the answer can go on after it."""
        ids = self._table.tokenizer.encode(result)[: max(MIN_RESULT_TOKENS, room // 4)]
        self.forced += [self._table.output_start, *ids, self._table.output_end]

    def close(self) -> None:
        """Close the runners; calls from now on have no result."""
        with self._lock:
            self._closed, runners = True, list(self._runners.values())
            self._runners.clear()
        for runner in runners:
            runner.close()

    def _run(self, ids: list[int], room: int) -> Call | None:
        tools = [tool for tool in self._table.by_start[self._start] if len(ids) <= tool.max_call_tokens]
        quick = list(itertools.takewhile(lambda tool: not tool.slow, tools))
        text = self._table.tokenizer.decode(ids)
        if (result := self._first_result(quick, text)) is not None:
            self.force(result, room)
            return None
        rest = tools[len(quick) :]
        return functools.partial(self._first_result, rest, text) if rest else None

    def _first_result(self, tools: Sequence[Tool], text: str) -> str | None:
        """The result of the first tool that understands the call, None if none does or the session is closed.

        A tool that raises is reported and counts as one that does not understand: other sequences share the batch.
        """
        for tool in tools:
            try:
                with self._lock:
                    if tool.name not in self._runners and not self._closed:  # made at its first call
                        self._runners[tool.name] = tool.open()
                    runner = self._runners.get(tool.name)
                if runner and (result := runner(text)) is not None:
                    return result[: tool.max_output_chars]
            except Exception as error:
                warn(f"the tool {tool.name} failed: {error!r}")
        return None


@functools.cache
def call_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CALL_THREADS, "nanochat-tool")


def start_call(call: Call) -> "Future[str | None]":
    """Run a slow call on a thread."""
    return call_threads().submit(call)
