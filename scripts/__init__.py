"""The command-line stages. Each is a dataclass of flags and main(argv); scripts._cli is their one front door.

Ctrl-C in the first seconds comes before that door is open: Python still imports.
"""

import os
import sys
from types import TracebackType

_usual = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook, but for Ctrl-C."""
    # As common.debug_enabled does; an import in here would make Python forget that it was a signal, and exit with 1.
    if issubclass(kind, KeyboardInterrupt) and os.environ.get("NANOCHAT_DEBUG", "") in ("", "0"):
        sys.stderr.write("interrupted\n")
    else:
        _usual(kind, error, trace)


sys.excepthook = _one_line
