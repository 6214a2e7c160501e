"""The supervisor's view of a program's process and of its output. Standard library only."""

import os
import signal
import socket
from dataclasses import dataclass, field

from nanochat.sandbox.wire import Gone, parse_frame

MAX_REPORT_BYTES = 4096
ESCAPED_STATUS = 71  # exit code after an exception that the process could not report
ENDS = {"end": "success", "error": "error", "memory": "out_of_memory", "exit": "early_exit", "gone": "crashed"}
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGSYS, signal.SIGTRAP}


@dataclass
class Child:
    """A process that runs a program or its tests."""

    pid: int
    report: socket.socket
    listener: int = -1  # where it asks for threads (lock.ask_for_threads); -1: it need not
    received: bytearray = field(default_factory=bytearray)
    ended: str = ""  # how it reported to have ended: a key of ENDS
    status: int | None = None  # exit code, or minus the signal; None while it runs

    def poll(self) -> bool:
        """Whether the process has exited; reaps it."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def listen(self) -> bool:
        """Read its report; False at the end of the channel, or if the data is invalid or too long."""
        try:
            piece = self.report.recv(MAX_REPORT_BYTES)
            self.received += piece
            message = parse_frame(bytes(self.received)) if piece else None
        except BlockingIOError:
            return True
        except (OSError, Gone):
            return False
        if isinstance(message, dict) and not self.ended:
            self.ended = str(message.get("ended"))
        return bool(piece) and len(self.received) < MAX_REPORT_BYTES

    def kill(self) -> None:
        """Kill and reap it if it still runs."""
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.report.close()


class Output:
    """Channels for stdout and stderr of the programs. Output beyond the cap is dropped.

    Sockets, because a pipe could be opened once more for reading, through /proc/self/fd, which Landlock allows.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.texts: dict[int, bytearray] = {}
        self.write_ends: list[int] = []
        for _ in ("stdout", "stderr"):
            own_end, child_end = socket.socketpair()
            own_end.setblocking(False)
            own_end.shutdown(socket.SHUT_WR)  # a program that reads from its output finds the end
            self.texts[own_end.detach()] = bytearray()
            self.write_ends.append(child_end.detach())

    @property
    def full(self) -> bool:
        return sum(map(len, self.texts.values())) > self.cap

    def read(self, fd: int) -> bool:
        """Read what is available; False at the end."""
        try:
            while not self.full:
                piece = os.read(fd, 1 << 16)
                self.texts[fd] += piece
                if not piece:
                    return False
        except BlockingIOError:
            pass
        return True

    def take(self) -> list[str]:
        """[stdout, stderr] as Latin-1, one character per byte, truncated at the cap; clears them."""
        for fd in self.texts:
            self.read(fd)
        left, texts = self.cap, []
        for text in self.texts.values():
            texts.append(bytes(text[:left]).decode("latin-1"))
            left -= min(left, len(text))
            text.clear()
        return texts


def verdict_of(child: Child) -> str:
    """The verdict from the process's exit status and its report."""
    status = child.status or 0
    if status < 0:
        return "timeout" if -status == signal.SIGXCPU else "crashed" if -status in CRASHES else "killed"
    verdict = ENDS.get(child.ended, "error" if status == ESCAPED_STATUS else "early_exit")
    return "early_exit" if verdict == "success" and status != 0 else verdict
