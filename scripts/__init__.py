"""The command-line stages. Each is a dataclass of flags and main(argv); scripts._cli is their one front door.

Ctrl-C in the first seconds comes before that door is open: Python still imports.
"""

import sys
from types import TracebackType

_usual = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook, but for Ctrl-C."""
    from nanochat.common import debug_enabled  # here: nothing may be imported before the hook stands

    if issubclass(kind, KeyboardInterrupt) and not debug_enabled():
        sys.stderr.write("interrupted\n")
    else:
        _usual(kind, error, trace)


sys.excepthook = _one_line
