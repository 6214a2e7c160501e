"""Benchmark the pretraining loader, from text to batches: `python -m bench.data`.

Reads the starter corpus with a vocabulary trained in memory on part of it; nothing is saved. Then reads a small part of
it repeatedly, with its tokens cached. Last, counts the tokens that an epoch never or repeatedly yields as targets, on
documents in which no token occurs twice.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from bench import _run
from bench._common import Flags, starter_texts
from bench._run import Result
from nanochat.data.corpus import Corpus, Document, InMemoryCorpus
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import starter_corpus
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from scripts import _cli


@dataclass
class DataFlags(Flags):
    """Sizes of the batches, and how long to read."""

    chars: int = 2_000_000
    """Characters of text to train the vocabulary on."""
    again: int = 4_000
    """Documents of the corpus that is read repeatedly."""
    documents: int = 2_000
    """Documents of the epoch that is checked for lost tokens."""
    threads: int = 2
    """Threads that tokenise."""


def measure(flags: DataFlags, runtime: Runtime) -> Result:
    tokenizer = RustBPETokenizer.train_from_iterator(starter_texts("train", flags.chars), flags.vocab_size)
    corpus = starter_corpus()
    documents = list(islice(corpus.iter_documents("train"), flags.again))
    loader = PretrainLoader(
        corpus, tokenizer, sequence_len=flags.seq_len, rows_per_step=flags.batch, num_threads=flags.threads
    )
    began = time.perf_counter()
    loader.next_batch()
    first = time.perf_counter() - began  # most of it reads the corpus, which is one large row group
    loader.packer.tokenizer.free_bytes = 0  # the corpus is small: later epochs would cost nothing
    started, cpu_started, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < flags.seconds:
        tokens += loader.next_batch().inputs.numel()
    loader.close()  # stop the thread before reading the clocks
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    again_rate = cached_rate(InMemoryCorpus("few", documents), tokenizer, flags)
    never, again = count_epoch(CountedDocuments(flags.documents, flags.seq_len), flags)
    values: dict[str, Any] = {
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,  # of all threads
        "seconds_to_first_batch": first,
        "tokenised_tokens_per_second": again_rate,  # from the second epoch on
        "cropped_share": loader.stats()["cropped_share"],  # of documents; the rest came later
        "never_seen_share": never,
        "seen_again_share": again,
    }
    rows = [
        ("tokens a second", f"{values['tokens_per_second']:,.0f}"),
        ("tokens a CPU-second, all threads", f"{values['tokens_per_cpu_second']:,.0f}"),
        ("tokens a second, tokens cached", f"{again_rate:,.0f}"),
        ("first batch after", f"{first:.2f} s"),
        ("documents cropped at a row's end", f"{values['cropped_share']:.1%}"),
        ("tokens never a target in an epoch", f"{never:.3%}"),
        ("tokens more than once a target", f"{again:.3%}"),
    ]
    return Result(f"rows of {flags.seq_len} tokens from text", ("", ""), rows, values)


# ---------------------------------------------------------------------------------------------------
# Cached tokens


def cached_rate(corpus: Corpus, tokenizer: RustBPETokenizer, flags: DataFlags) -> float:
    """Tokens a second from the second epoch on, when all tokens are cached."""
    loader = PretrainLoader(corpus, tokenizer, sequence_len=flags.seq_len, rows_per_step=flags.batch)
    while loader.stats()["epoch"] < 1:
        loader.next_batch()
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < flags.seconds:
        tokens += loader.next_batch().inputs.numel()
    rate = tokens / (time.perf_counter() - started)
    loader.close()
    return rate


# ---------------------------------------------------------------------------------------------------
# The targets of an epoch


class CountedDocuments(InMemoryCorpus):
    """A corpus and its tokenizer in one: text i is the number i, and no token comes twice, in any epoch.

    Token j of the corpus (1 .. num_tokens) has id j + e * num_tokens when its document is read for the e-th time.
    Lengths are geometric with a mean of three quarters of a row: many documents fit, many do not.
    """

    def __init__(self, num_documents: int, sequence_len: int) -> None:
        name = "counted documents"
        super().__init__(name, [Document(str(i), name) for i in range(num_documents)])
        lengths = np.random.default_rng(0).geometric(1 / (0.75 * sequence_len), num_documents)
        ends = np.cumsum(lengths).tolist()
        self.next_ids = [range(end - length + 1, end + 1) for end, length in zip(ends, lengths.tolist())]
        self.num_tokens: int = ends[-1]

    def encode(self, text: list[str], *, num_threads: int) -> list[list[int]]:
        encoded = []
        for i in map(int, text):
            ids = self.next_ids[i]
            self.next_ids[i] = range(ids.start + self.num_tokens, ids.stop + self.num_tokens)
            encoded.append(list(ids))
        return encoded

    def get_bos_token_id(self) -> int:
        return 0

    def get_vocab_size(self) -> int:
        return 2**31 - 1  # as large as the loader can hold


def count_epoch(corpus: CountedDocuments, flags: Flags) -> tuple[float, float]:
    """Shares of the first epoch's tokens that are (never, more than once) a target."""
    loader = PretrainLoader(corpus, corpus, sequence_len=flags.seq_len, rows_per_step=flags.batch)
    loader.packer.tokenizer.free_bytes = 0  # no cache: each epoch has new tokens
    counts = np.zeros(corpus.num_tokens + 1, np.int64)
    while loader.stats()["epoch"] < 1 or first_epoch_left(loader, corpus.num_tokens):
        targets = loader.next_batch().targets.flatten().numpy()
        counts += np.bincount(targets[targets <= corpus.num_tokens], minlength=len(counts))
    loader.close()
    seen = counts[1:]
    return float((seen == 0).mean()), float((seen > 1).mean())


def first_epoch_left(loader: PretrainLoader, num_tokens: int) -> bool:
    """True while tokens of the first epoch are still in the pools."""
    waiting = [array for name, array in loader.state_dict().items() if name.endswith(".tokens")]
    return any((array <= num_tokens).any() for array in waiting)


def main(argv: Sequence[str] | None = None) -> int:
    return _run.run("data", DataFlags, measure, argv)


if __name__ == "__main__":
    _cli.run(main)
