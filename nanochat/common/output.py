"""Standard output of long programs: a line about progress, and output that may fail without ending the work."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanochat.common import on_terminal, say, warn

LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0  # between lines about progress, on a terminal and elsewhere


class ProgressLine:
    """A line about progress, rewritten in place on a terminal and printed now and then elsewhere."""

    def __init__(self, line: Callable[[], str], at_once: bool = False) -> None:
        self.line, self.live, self.shown = line, on_terminal(), False
        self.shown_at = -PLAIN_SECONDS if at_once else time.monotonic()

    def show(self, last: bool = False) -> None:
        """Show the line if it is time to, or the last time."""
        if last or time.monotonic() - self.shown_at > (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self.shown_at, self.shown = time.monotonic(), True
            say(f"\r\x1b[K{self.line()}" if self.live else self.line(), end="" if self.live and not last else "\n")

    def close(self) -> None:
        """Show the line a last time if it was shown at all."""
        if self.shown:
            self.show(last=True)


class OutputFile(io.FileIO):
    """A file of output whose failure ends the output, not the program.

    That is a pipe whose reader left (`| head`), a log on a full disk, or a terminal that is gone: all further output is
    discarded. A warning says so, except for a pipe.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                warn(f"output is lost from here on ({error.strerror}); the program continues")
            return len(data)


@contextlib.contextmanager
def failsafe_output() -> Iterator[None]:
    """Replace standard output and error by streams on OutputFile, so that no print anywhere can end the program."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_failsafe(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _failsafe(stream: Any) -> Any:
    """The same stream, on an OutputFile; a stream without a file, as in tests, as it is; a closed one discards."""
    if stream is None:
        return open(os.devnull, "w")  # open to the end of the program
    try:
        stream.flush()
        file = OutputFile(stream.fileno(), "w", closefd=False)
        at_once = stream.write_through  # python -u, PYTHONUNBUFFERED: nothing may wait in a buffer
        binary: Any = file if at_once else io.BufferedWriter(file)
        return io.TextIOWrapper(binary, stream.encoding, stream.errors, None, stream.line_buffering, at_once)
    except (AttributeError, OSError, ValueError):
        return stream
