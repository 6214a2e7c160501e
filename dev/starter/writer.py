"""Choosing, splitting, ordering and writing: from (source, text) to byte-identical parquet files."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dev.starter.clean import fraction, stable_hash
from nanochat.common import UserError, atomic_write

ROW_GROUP = 1024
VAL_FRACTION = 0.018
CONVERSATION = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("source", pa.string()),
    ]
)
DOCUMENT = pa.schema([("text", pa.string()), ("source", pa.string())])


def within_budget(docs: list[tuple[str, str]], budgets: dict[str, float]) -> list[tuple[str, str]]:
    """Subsample each source named in `budgets` (MB of UTF-8) by document hash; others are kept whole.

    Raises UserError for a name that is no source.
    """
    if unknown := budgets.keys() - {source for source, _ in docs}:
        raise UserError(f"--budget names no source of the corpus: {', '.join(sorted(unknown))}")
    left = {source: megabytes * 1e6 for source, megabytes in budgets.items()}
    kept = []
    for source, text in sorted(docs, key=lambda d: (d[0], stable_hash(d[1], "budget"), d[1])):
        size = len(text.encode())
        if source not in left or left[source] >= size:
            kept.append((source, text))
            if source in left:
                left[source] -= size
    return kept


def interleave(items: list[tuple[str, Any]], name: Any = str) -> list[tuple[str, Any]]:
    """Shuffle (source, item) so that each stretch holds every source in proportion.

    Within a source the order is by hash; the i-th of n items gets position (i + jitter) / n.
    """
    by_source = defaultdict(list)
    for source, item in items:
        by_source[source].append(item)
    placed = []
    for source, group in sorted(by_source.items()):
        group.sort(key=lambda item: (stable_hash(name(item), "order"), name(item)))
        for i, item in enumerate(group):
            position = (i + fraction(name(item), "jitter")) / len(group)
            placed.append((position, source, name(item), item))
    placed.sort(key=lambda p: p[:3])
    return [(source, item) for _, source, _, item in placed]


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """zstd, row groups of 1024, nothing in the file that depends on time or machine."""
    table = pa.Table.from_pylist(rows, schema=schema)
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd", compression_level=19, row_group_size=ROW_GROUP)


def write_documents(path: Path, docs: list[tuple[str, str]]) -> None:
    """(source, text) pairs, interleaved, as columns text and source."""
    rows = [{"text": text, "source": source} for source, text in interleave(docs)]
    write_parquet(path, rows, DOCUMENT)


def write_conversations(path: Path, conversations: list[tuple[str, list[str]]]) -> None:
    """(source, turns) pairs, user first, interleaved, as columns messages and source."""
    rows = []
    for source, turns in interleave(conversations, "\n".join):
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        rows.append({"messages": messages, "source": source})
    write_parquet(path, rows, CONVERSATION)
