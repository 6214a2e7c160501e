"""Stop signals: catching them in a training loop, and noticing them in threads that wait for data.

Nothing here is collective; the trainer shares the signal's number between two steps, so that all ranks stop together.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, kill, a closed terminal, and what SLURM sends ahead of a time limit; those that this system has.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

# A scheduler signals the launcher and the ranks, and the launcher forwards its own: that counts as one request.
SAME_REQUEST_SECONDS = 1.0


class catch_signals:
    """While open, the first of STOP_SIGNALS calls `handler` with its number instead of killing the process; a second
    one raises KeyboardInterrupt, to stop immediately.

    Does nothing outside the main thread. SIGHUP stays ignored where nohup set it so; SIGINT is caught even where a
    shell ignores it in background jobs.
    """

    def __init__(self, handler: Callable[[int], None]) -> None:
        self.handler = handler
        self.requested_at: float | None = None  # when the first signal came
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)
            caught = [s for s in STOP_SIGNALS if s != hangup or signal.getsignal(s) is not signal.SIG_IGN]
            self.before = {s: signal.signal(s, self._on_signal) for s in caught}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested_at is None:
            self.requested_at = now
            self.handler(signum)
        elif now - self.requested_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


class StopRequested(Exception):
    """Raised in a thread that must stop waiting for data: a closing Prefetcher's, or one whose stop_when() is true."""


_this_thread = threading.local()


@contextmanager
def stop_when(requested: Callable[[], bool]) -> Iterator[None]:
    """Inside, raise_if_stop_requested() in this thread raises StopRequested once `requested()` is true."""
    _this_thread.requested = requested
    try:
        yield
    finally:
        del _this_thread.requested


def raise_if_stop_requested() -> None:
    """Raise StopRequested if this thread is inside stop_when() and its condition holds. For loops that wait."""
    requested = getattr(_this_thread, "requested", None)
    if requested is not None and requested():
        raise StopRequested("stop requested")
