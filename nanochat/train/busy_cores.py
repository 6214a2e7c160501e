"""Whether other programs take cores from a run on a CPU.

PyTorch's threads wait for each other hundreds of times a step. Where one of them has to wait for a core, all do: one
busy program can make a step several times slower (dev/LOG.md).
"""

import time
from pathlib import Path

from nanochat.common import openmp_sleeps

BUSY_SHARE = 0.25  # of the time that a thread waited for a core: worth a warning


def waited_for_cores(tasks: str = "/proc/self/task") -> float:
    """Seconds that the threads of this process were ready to run and no core was free, added up over the threads.

    0 on systems that do not tell; Linux does.
    """
    nanoseconds = 0
    for path in Path(tasks).glob("*/schedstat"):
        try:
            nanoseconds += int(path.read_text().split()[1])  # time on a core, time waiting for one, time slices
        except (OSError, ValueError, IndexError):
            continue  # the thread has ended
    return nanoseconds / 1e9


class CoreWatch:
    """Measures the share of the time, since it was made, that a thread of this process waited for a core."""

    def __init__(self) -> None:
        self.started, self.before = time.perf_counter(), waited_for_cores()

    def share(self) -> float:
        """Above 1 if several threads waited at the same time."""
        return (waited_for_cores() - self.before) / max(1e-9, time.perf_counter() - self.started)

    def warning(self, what: str) -> str:
        """What to tell the user about `what`, "training" for example; "" if the cores are free."""
        share = self.share()
        if share < BUSY_SHARE:
            return ""
        text = f"other programs use these cores, and {what} waits for them {min(share, 1):.0%} of the time: stop them"
        advice = "" if openmp_sleeps() else ", or start with OMP_WAIT_POLICY=passive (docs/questions.md)"
        return text + advice
