"""Tokens made before training: of each shard a file beside it, so to speak, with the same blocks.

A file is for one tokenizer and one version of one shard; block i of it has the tokens of row group i, document by
document, and what a reader needs to treat them as it would the text: characters, and the hash that tells the splits
apart. Any other file, or a damaged one, is not used, which costs time and changes nothing: the text is tokenised then.
It is parquet, as the text is: compressed, and of no kind that could execute anything on being read.
"""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import BadShard, atomic_path, first_line, warn
from nanochat.data.corpus import Part
from nanochat.data.document_order import Corpus, Tokens, cut
from nanochat.data.row_streams import token_dtype
from nanochat.data.textfiles import document_hash, is_own_trouble, read_row_group
from nanochat.data.to_parquet import stamp

VERSION = "1"  # of the files; raise it when the same text and tokenizer would give another file
DIGESTS, DIGEST_BYTES = b"nanochat.digests", 16  # of each block, one after the other
SCHEMA = pa.schema([("hash", pa.uint64()), ("characters", pa.uint32()), ("ids", pa.binary())])


def token_path(folder: Path, part: Part, tokenizer: Any) -> Path:
    """Where a shard's tokens are; a shard written again has another path."""
    size, version = stamp(part.path)
    key = hashlib.blake2b(part.digest + f"{size} {version}".encode(), digest_size=12).hexdigest()
    return folder / tokenizer.hash[:16] / f"{key}.parquet"


def labels(part: Part, tokenizer: Any) -> dict[bytes, bytes]:
    """What a file says of itself, to be compared."""
    texts = {"version": VERSION, "tokenizer": tokenizer.hash, "shard": part.digest.hex()}
    return {f"nanochat.{name}".encode(): text.encode() for name, text in texts.items()}


class TokenisedCorpus:
    """A corpus whose blocks come as Tokens where there are some for this tokenizer, else as text."""

    def __init__(self, corpus: Any, tokenizer: Any) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.name, self.fingerprint = corpus.name, corpus.fingerprint
        self.dtype = token_dtype(tokenizer.get_vocab_size())
        self.files: dict[str, Path | None] = {}  # shard -> its tokens, or None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.corpus, name)

    def read_block(self, split: str, index: int) -> list[Any]:
        """The Tokens or Documents of a block of the split."""
        part, group = self.corpus.locate(split, index)
        path = self._tokens_of(part)
        if path is not None:
            try:
                return self._read(path, part, group, split)
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                if is_own_trouble(error):
                    raise
                warn(
                    f"the tokens in {path} are damaged ({first_line(error)}): deleted, and {part.path} is tokenised "
                    "on the fly; python -m scripts.tok_data makes them again"
                )
                with suppress(OSError):
                    path.unlink()
                self.files[str(part.path)] = None
        return self.corpus.read_block(split, index)

    def prefetch(self, split: str, indices: Iterable[int]) -> None:
        """Of blocks whose text will be needed only."""
        self.corpus.prefetch(split, [i for i in indices if self._tokens_of(self.corpus.locate(split, i)[0]) is None])

    def _tokens_of(self, part: Part) -> Path | None:
        name = str(part.path)
        if name in self.corpus.skipped:
            return None
        if name not in self.files:
            try:
                path = token_path(self.corpus.token_folder, part, self.tokenizer)
                self.files[name] = path if path.exists() and whole(path, part, self.tokenizer) else None
            except BadShard:
                self.files[name] = None  # reading the text will tell
        return self.files[name]

    def _read(self, path: Path, part: Part, group: int, split: str) -> list[Tokens]:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            table = file.read_row_group(group, use_threads=False)
            expected = file.metadata.metadata[DIGESTS][group * DIGEST_BYTES :][:DIGEST_BYTES]
        if digest(table) != expected:
            raise ValueError(f"block {group} is not what was written")
        hashes = table.column("hash").to_numpy()
        mine = np.ones(len(hashes), bool)
        if part.by_hash and self.corpus.val_limit < 2**64:
            mine = (hashes < np.uint64(self.corpus.val_limit)) == (split == "val")
        characters, ids = table.column("characters").to_pylist(), table.column("ids").to_pylist()
        return [Tokens(np.frombuffer(ids[i], self.dtype), characters[i]) for i in np.flatnonzero(mine)]


def digest(table: pa.Table) -> bytes:
    """Of a block. Parquet's own checksums cover pages, and say nothing of which page it is."""
    ids = table.column("ids").to_pylist()
    sums = hashlib.blake2b(np.array([len(one) for one in ids], np.int64).tobytes(), digest_size=DIGEST_BYTES)
    for column in ("hash", "characters"):
        sums.update(table.column(column).to_numpy().tobytes())
    sums.update(b"".join(ids))
    return sums.digest()


def with_tokens(corpus: Corpus, tokenizer: Any) -> Corpus:
    """The corpus, or a TokenisedCorpus if anything was tokenised beforehand for this tokenizer."""
    folder = getattr(corpus, "token_folder", None)
    known = folder is not None and hasattr(tokenizer, "hash") and (folder / tokenizer.hash[:16]).is_dir()
    return TokenisedCorpus(corpus, tokenizer) if known else corpus


def whole(path: Path, part: Part, tokenizer: Any) -> bool:
    """True if a file is what it should be, as far as its footer tells; otherwise a word about it."""
    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
        if meta.num_row_groups == part.blocks and labels(part, tokenizer).items() <= (meta.metadata or {}).items():
            return True
        reason = "of another shard, tokenizer or version"
    except (pa.ArrowException, OSError) as error:
        reason = f"damaged ({first_line(error)})"
    warn(f"the tokens in {path} are {reason} and are not used; python -m scripts.tok_data makes them again")
    return False


def write_tokens(part: Part, tokenizer: Any, path: Path, between: Callable[[], None] = lambda: None) -> int:
    """Tokenise a shard into `path`, which appears when it is whole; the number of tokens.

    `between` is called after each block. One block is in memory at a time. Raises BadShard, or OSError for the disk.
    """
    dtype, tokens, digests = token_dtype(tokenizer.get_vocab_size()), 0, b""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False) as writer,
    ):
        for group in range(part.blocks):
            documents = read_row_group(part.path, group, part.source)
            pieces = [(document_hash(d.text), piece) for d in documents for piece in cut(d.text)]
            encoded = tokenizer.encode([piece for _, piece in pieces], num_threads=1)
            tokens += sum(map(len, encoded))
            columns = [
                [hash for hash, _ in pieces],
                [len(piece) for _, piece in pieces],
                [np.array(ids, dtype).tobytes() for ids in encoded],
            ]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types)]
            table = pa.table(arrays, schema=SCHEMA)
            digests += digest(table)
            writer.write_table(table, row_group_size=max(1, len(pieces)))
            between()
        writer.add_key_value_metadata(labels(part, tokenizer) | {DIGESTS: digests})
    return tokens
