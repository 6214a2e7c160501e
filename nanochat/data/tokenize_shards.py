"""Tokenise shards into token files in worker processes, one shard at a time each."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Any

from nanochat.common import BadShard
from nanochat.data.pretokenized import write_token_file
from nanochat.data.shards import Shard

Result = int | str  # the number of tokens, or why the shard is bad


class Stopped(Exception):
    """The pool is closing: a worker abandons its shard."""


def tokenize_shards(paths: dict[Shard, Path], tokenizer: Any, workers: int) -> Iterator[tuple[Shard, Result]]:
    """Write the token file of each shard; yields each with its result as it is done.

    One worker is this process. Closing the iterator abandons the shards under way, of which no file is left. Raises
    MemoryError if a worker was killed.
    """
    if workers == 1:
        for shard, path in paths.items():
            yield shard, _tokenize(shard, tokenizer, path)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer, stop))
    try:
        waiting: dict[Future[Result], Shard] = {
            pool.submit(_tokenize_in_worker, shard, path): shard for shard, path in paths.items()
        }
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise MemoryError("a worker was killed; the same command continues from here") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _tokenize(shard: Shard, tokenizer: Any, path: Path, check: Callable[[], None] = lambda: None) -> Result:
    try:
        return write_token_file(shard, tokenizer, path, check)
    except BadShard as error:
        return str(error)


_worker: dict[str, Any] = {}  # in a worker process: its tokenizer and stop event


def _start_worker(tokenizer: Any, stop: Event) -> None:
    """Leave Ctrl-C to the parent, and exit when the parent is gone."""
    signal(SIGINT, SIG_IGN)
    _worker.update(tokenizer=tokenizer, stop=stop)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _tokenize_in_worker(shard: Shard, path: Path) -> Result:
    def check() -> None:
        if _worker["stop"].is_set():
            raise Stopped

    return _tokenize(shard, _worker["tokenizer"], path, check)
