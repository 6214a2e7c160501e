"""Token files: the tokens of a shard, made before training by scripts/tok_data.py.

A token file belongs to one tokenizer and one version of one shard; its row group i has the tokens of the shard's row
group i, segment by segment, with the number of characters and the document hash that tells the splits apart. So the
loader makes the same batches from it as from the text. A file that is damaged or belongs to something else is ignored
with a warning, and the text is tokenised on the fly. The format is parquet: compressed, and nothing executes on load.
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
from nanochat.data.corpus import Corpus, document_hash
from nanochat.data.document_order import SegmentReader, Tokens, split_text
from nanochat.data.parquet import is_machine_error
from nanochat.data.row_streams import token_dtype
from nanochat.data.shards import Shard, ShardCorpus
from nanochat.data.to_parquet import stamp

VERSION = "1"  # of the format; raise it when the same text and tokenizer would give another file
DIGESTS, DIGEST_BYTES = b"nanochat.digests", 16  # of each row group, concatenated
SCHEMA = pa.schema([("hash", pa.uint64()), ("characters", pa.uint32()), ("ids", pa.binary())])
REMAKE = "python -m scripts.tok_data makes them again"


def segment_reader(corpus: Corpus, tokenizer: Any) -> SegmentReader:
    """Reads the corpus as the loader needs it: tokens if any of its shards was tokenised beforehand, else text."""
    if isinstance(corpus, ShardCorpus) and corpus.token_folder and hasattr(tokenizer, "hash"):
        folder = corpus.token_folder / tokenizer.hash[:16]
        if folder.is_dir():
            return TokenReader(corpus, tokenizer, corpus.token_folder)
    return SegmentReader(corpus)


class TokenReader(SegmentReader):
    """Reads row groups from token files where there are any, else as text."""

    corpus: ShardCorpus

    def __init__(self, corpus: ShardCorpus, tokenizer: Any, token_folder: Path) -> None:
        super().__init__(corpus)
        self.tokenizer, self.token_folder = tokenizer, token_folder
        self.dtype = token_dtype(tokenizer.get_vocab_size())
        self.files: dict[str, Path | None] = {}  # shard -> its token file, or None

    @property
    def is_complete(self) -> bool:
        """True if every shard read so far had a token file."""
        return None not in self.files.values()

    def read(self, split: str, index: int) -> list[str | Tokens]:
        shard, number = self.corpus.locate(split, index)
        path = self._token_file(shard)
        if path is not None:
            try:
                return self._read_tokens(path, shard, number, split)
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                if is_machine_error(error):
                    raise
                warn(
                    f"the tokens in {path} are damaged ({first_line(error)}): deleted, and {shard.path} is tokenised "
                    f"on the fly; {REMAKE}"
                )
                with suppress(OSError):
                    path.unlink()
                self.files[str(shard.path)] = None
        return super().read(split, index)

    def prefetch(self, split: str, indices: Iterable[int]) -> None:
        """Fetches only those whose text will be needed."""
        super().prefetch(split, [i for i in indices if self._token_file(self.corpus.locate(split, i)[0]) is None])

    def _token_file(self, shard: Shard) -> Path | None:
        name = str(shard.path)
        if name in self.corpus.bad_shards:
            return None
        if name not in self.files:
            try:
                path = token_path(self.token_folder, shard, self.tokenizer)
                self.files[name] = path if is_valid(path, shard, self.tokenizer) else None
            except BadShard:
                self.files[name] = None  # reading the text will raise it
        return self.files[name]

    def _read_tokens(self, path: Path, shard: Shard, number: int, split: str) -> list[str | Tokens]:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            table = file.read_row_group(number, use_threads=False)
            expected = file.metadata.metadata[DIGESTS][number * DIGEST_BYTES :][:DIGEST_BYTES]
        if digest(table) != expected:
            raise ValueError(f"row group {number} is not what was written")
        hashes = table.column("hash").to_numpy()
        in_split = np.ones(len(hashes), bool)
        if shard.by_hash and self.corpus.val_limit < 2**64:
            in_split = (hashes < np.uint64(self.corpus.val_limit)) == (split == "val")
        characters, ids = table.column("characters").to_pylist(), table.column("ids").to_pylist()
        return [Tokens(np.frombuffer(ids[i], self.dtype), characters[i]) for i in np.flatnonzero(in_split)]


def token_path(folder: Path, shard: Shard, tokenizer: Any) -> Path:
    """The token file of a shard; a shard written again has another path."""
    size, version = stamp(shard.path)
    reading = " clean" if shard.options.clean else ""
    key = hashlib.blake2b(shard.digest + f"{size} {version}{reading}".encode(), digest_size=12).hexdigest()
    return folder / tokenizer.hash[:16] / f"{key}.parquet"


def metadata(shard: Shard, tokenizer: Any) -> dict[bytes, bytes]:
    """The metadata of a token file: version, tokenizer and shard."""
    texts = {"version": VERSION, "tokenizer": tokenizer.hash, "shard": shard.digest.hex()}
    return {f"nanochat.{name}".encode(): text.encode() for name, text in texts.items()}


def is_valid(path: Path, shard: Shard, tokenizer: Any) -> bool:
    """True if the token file exists and its footer says that it is whole and the shard's; else warns why not."""
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
        if meta.num_row_groups == shard.row_groups and (
            metadata(shard, tokenizer).items() <= (meta.metadata or {}).items()
        ):
            return True
        reason = "of another shard, tokenizer or version"
    except (pa.ArrowException, OSError) as error:
        reason = f"damaged ({first_line(error)})"
    warn(f"the tokens in {path} are {reason} and are not used; {REMAKE}")
    return False


def digest(table: pa.Table) -> bytes:
    """Of a row group. Parquet's own checksums cover pages, but not which page it is."""
    ids = table.column("ids").to_pylist()
    sums = hashlib.blake2b(np.array([len(one) for one in ids], np.int64).tobytes(), digest_size=DIGEST_BYTES)
    for column in ("hash", "characters"):
        sums.update(table.column(column).to_numpy().tobytes())
    sums.update(b"".join(ids))
    return sums.digest()


def write_token_file(shard: Shard, tokenizer: Any, path: Path, check: Callable[[], None] = lambda: None) -> int:
    """Tokenise a shard into `path`, which appears when it is complete; returns the number of tokens.

    One row group is in memory at a time; `check` is called after each, and may raise to give up. Raises BadShard, or
    OSError for the disk.
    """
    dtype, num_tokens, digests = token_dtype(tokenizer.get_vocab_size()), 0, b""
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, **settings) as writer:
        for number in range(shard.row_groups):
            documents = shard.read(number)
            segments = [(document_hash(d.text), segment) for d in documents for segment in split_text(d.text)]
            encoded = tokenizer.encode([segment for _, segment in segments], num_threads=1)
            num_tokens += sum(map(len, encoded))
            columns = [
                [hash for hash, _ in segments],
                [len(segment) for _, segment in segments],
                [np.array(ids, dtype).tobytes() for ids in encoded],
            ]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types)]
            table = pa.table(arrays, schema=SCHEMA)
            digests += digest(table)
            writer.write_table(table, row_group_size=max(1, len(segments)))
            check()
        writer.add_key_value_metadata(metadata(shard, tokenizer) | {DIGESTS: digests})
    return num_tokens
