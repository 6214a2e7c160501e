"""Being asked to stop: the signals of a terminal, a person, a cluster's scheduler; and hearing of it while waiting."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Where the system has them: Ctrl-C, kill, a terminal that closes, and what SLURM sends ahead of a time limit.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

# A scheduler signals launcher and processes alike, and the launcher hands it on: that is one request, not two.
SAME_REQUEST_SECONDS = 1.0


class catch_signals:
    """While open, the first of STOP_SIGNALS to come calls `handler` with its number instead of killing the process; a
    second one raises KeyboardInterrupt, to leave now.

    Main thread only. SIGHUP stays ignored where nohup has it so; SIGINT is heard even where a shell has it ignored
    for what it starts in the background.
    """

    def __init__(self, handler: Callable[[int], None]) -> None:
        self.handler = handler
        self.asked: float | None = None  # when the first one came
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            meant = getattr(signal, "SIGHUP", None)  # to be ignored, by nohup
            heard = [s for s in STOP_SIGNALS if s != meant or signal.getsignal(s) is not signal.SIG_IGN]
            self.before = {s: signal.signal(s, self._hear) for s in heard}

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            self.handler(signum)
        elif now - self.asked > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


class StopRequested(Exception):
    """A thread stops waiting: a Prefetcher's, whose results nobody wants any more, or one inside stop_when()."""


_this_thread = threading.local()


@contextmanager
def stop_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Inside, this thread's waiting for data ends with StopRequested once `asked` says so."""
    _this_thread.asked = asked
    try:
        yield
    finally:
        del _this_thread.asked


def raise_if_stop_requested() -> None:
    """For what may wait long, now and then: raises StopRequested if this thread is stop_when, and was asked."""
    asked = getattr(_this_thread, "asked", None)
    if asked is not None and asked():
        raise StopRequested("asked to stop")
