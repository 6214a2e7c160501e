"""Running Python that nobody has read: a program, a program with its tests, or a session that goes on.

    execute_code("print(1 + 1)").stdout                                     -> "2\\n"
    execute_code("def f(x): return 2 * x", tests="assert f(2) == 4", entry_point="f").success
    with PythonSession() as session:
        session.run("x = 6"); session.run("x * 7").stdout                   -> "42\\n"

Programs have limits on time, memory, output, files and threads, no network, no other processes, and see nothing of
the user's (`nanochat/sandbox/levels.py` has the levels, dev/SANDBOX.md what each stops). All of it works from any
thread; each call uses a sandbox of its own, kept warm for the next.

What success means: the program ran to its end, and the answer carries a nonce that only this process and the
supervisor know, and no program ever held. A program that sets out to can still feign its own end, as it can turn
an assert that stands in it into nothing: code cannot judge itself. Where code is to be judged, pass `tests`: they run
in another process, which calls the function over a pipe and gets plain values back. No line of the program runs
there, so nothing in it can make a failing test pass.
"""

import atexit
import contextlib
import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from nanochat.sandbox.levels import Worker, choose_level
from nanochat.sandbox.starts import SCRATCH_BYTES, Unavailable
from nanochat.sandbox.wire import Gone

VERDICTS = {
    "success": "ran to its end, and so did its tests",
    "error": "an exception ended it, or a test failed",
    "early_exit": "it ended before its end",
    "timeout": "it took too long",
    "out_of_memory": "it asked for more memory than it may",
    "output_limit": "it wrote more than it may",
    "file_limit": "it made more files than it may",
    "crashed": "the interpreter died of it",
    "killed": "a signal ended it",
    "ended": "the session was over",
}
MAX_CODE_CHARS = 4 << 20
MAX_OUTPUT_BYTES = 8 << 20
GRACE_SECONDS = 10.0  # for the supervisor's answer, after the time is over


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended. `verdict` is one of VERDICTS; the texts are cut at the limit, bytes that are no UTF-8
    replaced; `level` names the sandbox that it ran in."""

    success: bool
    verdict: str
    stdout: str
    stderr: str
    level: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    timeout: float = 5.0
    """Seconds of wall-clock time; of processor time about as much."""
    memory_bytes: int = 512 << 20
    """Address space, the interpreter's own (some 30 MiB) included; a program's tests have as much again."""
    output_bytes: int = 64 << 10
    """Of standard output and error together."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 3600:
            raise ValueError(f"timeout must be above 0 and at most 3600 seconds, got {self.timeout}")
        if self.memory_bytes < 64 << 20 or not 0 < self.output_bytes <= MAX_OUTPUT_BYTES:
            raise ValueError(f"memory_bytes must be at least 64 MiB and output_bytes at most 8 MiB, got {self}")

    def job(self, *, tested: bool = False, interactive: bool = False) -> dict[str, Any]:
        """As the supervisor takes them."""
        cpu_seconds = 0 if interactive else int(self.timeout) + 1
        return {
            "cpu_seconds": cpu_seconds,
            "memory_bytes": self.memory_bytes,
            "file_bytes": SCRATCH_BYTES,
            "output_bytes": self.output_bytes,
            "tested": tested,
            "interactive": interactive,
        }


def execute_code(
    code: str,
    timeout: float = 5.0,
    *,
    tests: str = "",
    entry_point: str = "",
    memory_bytes: int = Limits.memory_bytes,
    output_bytes: int = Limits.output_bytes,
    level: str = "",
) -> ExecutionResult:
    """Run the program `code` in the strongest sandbox there is, or in the one that `level` names.

    With `tests`, these run after it in a process of their own, where the name `entry_point` stands for the program's
    function of that name: arguments and results are plain values (numbers, text, lists, tuples, sets, dicts),
    exceptions arrive as the built-in of the same name. Raises UserError if the machine has no such level.
    """
    if tests and not entry_point:
        raise ValueError("tests need an entry_point: the name of the program's function that they call")
    limits = Limits(timeout, memory_bytes, output_bytes)
    level = choose_level(level)
    worker = borrow(level)
    try:
        worker.send_job(limits.job(tested=bool(tests)))
        result, answer = worker.ask(code, timeout, tests, entry_point)
    except BaseException:
        worker.close()
        raise
    give_back(worker, answer)
    return result


class PythonSession:
    """A Python that remembers: variables live from one `run` to the next, the value of a last expression is shown.

    Exceptions leave it alive. Too much time, memory for the interpreter or output, and `exit()`, end it: the result
    says so, and later ones have the verdict "ended". Close it, or use it in a `with`.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        *,
        memory_bytes: int = Limits.memory_bytes,
        output_bytes: int = Limits.output_bytes,
        level: str = "",
    ) -> None:
        self.limits = Limits(timeout, memory_bytes, output_bytes)
        self.level = choose_level(level)
        self.why_ended = ""
        self._lock = threading.Lock()
        self._worker: PooledWorker | None = borrow(self.level)
        try:
            self._worker.send_job(self.limits.job(interactive=True))
        except BaseException:
            self._worker.close()
            raise

    @property
    def alive(self) -> bool:
        return self._worker is not None

    def run(self, code: str, timeout: float | None = None) -> ExecutionResult:
        """Run `code` with what earlier calls left; at most `timeout` seconds, or the session's."""
        with self._lock:
            if self._worker is None:
                text = f"the session has ended ({self.why_ended}); its variables are gone\n"
                return ExecutionResult(False, "ended", "", text, self.level)
            limit = Limits(self.limits.timeout if timeout is None else timeout).timeout
            try:
                result, answer = self._worker.ask(code, limit)
            except BaseException:
                self._end("interrupted")
                raise
            if answer.get("over", True):
                self._end(result.verdict)
            return result

    def stop(self) -> None:
        """From another thread: end what runs now. The session ends with it."""
        if worker := self._worker:
            with contextlib.suppress(OSError, ValueError):
                worker.requests.close()  # the sandbox ends with its pipes, and `run` is told

    def close(self) -> None:
        """End it. Idempotent."""
        with self._lock:
            self._end("closed")

    def _end(self, why: str) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker, self.why_ended = None, why

    def __enter__(self) -> "PythonSession":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------
# Warm sandboxes

MAX_IDLE = 16
_idle: list["PooledWorker"] = []
_all: set["PooledWorker"] = set()
_lock = threading.Lock()
_hooks: list[bool] = []


class PooledWorker(Worker):
    """A worker that this process keeps track of until it is closed."""

    def __init__(self, level: str) -> None:
        super().__init__(level)
        with _lock:
            _all.add(self)
            if not _hooks:
                _hooks.append(True)
                atexit.register(close_all)
                os.register_at_fork(after_in_child=forget_all)

    def send_job(self, limits: dict[str, Any]) -> None:
        self.send(limits)

    def ask(
        self, code: str, timeout: float, tests: str = "", entry_point: str = ""
    ) -> tuple[ExecutionResult, dict[str, Any]]:
        """(the result, the supervisor's answer; empty if none came and the worker is of no use any more)."""
        if len(code) + len(tests) > MAX_CODE_CHARS:
            raise ValueError(f"a program of {len(code) + len(tests)} characters; the limit is {MAX_CODE_CHARS}")
        nonce, began, answer = secrets.token_hex(16), time.perf_counter(), {}
        try:
            self.send({"code": code, "tests": tests, "entry_point": entry_point, "timeout": timeout, "nonce": nonce})
            answer = self.receive(timeout + GRACE_SECONDS)
            verdict = answer["verdict"]
        except TimeoutError:
            verdict = "timeout"
        except Gone:
            verdict = "killed"  # the whole sandbox, from outside
        if verdict == "success" and not secrets.compare_digest(answer.get("nonce", ""), nonce):
            verdict = "crashed"
        texts = [text_of(answer.get(name, "")) for name in ("stdout", "stderr")]
        seconds = time.perf_counter() - began
        return ExecutionResult(verdict == "success", verdict, texts[0], texts[1], self.level, seconds), answer

    def close(self) -> None:
        with _lock:
            _all.discard(self)
        super().close()


def text_of(latin: str) -> str:
    """Text from bytes that came a byte a character."""
    return latin.encode("latin-1").decode("utf-8", "replace")


def borrow(level: str) -> PooledWorker:
    """A warm worker, or a new one."""
    with _lock:
        fitting = [worker for worker in _idle if worker.level == level]
        worker = fitting[-1] if fitting else None
        if worker:
            _idle.remove(worker)
    if worker and worker.process.poll() is None:
        return worker
    if worker:
        worker.close()
    try:
        return PooledWorker(level)
    except Unavailable as error:
        raise RuntimeError(f"the {level} sandbox worked before and does not start now: {error}") from error


def give_back(worker: PooledWorker, answer: dict[str, Any]) -> None:
    """Keep it if nothing is left of the last program."""
    with _lock:
        keep = bool(answer.get("clean")) and len(_idle) < MAX_IDLE
        if keep:
            _idle.append(worker)
    if not keep:
        worker.close()


def close_all() -> None:
    """End every sandbox of this process."""
    with _lock:
        _idle.clear()
        workers = list(_all)
    for worker in workers:
        worker.close()


def forget_all() -> None:
    """In a fork of this process: the sandboxes are the other's."""
    global _lock
    _lock = threading.Lock()
    for worker in _all:
        worker.forget()
    _all.clear()
    _idle.clear()
