"""What became of a run's saves: which step is safe on the disk, and which one is being written meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from nanochat.runtime import Runtime

PATIENCE_SECONDS = 5.0  # that a save waits for the one before; a disk that slow costs saves, not training time


class SaveFailed(OSError):
    """The last save of a run, or the one after a signal, did not succeed."""


@dataclass
class Saves:
    """Begins the saves of a run, at most one at a time, and hears how they ended. All processes call it alike.

    A failed periodic save is loud, at the next save, and training goes on; a failed final one raises SaveFailed.
    """

    runtime: Runtime
    last_step: int | None = None  # the newest that is known to be complete
    writing: tuple[int, Future[Any]] | None = None  # the step that is being written

    def ready_for(self, step: int, final: bool) -> bool:
        """Whether `step` is to be saved now: not if it is already, nor while an earlier one is still being written.

        A final save waits for the one before it, however long that takes.
        """
        if not self.settle(patience=None if final else PATIENCE_SECONDS):
            still = self.writing and self.writing[0]
            self.runtime.warn0(f"step {step} is not saved: step {still} is still being written")
            return False
        return self.last_step != step

    def begin(self, step: int, save: Callable[[], Any], final: bool) -> None:
        """Call `save`, which raises OSError if it fails. If it returns a future, that is the write, which may go on in
        the background; a final one is waited for."""
        try:
            write = save()
        except OSError as error:
            return self._failed(step, error, final)
        if isinstance(write, Future):
            self.writing = step, write
            if final:
                self.settle(None, final=True)
        else:
            self.last_step = step

    def settle(self, patience: float | None, final: bool = False) -> bool:
        """Wait so many seconds for the write under way and hear how it ended. False if it has not, on some process."""
        if self.writing is None:
            return True
        step, write = self.writing
        wait([write], patience)
        error = write.exception() if write.done() else None
        if self.runtime.all_reduce_max(0 if write.done() else 1, "waiting for a save"):
            return False
        self.writing = None
        if isinstance(error, OSError):
            self._failed(step, error, final)
        elif error:
            raise error
        else:
            self.last_step = step
        return True

    def _failed(self, step: int, error: OSError, final: bool) -> None:
        if final:
            raise SaveFailed(str(error)) from error
        self.runtime.warn0(
            f"could not save step {step}: {error}; training goes on, the last good checkpoint is step {self.last_step}"
        )
