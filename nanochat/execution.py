"""Run untrusted Python: a program, a program with tests, or an interactive session.

    execute_code("print(1 + 1)").stdout                                     -> "2\\n"
    execute_code("def f(x): return 2 * x", tests="assert f(2) == 4", entry_point="f").success
    with PythonSession() as session:
        session.run("x = 6"); session.run("x * 7").stdout                   -> "42\\n"

Programs have limits on time, memory, output, files and threads. They have no network, cannot start processes and see
nothing of the user's files or environment (levels in `nanochat/sandbox/levels.py`; dev/SANDBOX.md lists what each
stops). All functions are thread-safe; each call uses its own sandbox process, which is kept warm for the next call.

Success means that the program ran to its end and the answer carries a nonce known only to this process and the
supervisor, never to the program. A malicious program can still fake its own end or disable the asserts inside it: code
cannot judge itself. To judge code, pass `tests`: they run in another process, which calls the function over a pipe and
receives plain values. None of the program's code runs there, so it cannot make a failing test pass.
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
    "success": "the program, and its tests if any, ran to the end",
    "error": "an exception, or a failed test",
    "early_exit": "exited early",
    "timeout": "exceeded the time limit",
    "out_of_memory": "exceeded the memory limit",
    "output_limit": "exceeded the output limit",
    "file_limit": "exceeded the number of files",
    "crashed": "the interpreter crashed",
    "killed": "killed by a signal",
    "ended": "the session had already ended",
}
MAX_CODE_CHARS = 4 << 20
MAX_OUTPUT_BYTES = 8 << 20
GRACE_SECONDS = 10.0  # after the time limit, for the supervisor's answer


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended: `verdict` is a key of VERDICTS, `level` the sandbox level it ran in.

    Output is truncated at the limit; invalid UTF-8 is replaced.
    """

    success: bool
    verdict: str
    stdout: str
    stderr: str
    level: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Resources a program may use."""

    timeout: float = 5.0
    """Seconds of wall-clock time, and about as many of CPU time."""
    memory_bytes: int = 512 << 20
    """Address space, including about 30 MiB of the interpreter's own; tests get the same amount in their process."""
    output_bytes: int = 64 << 10
    """Limit of stdout and stderr together."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 3600:
            raise ValueError(f"timeout must be above 0 and at most 3600 seconds, got {self.timeout}")
        if self.memory_bytes < 64 << 20 or not 0 < self.output_bytes <= MAX_OUTPUT_BYTES:
            raise ValueError(f"memory_bytes must be at least 64 MiB and output_bytes at most 8 MiB, got {self}")

    def job(self, *, tested: bool = False, interactive: bool = False) -> dict[str, Any]:
        """The limits as the supervisor expects them."""
        return {
            "cpu_seconds": 0 if interactive else int(self.timeout) + 1,
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
    """Run the program `code` at the strongest available sandbox level, or at `level`.

    With `tests`, these run afterwards in their own process, where `entry_point` is a proxy of the program's function
    of that name: arguments and results are plain values (numbers, text, lists, tuples, sets, dicts), exceptions arrive
    as the built-in of the same name. Raises UserError if the level is not available.
    """
    if tests and not entry_point:
        raise ValueError("tests need an entry_point: the name of the function under test")
    limits = Limits(timeout, memory_bytes, output_bytes)
    level = choose_level(level)
    worker = acquire_worker(level)
    try:
        worker.send(limits.job(tested=bool(tests)))
        result, answer = worker.ask(code, timeout, tests, entry_point)
    except BaseException:
        worker.close()
        raise
    release_worker(worker, answer)
    return result


class PythonSession(contextlib.AbstractContextManager["PythonSession"]):
    """An interactive interpreter: variables persist between `run` calls, a final expression's value is printed.

    It survives exceptions. Exceeding a limit or exiting the process ends it: the result says so, and later ones have
    the verdict "ended". Close it, or use it as a context manager.
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
        self._worker: PooledWorker | None = acquire_worker(self.level)
        try:
            self._worker.send(self.limits.job(interactive=True))
        except BaseException:
            self._worker.close()
            raise

    @property
    def alive(self) -> bool:
        return self._worker is not None

    def run(self, code: str, timeout: float | None = None) -> ExecutionResult:
        """Run `code` in the session, for at most `timeout` seconds (default: the session's)."""
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
        """End the running call, and with it the session; callable from another thread."""
        if worker := self._worker:
            with contextlib.suppress(OSError, ValueError):
                worker.requests.close()  # the sandbox ends when its pipes close, and `run` returns

    def close(self) -> None:
        """End the session. Idempotent."""
        with self._lock:
            self._end("closed")

    def _end(self, why: str) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker, self.why_ended = None, why

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------------
# Pool of warm sandboxes

MAX_IDLE = 16
_idle: list["PooledWorker"] = []
_all: set["PooledWorker"] = set()
_lock = threading.Lock()
_hooks: list[bool] = []


class PooledWorker(Worker):
    """A worker that is registered until it is closed, so that close_all can end it."""

    def __init__(self, level: str) -> None:
        super().__init__(level)
        with _lock:
            _all.add(self)
            if not _hooks:
                _hooks.append(True)
                atexit.register(close_all)
                os.register_at_fork(after_in_child=forget_all)

    def ask(
        self, code: str, timeout: float, tests: str = "", entry_point: str = ""
    ) -> tuple[ExecutionResult, dict[str, Any]]:
        """(result, the supervisor's answer); the answer is empty if none came, and the worker then unusable."""
        if len(code) + len(tests) > MAX_CODE_CHARS:
            raise ValueError(f"code and tests have {len(code) + len(tests)} characters; the limit is {MAX_CODE_CHARS}")
        nonce, began, answer = secrets.token_hex(16), time.perf_counter(), {}
        try:
            self.send({"code": code, "tests": tests, "entry_point": entry_point, "timeout": timeout, "nonce": nonce})
            answer = self.receive(timeout + GRACE_SECONDS)
            verdict = answer["verdict"]
        except TimeoutError:
            verdict = "timeout"
        except Gone:
            verdict = "killed"  # the whole sandbox was killed from outside
        if verdict == "success" and not secrets.compare_digest(answer.get("nonce", ""), nonce):
            verdict = "crashed"
        # UTF-8, sent as Latin-1: one character per byte.
        sent = [answer.get(name, "").encode("latin-1") for name in ("stdout", "stderr")]
        stdout, stderr = (text.decode("utf-8", "replace") for text in sent)
        seconds = time.perf_counter() - began
        return ExecutionResult(verdict == "success", verdict, stdout, stderr, self.level, seconds), answer

    def close(self) -> None:
        with _lock:
            _all.discard(self)
        super().close()


def acquire_worker(level: str) -> PooledWorker:
    """An idle worker of that level, or a new one."""
    with _lock:
        worker = next((worker for worker in reversed(_idle) if worker.level == level), None)
        if worker:
            _idle.remove(worker)
    if worker:
        if worker.process.poll() is None:
            return worker
        worker.close()
    try:
        return PooledWorker(level)
    except Unavailable as error:
        raise RuntimeError(f"the {level} sandbox worked before but does not start any more: {error}") from error


def release_worker(worker: PooledWorker, answer: dict[str, Any]) -> None:
    """Return a worker to the pool if its last program left nothing behind; else close it."""
    with _lock:
        keep = bool(answer.get("clean")) and len(_idle) < MAX_IDLE
        if keep:
            _idle.append(worker)
    if not keep:
        worker.close()


def close_all() -> None:
    """Close every sandbox of this process."""
    with _lock:
        _idle.clear()
        workers = list(_all)
    for worker in workers:
        worker.close()


def forget_all() -> None:
    """After a fork, in the child: drop the parent's sandboxes without ending them."""
    global _lock
    _lock = threading.Lock()
    for worker in _all:
        worker.close_pipes()
    _all.clear()
    _idle.clear()
