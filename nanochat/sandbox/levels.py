"""The sandbox's three levels, seen from outside: a running one, and which of them this machine has.

bubblewrap: namespaces of its own for users, processes, network, IPC and mounts. landlock: for machines that permit
no namespaces, such as most rented containers. unsafe: resource limits alone, for who asks for it by name.
All but the last add a filter of system calls (nanochat/sandbox/lock.py). Linux has the first two, others none.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from typing import Any

from nanochat.common import UserError, say
from nanochat.sandbox.starts import STARTS, Unavailable, popen
from nanochat.sandbox.wire import Gone, read_frame, write_frame

SAFE_LEVELS = ("bubblewrap", "landlock")
LEVELS = (*SAFE_LEVELS, "unsafe")
START_SECONDS = 30.0
HOW = "install bubblewrap (apt install bubblewrap), or ask for the unsafe level by name"


class Worker:
    """A supervisor in its sandbox, and the two pipes to it. One job at a time."""

    def __init__(self, level: str) -> None:
        """Raises Unavailable if it does not come up."""
        start = STARTS[level]()
        self.level, self.folder, self.first_pid = level, start.folder, 0
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker
        try:
            self.process = popen(start, self.complaints)
        except OSError as error:
            self.complaints.close()
            raise Unavailable(str(error)) from error
        finally:
            for fd in start.fds:
                os.close(fd)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        try:
            self.send(start.settings)
            self.receive(START_SECONDS)
            if start.info >= 0:
                self.first_pid = json.loads(os.read(start.info, 1 << 12))["child-pid"]
        except BaseException as error:
            complaint = self.complaint()
            self.close()
            if isinstance(error, Gone | TimeoutError):
                raise Unavailable(complaint or "it did not start") from error
            raise
        finally:
            if start.info >= 0:
                os.close(start.info)

    def send(self, value: Any) -> None:
        write_frame(self.requests.fileno(), value)

    def receive(self, seconds: float) -> Any:
        return read_frame(self.answers.fileno(), time.monotonic() + seconds)

    def complaint(self) -> str:
        """The last line it wrote to its standard error."""
        self.complaints.seek(0)
        lines = self.complaints.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("nanochat.sandbox.lock.Unsupported: ") if lines else ""

    def forget(self) -> None:
        """In a fork of this process: it is the other's. Its pipes must not be held open here."""
        self.complaints.close()
        self.requests.close()
        self.answers.close()

    def close(self) -> None:
        """End it and everything in it."""
        self.forget()  # it ends when its pipes do
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            if self.first_pid:
                os.kill(self.first_pid, signal.SIGKILL)  # and with it all of its namespace
            self.process.kill()
            self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Which level

_found: dict[str, str] = {}  # reasons why a level is not there; "" if it is
_announced: set[str] = set()
_lock = threading.Lock()


def why_unavailable(level: str) -> str:
    """Why this machine does not have the level, "" if it has. Tried out once."""
    with _lock:
        if level not in _found:
            try:
                _found[level] = try_out(level)
            except Unavailable as error:
                _found[level] = str(error) or "it did not start"
        return _found[level]


def try_out(level: str) -> str:
    """Run an empty program."""
    worker = Worker(level)
    try:
        limits = {"timeout": 10, "cpu_seconds": 10, "memory_bytes": 1 << 29, "file_bytes": 0, "output_bytes": 1 << 12}
        worker.send({**limits, "tested": False, "interactive": False})
        worker.send({"code": "pass", "tests": "", "entry_point": "", "timeout": 10, "nonce": ""})
        answer = worker.receive(20)
        return "" if answer["verdict"] == "success" else answer["stderr"].strip() or answer["verdict"]
    except (Gone, TimeoutError):
        return worker.complaint() or "it ended at once"
    finally:
        worker.close()


def choose_level(level: str = "") -> str:
    """The level asked for, or the strongest safe one; said once. Raises UserError with the fix if it is not there."""
    if level and level not in LEVELS:
        raise UserError(f"there is no sandbox level {level!r}: the levels are {', '.join(LEVELS)}")
    reasons = {}
    for name in (level,) if level else SAFE_LEVELS:
        reasons[name] = why_unavailable(name)
        if not reasons[name]:
            announce(name)
            return name
    because = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"no sandbox here to run code in ({because}); {HOW}")


def announce(level: str) -> None:
    if level not in _announced:
        _announced.add(level)
        say(f"sandbox: {level}" + (", which contains nothing but by accident" if level == "unsafe" else ""))
