"""The command-line stages. Each is a dataclass of flags and main(argv), run by scripts._cli.

The hook here turns Ctrl-C into one line while Python is still importing.
"""

import os
import sys
from types import TracebackType

_usual = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook, but for Ctrl-C."""
    # Not common.debug_enabled(): after an import in here, Python would exit with 1 instead of dying of the signal.
    if issubclass(kind, KeyboardInterrupt) and os.environ.get("NANOCHAT_DEBUG", "") in ("", "0"):
        sys.stderr.write("interrupted\n")
    else:
        _usual(kind, error, trace)


sys.excepthook = _one_line
