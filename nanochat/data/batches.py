"""Batches, the interface of every loader, and the thread that makes batches ahead of need."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.distributed.signals import raise_if_stop_requested, stop_when

Item = TypeVar("Item")
State = TypeVar("State")


@dataclass
class Batch:
    """One rank's rows of a global batch, on the CPU."""

    inputs: torch.Tensor  # (N, T) int64
    targets: torch.Tensor  # (N, T) int64, -1 = no target
    weights: torch.Tensor | None = None  # (N, T) float32, per target
    origin: str = ""  # which data the rows came from, for error messages
    read_before: int = 0  # rows with text of later epochs than the first only


class Loader(Protocol):
    """The trainer's source of batches. A loader that reads no files inherits the defaults about waiting and shards."""

    sequence_len: int  # tokens of the longest row

    def next_batch(self) -> Batch:
        """This rank's rows of the next step. Raises StopIteration at the end of the data, on all ranks after the
        same step."""
        ...

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the next batch. True if next_batch() will return or raise at once."""
        return True

    @property
    def failure(self) -> BaseException | None:
        """The error next_batch() is going to raise, once wait() has returned True; the end of the data is none."""
        return None

    @property
    def skips_bad_shards(self) -> bool:
        """True if bad shards may be skipped."""
        return False

    @property
    def skipped(self) -> dict[str, str]:
        """Skipped shards, and why each is bad."""
        return {}

    def skip(self, shards: dict[str, str]) -> None:
        """Skip these shards too (name -> reason), from the next batch on. Call on all ranks after the same step."""
        assert not shards, "this loader reads no shards"

    def state_dict(self) -> dict[str, np.ndarray]:
        """The position after the last batch handed out, as arrays for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Continue from a saved position, with any world size. Raises UserError if it is of other data or sizes."""
        ...

    @property
    def advice(self) -> str:
        """What helps where training waits for this loader."""
        return "give each rank more CPU cores"

    def stats(self) -> dict[str, float]:
        """Counters up to the last batch handed out."""
        ...

    def close(self) -> None:
        """Stop reading ahead. The state stays readable, and next_batch() goes on from it."""
        return


def saved_numbers(state: dict[str, np.ndarray], name: str, shape: tuple[int, ...], below: int = 2**40) -> np.ndarray:
    """An array of a saved state, which must hold integers from 0 to `below`; -1 in `shape` is any length.

    Raises UserError if there is none, or another.
    """
    array = np.asarray(state.get(name))
    fits = len(array.shape) == len(shape) and all(want in (-1, size) for want, size in zip(shape, array.shape))
    if not fits or array.dtype.kind not in "iu" or not np.all((array >= 0) & (array < below)):
        raise UserError(f"the saved position in the data is damaged ({name}); choose another step")
    return array


class Packer(Protocol[State]):
    """Makes one step after another, on one thread; `restore` goes back to a state it has returned."""

    def state(self) -> State: ...
    def restore(self, state: State) -> None: ...
    def next_step(self) -> tuple[Batch, State]:
        """The next batch and the state after it. Raises StopIteration at the end."""
        ...


class PrefetchingLoader(Loader, Generic[State]):
    """A loader whose packer runs on a thread, up to `depth` steps ahead. The thread starts with the first batch."""

    def __init__(self, packer: Packer[State], depth: int) -> None:
        self._packer, self._depth = packer, depth
        self._state = packer.state()  # after the last batch handed out
        self._prefetcher: Prefetcher[tuple[Batch, State]] | None = None

    def next_batch(self) -> Batch:
        batch, self._state = self._prefetch().get()
        return batch

    def wait(self, timeout: float) -> bool:
        return self._prefetch().wait(timeout)

    @property
    def failure(self) -> BaseException | None:
        error = self._prefetcher.failure if self._prefetcher else None
        return None if isinstance(error, StopIteration) else error

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
            self._packer.restore(self._state)

    def _prefetch(self) -> "Prefetcher[tuple[Batch, State]]":
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._packer.next_step, self._depth)
        return self._prefetcher

    def _restore(self, state: State) -> None:
        self.close()
        self._packer.restore(state)
        self._state = self._packer.state()


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Batches of indices of sequences of similar length: max_tokens with padding, but at least one sequence."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def seeded_rng(purpose: int, seed: int, first: int = 0, second: int = 0) -> np.random.Generator:
    """An independent generator for every (purpose, seed, first, second).

    numpy pads short entropy with zeros and splits large numbers into words, so tuples of different lengths can
    collide: hence always the same number of words. The sign is one of them: Python's random.seed(-1) equals
    random.seed(1), which has mixed training and test data before.
    """
    size = abs(seed)
    assert size < 2**64 and 0 <= first < 2**32 and 0 <= second < 2**32
    words = (purpose, int(seed < 0), size & 0xFFFFFFFF, size >> 32, first, second)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


class Prefetcher(Generic[Item]):
    """Calls `produce` on a thread, up to `depth` results ahead of get().

    `produce` must not refer to the owner of the prefetcher: then an unreferenced owner is collected and the thread
    ends. It also ends with close(), when `produce` raises, and at interpreter exit.
    """

    def __init__(self, produce: Callable[[], Item], depth: int) -> None:
        self._todo: SimpleQueue[Future[Item]] = SimpleQueue()
        self._results: deque[Future[Item]] = deque()  # the same, until get() has returned them
        for _ in range(depth):
            self._request_one()
        stop = threading.Event()
        thread = threading.Thread(target=_work, args=(produce, self._todo, stop), name="nanochat-prefetch", daemon=True)
        self._end = weakref.finalize(self, _end_thread, thread, self._todo, stop)  # also runs at interpreter exit
        thread.start()

    def _request_one(self) -> None:
        future: Future[Item] = Future()
        self._results.append(future)
        self._todo.put(future)

    def get(self) -> Item:
        """The next result, in order. Raises the error of `produce`, then and every time after."""
        while not self.wait(0.2):
            raise_if_stop_requested()
        result = self._results[0].result()  # one that failed stays the first
        self._results.popleft()
        self._request_one()
        return result

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the next result. True if get() would not wait."""
        return bool(wait([self._results[0]], timeout).done)

    @property
    def failure(self) -> BaseException | None:
        """The error get() will raise, if it is known."""
        return self._results[0].exception() if self._results[0].done() else None

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._end()


def _work(produce: Callable[[], Any], todo: "SimpleQueue[Future[Any]]", stop: threading.Event) -> None:
    with stop_when(stop.is_set):
        while (future := todo.get()) and not stop.is_set():
            try:
                future.set_result(produce())
            except BaseException as error:
                future.set_exception(error)
                return


def _end_thread(thread: threading.Thread, todo: "SimpleQueue[Future[Any]]", stop: threading.Event) -> None:
    stop.set()
    todo.put(Future())  # wakes the thread
    if thread is not threading.current_thread():  # the garbage collector may run on the thread itself
        thread.join()
