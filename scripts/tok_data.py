"""Tokenise a corpus before training: `python -m scripts.tok_data --data=fineweb-edu --workers=8`.

Optional: base_train finds the tokens by itself, and makes the same batches as from the text.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Annotated, Any

from filelock import FileLock, Timeout

from nanochat.common import BadShard, UserError, format_count, format_seconds, get_base_dir, on_terminal, say
from nanochat.data.corpus import THE_FLAG, Corpus, Part, tell_skipped
from nanochat.data.pretokenized import token_path, whole, write_tokens
from nanochat.dataset import resolve_corpus
from nanochat.ranges import Range
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts import _cli

PLAIN_LINE_SECONDS = 10.0


@dataclass
class Config:
    """Tokenise a corpus before training, many shards at a time. Interrupted, the same command goes on."""

    data: str = ""
    """As for base_train."""
    skip_bad_shards: bool = False
    """Go on without files of the data that are missing or damaged, and say which."""
    workers: Annotated[int, Range(1, unset=-1)] = -1
    """Processes; -1: one for each core. Each works on a shard of its own."""


@dataclass
class Progress:
    """What is done, and a line about it now and then."""

    total: int
    already: int
    shards: int = 0
    tokens: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)

    def done(self, tokens: int) -> None:
        self.shards += 1
        self.tokens += tokens
        if on_terminal():
            say("\r\x1b[K" + self.line(), end="")
        elif time.monotonic() - self.shown > PLAIN_LINE_SECONDS:
            self.shown = time.monotonic()
            say(self.line())

    def line(self) -> str:
        """12/40 shards | 1.2G tokens | 2.1M tok/s | 3m10s left"""
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = self.total - self.already - self.shards - len(self.skipped)
        return (
            f"{self.already + self.shards}/{self.total} shards | {format_count(self.tokens)} tokens | "
            f"{format_count(self.tokens / seconds)} tok/s | "
            f"{format_seconds(seconds / max(self.shards, 1) * left)} left"
        )


def shards_of(corpus: Corpus) -> list[Part]:
    """Each shard once, without those that are left out."""
    parts = {str(part.path): part for split in ("train", "val") for part in corpus.parts[split]}
    return [part for path, part in parts.items() if path not in corpus.skipped]


def tokenise(config: Config) -> int:
    """Tokenise what is not tokenised yet. Returns the exit code."""
    base_dir = get_base_dir()
    tokenizer = get_tokenizer()
    corpus = resolve_corpus(config.data, base_dir, skip_bad=config.skip_bad_shards)
    assert corpus.token_folder is not None
    folder = corpus.token_folder / tokenizer.hash[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for leftover in folder.glob(".*.tmp"):  # of a command that was killed
                leftover.unlink()
            return tokenise_in(folder, corpus, tokenizer, config)
    except Timeout:
        raise UserError(f"another process is tokenising into {folder}; wait for it") from None


def tokenise_in(folder: Path, corpus: Corpus, tokenizer: RustBPETokenizer, config: Config) -> int:
    """The same, with the folder ours alone."""
    assert corpus.token_folder is not None
    parts = shards_of(corpus)
    paths = {part: token_path(corpus.token_folder, part, tokenizer) for part in parts}
    todo = [part for part in parts if not (paths[part].exists() and whole(paths[part], part, tokenizer))]
    workers = min(config.workers if config.workers > 0 else os.cpu_count() or 1, max(1, len(todo)))
    say(
        f"tokenising {len(todo)} of {len(parts)} shards of {corpus.name} with {workers} processes; interrupted, the "
        "same command goes on"
    )
    progress = Progress(len(parts), len(parts) - len(todo))
    for part, result in results(todo, paths, tokenizer, workers):
        if isinstance(result, int):
            progress.done(result)
        elif config.skip_bad_shards:
            progress.skipped[str(part.path)] = result
            tell_skipped(result, len(progress.skipped))
        else:
            raise BadShard(result + THE_FLAG, part.path)
    seconds = time.monotonic() - progress.started
    size = sum(path.stat().st_size for path in paths.values() if path.exists())
    if on_terminal():
        say("")
    say(
        f"{progress.already + progress.shards} shards are tokenised ({size / 1e6:,.0f} MB in {folder}): "
        f"{format_count(progress.tokens)} tokens in {format_seconds(seconds)}, "
        f"{format_count(progress.tokens / max(seconds, 1e-9))} a second; base_train finds them by itself"
    )
    return 0


def results(todo: list[Part], paths: dict[Part, Path], tokenizer: RustBPETokenizer, workers: int) -> Any:
    """Yields (shard, its tokens or why it is bad) as they come. In this process, if one is enough."""
    if workers == 1:
        for part in todo:
            yield part, attempt(part, tokenizer, paths[part], None)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=begin_worker, initargs=(tokenizer, stop))
    try:
        waiting: dict[Future[Any], Part] = {pool.submit(work, part, paths[part]): part for part in todo}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise WorkerLost("a worker was killed (is there enough memory?); the same command goes on from here") from error
    finally:
        stop.set()  # so that the shards under way are given up
        pool.shutdown(cancel_futures=True)


class WorkerLost(RuntimeError):
    """A worker process ended before its work did."""


class Stopped(Exception):
    """Nobody wants the rest."""


def attempt(part: Part, tokenizer: RustBPETokenizer, path: Path, stop: Event | None) -> int | str:
    """Tokenise one shard: the number of tokens, or why it is bad."""

    def between() -> None:
        if stop is not None and stop.is_set():
            raise Stopped

    try:
        return write_tokens(part, tokenizer, path, between)
    except BadShard as error:
        return str(error)


def begin_worker(tokenizer: RustBPETokenizer, stop: Event) -> None:
    """Ctrl-C is for the parent to hear; and when that is gone, so is the worker."""
    signal(SIGINT, SIG_IGN)
    WORKER.update(tokenizer=tokenizer, stop=stop)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


WORKER: dict[str, Any] = {}  # what a worker process was begun with


def work(part: Part, path: Path) -> int | str:
    """attempt(), in a worker."""
    return attempt(part, WORKER["tokenizer"], path, WORKER["stop"])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, tokenise."""
    try:
        return tokenise(_cli.parse(Config, argv))
    except WorkerLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    _cli.run(main)
