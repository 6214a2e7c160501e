"""Saving in the background: one object runs the writes of a run and knows which step is safe.

A save has three parts, each in one place:

- `train/snapshot.py` copies the training state to host memory, while training waits;
- `checkpoint_manager.save_checkpoint` writes the copy, all ranks together;
- `AsyncSaver`, here, runs that write in its thread while training goes on, and records how it ended.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from nanochat.runtime import Runtime

MAX_WAIT_SECONDS = 5.0  # for the previous write, before a periodic save is dropped: a slow disk costs saves, not time


class SaveFailed(OSError):
    """A save that the run cannot do without did not succeed: its first, or its final one, which comes after the last
    step, a stop signal or an error."""


class AsyncSaver:
    """The save state of a run: the newest complete step, and the step being written, of which there is at most one.

    The methods are collective: every rank must call them, in the same order. A failed periodic save is reported at the
    next save, and training goes on; a failed final one raises SaveFailed, and so does the first: the next would hardly
    succeed, and meanwhile nothing is safe.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.last_step: int | None = None  # the newest that is known to be complete
        self.writing: tuple[int, Future[Any]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")

    def ready_for(self, step: int, final: bool) -> bool:
        """Whether `step` should be saved now: it is not saved yet, and the previous write has ended.

        Collective: every rank must call it. A final save waits for the previous write, however long that takes.
        """
        if not self.settle(None if final else MAX_WAIT_SECONDS):
            writing = self.writing and self.writing[0]
            self.runtime.warn0(f"step {step} is not saved: step {writing} is still being written")
            return False
        return self.last_step != step

    def start(self, step: int, write: Callable[[], Any], final: bool) -> None:
        """Run `write`, which raises OSError if it fails, in the background; wait for it if it is the final one.

        Collective: every rank must call it, after ready_for returned True.
        """
        self.writing = step, self._thread.submit(write)
        if final:
            self.settle(None, final=True)

    def settle(self, timeout: float | None, final: bool = False) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for the write under way and record how it ended.

        Returns False if some rank is still writing. Collective: every rank must call it.
        """
        if self.writing is None:
            return True
        step, write = self.writing
        wait([write], timeout)
        error = write.exception() if write.done() else None
        if self.runtime.all_reduce_max(0 if write.done() else 1, "waiting for a save"):
            return False
        self.writing = None
        if error is None:
            self.last_step = step
        elif not isinstance(error, OSError):
            raise error
        elif final or self.last_step is None:
            raise SaveFailed(f"could not save step {step}: {error}") from error
        else:
            self.runtime.warn0(
                f"could not save step {step}: {error}; training goes on, the last good checkpoint is step "
                f"{self.last_step}"
            )
        return True

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown()
