"""Benchmark byte-pair training, encoding and decoding: `python -m bench.tokenizer`.

Trains on the starter corpus's training text and measures on its validation text, in memory; nothing is saved.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import _run
from bench._common import Flags, starter_texts, time_in_turn
from bench._run import Result
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from scripts import _cli

THREADS = 2  # of a batch


@dataclass
class TokenizerFlags(Flags):
    """How much text to train on, and how long to measure."""

    chars: int = 10_000_000
    """Characters of text to train the vocabulary on; a twentieth as many are encoded."""


def measure(flags: TokenizerFlags, runtime: Runtime) -> Result:
    texts = list(starter_texts("train", flags.chars))
    started = time.perf_counter()
    tokenizer = RustBPETokenizer.train_from_iterator(texts, flags.vocab_size)
    train_seconds = time.perf_counter() - started

    held_out = list(starter_texts("val", max(1, flags.chars // 20)))
    encoded = tokenizer.encode(held_out)
    num_bytes, num_tokens = sum(len(text.encode()) for text in held_out), sum(map(len, encoded))
    actions: dict[str, Callable[[], Any]] = {
        "encode_single": lambda: [tokenizer.encode(text) for text in held_out],
        "encode_batch": partial(tokenizer.encode, held_out, num_threads=THREADS),
        "decode": lambda: [tokenizer.decode(ids) for ids in encoded],
    }
    seconds = time_in_turn(actions, flags.seconds, runtime)
    values: dict[str, Any] = {
        "train_seconds": train_seconds,
        "train_chars": sum(map(len, texts)),
        "train_mb_per_second": sum(len(text.encode()) for text in texts) / 1e6 / train_seconds,
        "vocab_size": tokenizer.get_vocab_size(),
        "bytes_per_token": num_bytes / num_tokens,
    }
    for name, took in seconds.items():
        values[f"{name}_mb_per_second"] = num_bytes / 1e6 / took
        values[f"{name}_tokens_per_second"] = num_tokens / took
    labels = {
        "encode_single": "encode, text by text",
        "encode_batch": f"encode, a list on {THREADS} threads",
        "decode": "decode, text by text",
    }
    rows = [("train", f"{values['train_mb_per_second']:.2f}", "")]
    rows += [
        (labels[name], f"{values[f'{name}_mb_per_second']:.2f}", f"{num_tokens / took:,.0f}")
        for name, took in seconds.items()
    ]
    title = f"a vocabulary of {values['vocab_size']:,}, {values['bytes_per_token']:.2f} bytes per token"
    return Result(title, ("", "MB a second", "tokens a second"), rows, values)


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("tokenizer", TokenizerFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
