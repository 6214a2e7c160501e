"""Compare the tokenizer with GPT-2's and GPT-4's: `python -m scripts.tok_eval`.

Reports bytes per token on validation text, by source. scripts/_bpe_ranks.py finds the published BPE ranks.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from nanochat.common import get_base_dir
from nanochat.common.ranges import Range
from nanochat.data.corpus import Document
from nanochat.report import record_stage
from nanochat.reporting import console
from nanochat.reporting.curves import scoped
from nanochat.tokenizer import get_tokenizer
from nanochat.train.config import DataConfig
from scripts import _cli
from scripts._bpe_ranks import GPT2, GPT4, Counter, find_reference

OURS, OTHERS, ALL = "nanochat", "(other sources)", "all"
MAX_SOURCES, BATCH_DOCUMENTS = 30, 512


@dataclass
class Config(DataConfig):
    """Bytes per token of the validation split by source, compared with GPT-2 and GPT-4."""

    max_chars: Annotated[int, Range(1)] = 1_000_000
    """Measure at most this many characters of each source."""
    gpt2_ranks: str = ""
    """GPT-2's ranks: vocab.bpe, the folder that holds it, or a .tiktoken file; empty: look in the usual places."""
    gpt4_ranks: str = ""
    """GPT-4's ranks: cl100k_base.tiktoken or the folder that holds it; empty: look in the usual places."""


def count_by_source(
    documents: Iterable[Document], counters: dict[str, Counter], max_chars: int
) -> dict[str, dict[str, int]]:
    """source -> {"documents", "bytes", "characters", and tokens by tokenizer}, and the sums under ALL."""
    fields = ("documents", "bytes", "characters", *counters)
    counts: dict[str, dict[str, int]] = {}
    stream = iter(documents)
    while batch := list(islice(stream, BATCH_DOCUMENTS)):
        texts: dict[str, list[str]] = {}
        for text, source in batch:
            source = source if source in counts or len(counts) < MAX_SOURCES else OTHERS
            row = counts.setdefault(source, dict.fromkeys(fields, 0))
            text = text[: max_chars - row["characters"]]
            if text:
                texts.setdefault(source, []).append(text)
                row["documents"] += 1
                row["characters"] += len(text)
                row["bytes"] += len(text.encode("utf-8"))
        for source, batch_texts in texts.items():
            for name, counter in counters.items():
                counts[source][name] += counter(batch_texts)
    counts[ALL] = {key: sum(row[key] for row in counts.values()) for key in fields}
    return counts


def print_table(counts: dict[str, dict[str, int]], names: Sequence[str]) -> None:
    """One line per source: bytes per token, and the number of tokens relative to the others'."""
    columns = ("source", "docs", "MB", *names, *(f"vs {name}" for name in names[1:]))
    rows = [
        (
            source,
            f"{row['documents']:,}",
            f"{row['bytes'] / 1e6:.2f}",
            *(f"{row['bytes'] / max(1, row[name]):.2f}" for name in names),
            *(f"{row[OURS] / max(1, row[name]) - 1:+.1%}" for name in names[1:]),
        )
        for source, row in counts.items()
    ]
    console.print_table("bytes per token on validation text, and tokens relative to the others", rows, columns)


def evaluate(config: Config) -> dict[str, Any]:
    """Measure, print, and record for the report."""
    base_dir = get_base_dir(to_write=False)
    start = time.monotonic()
    tokenizer = get_tokenizer()
    counters: dict[str, Counter] = {OURS: lambda texts: sum(map(len, tokenizer.encode(texts)))}
    for reference, given in ((GPT2, config.gpt2_ranks), (GPT4, config.gpt4_ranks)):
        if counter := find_reference(reference, given, base_dir):
            counters[reference.name] = counter
    corpus = config.open_corpus(base_dir)
    counts = count_by_source(corpus.iter_documents("val"), counters, config.max_chars)
    print_table(counts, list(counters))
    ratios = {source: {name: row["bytes"] / max(1, row[name]) for name in counters} for source, row in counts.items()}
    # The hash joins these figures with tok_train's of the same tokenizer.
    record_stage(
        base_dir,
        "tokenizer",
        {
            "checkpoint": tokenizer.hash,
            "tables": {
                scoped("Bytes per token", f"up to {config.max_chars:,} characters of each source"): [
                    {"source": source, **row} for source, row in ratios.items()
                ]
            },
        },
    )
    return {"seconds": time.monotonic() - start, "data": corpus.name, "bytes_per_token": ratios}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, evaluate."""
    evaluate(_cli.parse(Config, argv))


if __name__ == "__main__":
    _cli.run(main)
