"""Train the tokenizer: `python -m scripts.tok_train`. Writes tokenizer/tokenizer.json in the base folder."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from nanochat.common import format_count, format_seconds, get_base_dir
from nanochat.common.output import ProgressLine
from nanochat.common.ranges import Range
from nanochat.data.corpus import Document
from nanochat.report import record_stage
from nanochat.tokenizer import MIN_VOCAB_SIZE, RustBPETokenizer
from nanochat.train.config import DataConfig
from scripts import _cli

SAMPLE_CHARS = 1_000_000  # of validation text, to measure compression on


@dataclass
class Config(DataConfig):
    """Train a byte-pair tokenizer on raw text."""

    max_chars: Annotated[int, Range(1)] = 2_000_000_000
    """Stop reading after this many characters."""
    doc_cap: Annotated[int, Range(1)] = 10_000
    """Read at most this many characters of each document, so that no long one dominates."""
    vocab_size: Annotated[int, Range(MIN_VOCAB_SIZE)] = 32_768
    """Number of tokens, special tokens included."""


class TrainingText:
    """The texts to train on, up to the configured limits; counts documents and characters."""

    def __init__(self, documents: Iterable[Document], config: Config):
        self.documents, self.config = documents, config
        self.num_documents = self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        progress = ProgressLine(self.line)
        for document in self.documents:
            text = document.text[: min(self.config.doc_cap, self.config.max_chars - self.num_chars)]
            self.num_documents += 1
            self.num_chars += len(text)
            progress.show()
            yield text
            if self.num_chars >= self.config.max_chars:
                break
        progress.show(last=True)
        print(f"merging up to a vocabulary of {self.config.vocab_size:,} ...", flush=True)

    def line(self) -> str:
        return f"read {format_count(self.num_documents)} documents, {format_count(self.num_chars)} characters"


def train(config: Config) -> dict[str, Any]:
    """Train, save, measure; returns the figures for the report (and prints them)."""
    base_dir = get_base_dir()
    corpus = config.open_corpus(base_dir)
    print(f"training a tokenizer on {corpus.name}", flush=True)
    start = time.monotonic()
    text = TrainingText(corpus.iter_documents("train"), config)
    tokenizer = RustBPETokenizer.train_from_iterator(text, config.vocab_size)
    path = tokenizer.save(base_dir / "tokenizer")
    seconds = time.monotonic() - start
    sample = measure(tokenizer, corpus.iter_documents("val"))
    stage_record = {
        "seconds": seconds,
        "data": corpus.name,
        "vocab_size": tokenizer.get_vocab_size(),
        "documents": text.num_documents,
        "characters": text.num_chars,
        "hash": tokenizer.hash,
        "checkpoint": tokenizer.hash,
        **sample,
    }
    print(
        f"vocabulary of {tokenizer.get_vocab_size():,} tokens in {format_seconds(seconds)}; on validation text "
        f"{sample['bytes_per_token']:.2f} bytes per token, {sample['megabytes_per_second']:.1f} MB/s\nsaved {path}"
    )
    record_stage(base_dir, "tokenizer", stage_record)
    return stage_record


def measure(tokenizer: RustBPETokenizer, documents: Iterable[Document]) -> dict[str, float]:
    """Compression and speed on the first SAMPLE_CHARS of `documents`."""
    texts: list[str] = []
    left = SAMPLE_CHARS
    for document in documents:
        texts.append(document.text[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    start = time.monotonic()
    num_tokens = sum(map(len, tokenizer.encode(texts)))
    seconds = time.monotonic() - start
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return {
        "bytes_per_token": num_bytes / max(1, num_tokens),
        "megabytes_per_second": num_bytes / 1e6 / max(1e-9, seconds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train."""
    train(_cli.parse(Config, argv))


if __name__ == "__main__":
    _cli.run(main)
