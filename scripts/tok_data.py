"""Tokenise a corpus before training: `python -m scripts.tok_data --data=fineweb-edu --workers=8`.

Optional: base_train finds the token files by itself, and makes the same batches as from the text.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout

from nanochat.common import BadShard, UserError, delete_leftovers, format_count, format_seconds, get_base_dir, say
from nanochat.common.output import ProgressLine
from nanochat.common.ranges import Range
from nanochat.data.corpus import SPLITS
from nanochat.data.pretokenized import is_valid, token_path
from nanochat.data.shards import ShardCorpus
from nanochat.data.tokenize_shards import tokenize_shards
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.train.config import DataConfig
from scripts import _cli


@dataclass
class Config(DataConfig):
    """Tokenise a corpus before training, many shards at a time. If interrupted, the same command continues."""

    workers: Annotated[int, Range(1, unset=-1)] = -1
    """Processes; -1: one for each core. Each works on a shard of its own."""


@dataclass
class Progress:
    """Shards and tokens done."""

    total: int
    todo: int  # shards left
    tokens: int = 0
    done: int = 0  # shards, in this session
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """12/40 shards | 1.2G tokens | 2.1M tok/s | 3m10s left"""
        return (
            f"{self.total - self.todo}/{self.total} shards | {format_count(self.tokens)} tokens | "
            f"{format_count(self.tokens / self.seconds)} tok/s | "
            f"{format_seconds(self.seconds / max(self.done, 1) * self.todo)} left"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Tokenise the shards that have no token file yet."""
    config, tokenizer = _cli.parse(Config, argv), get_tokenizer()
    corpus = config.open_corpus(get_base_dir())
    if not isinstance(corpus, ShardCorpus) or corpus.token_folder is None:
        raise UserError(f"--data {config.data}: it is not read from files, so it is tokenised while training")
    folder = corpus.token_folder / tokenizer.hash[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            delete_leftovers(folder.glob(".*.tmp"))
            tokenize_into(folder, corpus, tokenizer, config.workers)
    except Timeout:
        raise UserError(f"another process is tokenising into {folder}; wait for it") from None
    return 0


def tokenize_into(folder: Path, corpus: ShardCorpus, tokenizer: RustBPETokenizer, workers: int) -> None:
    """Tokenise into the folder, which is locked."""
    bad = corpus.bad_shards
    unique = {str(shard.path): shard for split in SPLITS for shard in corpus.shards[split] if shard.path not in bad}
    paths = {shard: token_path(folder.parent, shard, tokenizer) for shard in unique.values()}
    todo = {shard: path for shard, path in paths.items() if not is_valid(path, shard, tokenizer)}
    workers = min(workers if workers > 0 else os.cpu_count() or 1, max(1, len(todo)))
    say(
        f"tokenising {len(todo)} of {len(paths)} shards of {corpus.name} with {workers} processes; if interrupted, the "
        "same command continues"
    )
    progress = Progress(len(paths), len(todo))
    line = ProgressLine(progress.line)
    for shard, result in tokenize_shards(todo, tokenizer, workers):
        progress.todo -= 1
        if isinstance(result, int):
            progress.done += 1
            progress.tokens += result
            line.show()
        else:
            bad.skip(BadShard(result, shard.path))
    line.show(last=True)
    size = sum(path.stat().st_size for path in paths.values() if path.exists())
    say(
        f"{len(paths) - len(todo) + progress.done} shards are tokenised ({size / 1e6:,.0f} MB in {folder}): "
        f"{format_count(progress.tokens)} tokens in {format_seconds(progress.seconds)}, "
        f"{format_count(progress.tokens / progress.seconds)} a second; base_train finds them by itself"
    )


if __name__ == "__main__":
    _cli.run(main)
