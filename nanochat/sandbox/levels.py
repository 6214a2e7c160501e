"""The sandbox's three levels: the worker process of each, and which of them this machine has.

bubblewrap: separate namespaces for users, processes, network, IPC and mounts. landlock: for machines that do not allow
namespaces, such as most rented containers. unsafe: resource limits only, never chosen automatically. The first two
add a system call filter (nanochat/sandbox/lock.py) and need Linux.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any

from nanochat.common import UserError, say
from nanochat.sandbox.starts import STARTS, Unavailable, popen
from nanochat.sandbox.wire import Gone, read_frame, write_frame

SAFE_LEVELS = ("bubblewrap", "landlock")
LEVELS = (*SAFE_LEVELS, "unsafe")
START_TIMEOUT_SECONDS = 30.0
INSTALL_HINT = "install bubblewrap (apt install bubblewrap); chat_eval alone also takes --sandbox=unsafe"


class Worker:
    """A supervisor process in its sandbox, with a pipe to it and one back. Runs one job at a time."""

    def __init__(self, level: str) -> None:
        """Start it. Raises Unavailable if it does not start."""
        start = STARTS[level]()
        self.level, self.folder, self.first_pid = level, start.folder, 0
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the worker lives
        try:
            self.process = popen(start, self.stderr)
        except OSError as error:
            self.stderr.close()
            raise Unavailable(str(error)) from error
        finally:
            for fd in start.fds:
                os.close(fd)
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout
        try:
            self.send(start.settings)
            self.receive(START_TIMEOUT_SECONDS)
            if start.info >= 0:
                self.first_pid = json.loads(os.read(start.info, 1 << 12))["child-pid"]
        except BaseException as error:
            reason = self.last_error()
            self.close()
            if isinstance(error, Gone | TimeoutError):
                raise Unavailable(reason or "it did not start") from error
            raise
        finally:
            if start.info >= 0:
                os.close(start.info)

    def send(self, value: Any) -> None:
        write_frame(self.requests.fileno(), value)

    def receive(self, seconds: float) -> Any:
        return read_frame(self.answers.fileno(), time.monotonic() + seconds)

    def last_error(self) -> str:
        """The last line of its standard error."""
        self.stderr.seek(0)
        lines = self.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].removeprefix("nanochat.sandbox.lock.Unsupported: ") if lines else ""

    def close_pipes(self) -> None:
        """Close this process's ends; after a fork, the child must not hold them open."""
        self.stderr.close()
        self.requests.close()
        self.answers.close()

    def close(self) -> None:
        """End the supervisor and everything it started."""
        self.close_pipes()  # the supervisor exits when its pipes close
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            if self.first_pid:
                os.kill(self.first_pid, signal.SIGKILL)  # ends every process in the namespace
            self.process.kill()
            self.process.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Choice of the level


@functools.cache
def why_unavailable(level: str) -> str:
    """Reason why the level does not work on this machine, "" if it does: an empty program is run, once per process."""
    try:
        worker = Worker(level)
    except Unavailable as error:
        return str(error) or "it did not start"
    try:
        limits = {"timeout": 10, "cpu_seconds": 10, "memory_bytes": 1 << 29, "file_bytes": 0, "output_bytes": 1 << 12}
        worker.send({**limits, "tested": False, "interactive": False})
        worker.send({"code": "pass", "tests": "", "entry_point": "", "timeout": 10, "nonce": ""})
        answer = worker.receive(20)
        return "" if answer["verdict"] == "success" else answer["stderr"].strip() or answer["verdict"]
    except (Gone, TimeoutError):
        return worker.last_error() or "it exited at once"
    finally:
        worker.close()


def choose_level(level: str = "") -> str:
    """The requested level, or the strongest safe one; printed once. Raises UserError with the fix if unavailable."""
    if level and level not in LEVELS:
        raise UserError(f"unknown sandbox level {level!r}: choose one of {', '.join(LEVELS)}")
    reasons = {}
    for name in (level,) if level else SAFE_LEVELS:
        reasons[name] = why_unavailable(name)
        if not reasons[name]:
            announce(name)
            return name
    because = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"no sandbox is available to run code in ({because}); {INSTALL_HINT}")


@functools.cache
def announce(level: str) -> None:
    """Print the level in use, once."""
    say(f"sandbox: {level}" + (", without protection against malicious code" if level == "unsafe" else ""))
