"""Convert any mixture of text files to parquet shards with small row groups.

Training needs random access: to shuffle, to give each row stream its own documents, to resume. A parquet file can be
entered at any row group; a compressed .jsonl only at its beginning, and a row group of a million rows only by decoding
all of it. So such files are rewritten once, as a stream, mixed a little on the way, and the result is kept in the base
folder under a key made from the files' names, sizes and times. Memory is bounded by the shuffle buffer and two row
groups, whatever the size of the corpus.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import NotRequired

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from typing_extensions import TypedDict

from nanochat.common import BadShard, UserError, atomic_path, delete_leftovers, format_count, warn, write_json
from nanochat.common.files import read_json
from nanochat.common.output import ProgressLine
from nanochat.data.corpus import VAL_LIMIT, Document, document_hash
from nanochat.data.parquet import CLEANED, CONVERTED, TextOptions
from nanochat.data.remote import RemoteFile, Source
from nanochat.data.rows import LINE_KINDS
from nanochat.data.text_stream import MIB
from nanochat.data.textfiles import TEXT_KINDS, NoTextField, file_documents, kind_of

GROUP_DOCUMENTS, GROUP_CHARS = 1024, 16 * MIB  # a row group is full at either
SHARD_ROW_GROUPS = 64
SHUFFLE_DOCUMENTS, SHUFFLE_CHARS = 16384, 64 * MIB
FEW_MEGABYTES, FEW_FILES = 50, 10_000  # converted without a message
MAX_WARNINGS = 10  # about files that are left out
MANIFEST = "manifest.json"
CONVERSION_VERSION = 3  # part of the key: raise it when the same files would give other shards
UNCLEANED_VERSION = 2  # of runs that began before texts were cleaned (TextOptions.clean)


@dataclass
class Tally:
    """Documents counted per split, the extreme hashes, and the files that were left out."""

    train: int = 0
    val: int = 0
    smallest: int = 2**64
    largest: int = -1
    left_out: dict[str, str] = field(default_factory=dict)  # path -> "without text" or the like

    def assign(self, text: str) -> bool:
        """True if the document is for validation (one in a hundred, by its hash); counts it."""
        hash = document_hash(text)
        self.smallest, self.largest = min(self.smallest, hash), max(self.largest, hash)
        is_val = hash < VAL_LIMIT
        self.val += is_val
        self.train += not is_val
        return is_val

    def leave_out(self, path: Source, reason: str, message: str) -> None:
        """Count a file as left out; warns, but not about thousands."""
        self.left_out[str(path)] = reason
        if len(self.left_out) <= MAX_WARNINGS:
            warn(f"{message}; the file is left out")
        elif len(self.left_out) == MAX_WARNINGS + 1:
            warn("further files that are left out are only counted")


def convert(
    paths: Sequence[Source], base_dir: Path, options: TextOptions = CLEANED
) -> tuple[list[Path], list[Path], Tally]:
    """Shards (train, val) with the documents of `paths`, made now unless they were made before.

    One process converts, under a lock, and others wait for it. The shards appear under $BASE/converted/KEY in one
    rename: a folder by that name is complete. Files of the same names, sizes and times are not read again. Raises
    BadShard for a file that cannot be read to its end.
    """
    key = conversion_key(paths, options)
    folder = base_dir / CONVERTED / key
    tally = read_tally(folder)
    if tally is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{key}.lock"):
            tally = read_tally(folder) or convert_into(folder, paths, options)
    return sorted(folder.glob("train_*.parquet")), sorted(folder.glob("val_*.parquet")), tally


class Conversion(TypedDict):
    """The manifest of a converted folder. `shards`: name -> bytes; older manifests do not have it."""

    version: int
    tally: Tally
    shards: NotRequired[dict[str, int]]


def read_tally(folder: Path) -> Tally | None:
    """The tally of a folder converted before; None if there is none, its manifest is damaged, or shards are missing."""
    try:
        found: Conversion = read_json(folder / MANIFEST, Conversion)
    except UserError:
        return None
    return found["tally"] if found.get("shards", shard_sizes(folder)) == shard_sizes(folder) else None


def shard_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each shard by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.parquet"))}


def conversion_key(paths: Sequence[Source], options: TextOptions = CLEANED) -> str:
    """16 hex digits that change when a file is added, removed, renamed or rewritten, or read in another way."""
    made_by = CONVERSION_VERSION if options.clean else UNCLEANED_VERSION
    digest = hashlib.blake2b(str(made_by).encode(), digest_size=8)
    if options.field != "text":
        digest.update(f"\0{options.field}\0".encode("utf-8", "surrogateescape"))
    number = 0
    progress = ProgressLine(lambda: f"looked at {number:,} of {len(paths):,} files")
    real_folder = lru_cache(os.path.realpath)  # one for the many files of a folder
    for path in paths:
        if isinstance(path, RemoteFile):
            place = path.url
        elif path.is_symlink():
            place = os.path.realpath(path)
        else:
            place = os.path.join(real_folder(path.parent), path.name)
        size, version = stamp(path)
        digest.update(os.fsencode(place) + f"\0{size}\0{version}\0".encode())
        number += 1
        progress.show()
    return digest.hexdigest()


def stamp(path: Source) -> tuple[int, str]:
    """(bytes, version) of a file, which change when it is rewritten. BadShard if it cannot be read."""
    if isinstance(path, RemoteFile):
        return path.size, path.version
    try:
        stat = path.stat()
    except OSError as error:
        raise BadShard(f"cannot read {path}: {error.strerror}", path) from error
    return stat.st_size, str(stat.st_mtime_ns)


def convert_into(folder: Path, paths: Sequence[Source], options: TextOptions) -> Tally:
    """Write the shards and their manifest to a temporary neighbour of `folder`, then rename it. Returns the tally."""
    delete_leftovers(folder.parent.glob(f".{folder.name}.*.tmp"))
    megabytes = sum(stamp(path)[0] for path in paths) / 1e6
    if megabytes > FEW_MEGABYTES or len(paths) > FEW_FILES:
        print(f"converting {len(paths):,} files ({megabytes:,.0f} MB) to parquet in {folder}, once", flush=True)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tally = write_shards(temporary, paths, options)
        manifest = {"version": CONVERSION_VERSION, "tally": asdict(tally), "shards": shard_sizes(temporary)}
        write_json(temporary / MANIFEST, manifest)
        if folder.exists():  # it is damaged
            shutil.rmtree(folder)
    return tally


def write_shards(folder: Path, paths: Sequence[Source], options: TextOptions) -> Tally:
    """Stream all documents, shuffled, into train and validation shards; returns their counts."""
    tally = Tally()
    train, val = ShardWriter(folder, "train"), ShardWriter(folder, "val")
    documents = documents_of(paths, options, tally)
    with train, val:
        for document in shuffled(split_lone_text(paths, documents)):
            (val if tally.assign(document.text) else train).add(document)
    return tally


def documents_of(paths: Sequence[Source], options: TextOptions, tally: Tally) -> Iterator[Document]:
    """All documents. Leaves out, with a warning, empty files and, among several, JSON and CSV of something else."""
    number = 0

    def line() -> str:
        return f"imported {number:,} of {len(paths):,} files, {format_count(tally.train + tally.val)} documents"

    progress = ProgressLine(line)
    for path in paths:
        documents = 0
        try:
            for document in file_documents(path, options):
                documents += 1
                yield document
            if not documents:
                tally.leave_out(path, "without text", f"{path} holds no text")
        except NoTextField as error:
            if len(paths) == 1 or kind_of(path) in LINE_KINDS:
                raise
            tally.leave_out(path, f'without the field "{options.field}"', str(error))
        number += 1
        progress.show()
    progress.close()


def split_lone_text(paths: Sequence[Source], documents: Iterator[Document]) -> Iterator[Document]:
    """The documents; but a lone document of a lone text file is split into its paragraphs, or else its lines, so that
    there is something to validate on."""
    first = list(islice(documents, 2))
    if len(first) != 1 or len(paths) != 1 or kind_of(paths[0]) not in TEXT_KINDS:
        yield from chain(first, documents)
        return
    (whole,) = first
    texts = next((t for border in ("\n\n", "\n") if len(t := whole.text.split(border)) > 1), [whole.text])
    yield from (Document(text.strip("\n"), whole.source) for text in texts if text.strip())


def shuffled(documents: Iterable[Document], seed: int = 0) -> Iterator[Document]:
    """Shuffle a stream through a bounded buffer: each arrival pushes out a random document of it."""
    rng = random.Random(seed)
    buffer: list[Document] = []
    chars = 0
    for document in documents:
        buffer.append(document)
        chars += len(document.text)
        while len(buffer) > SHUFFLE_DOCUMENTS or (chars > SHUFFLE_CHARS and len(buffer) > 1):
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            out = buffer.pop()
            chars -= len(out.text)
            yield out
    rng.shuffle(buffer)
    yield from buffer


class ShardWriter:
    """Writes documents to PREFIX_00000.parquet, PREFIX_00001.parquet, … in small row groups.

    A context manager: leaving it finishes the last shard; leaving it with an error abandons the shard.
    """

    schema = pa.schema([("text", pa.string()), ("source", pa.string())])

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.shards = self.row_groups = self.chars = 0
        self.rows: list[Document] = []
        self.digest = hashlib.blake2b(digest_size=16)
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.close()
        elif self.writer is not None:
            with suppress(pa.ArrowException, OSError):  # a full disk refuses the footer too; the first error counts
                self.writer.close()

    @property
    def path(self) -> Path:
        """The shard being written."""
        return self.folder / f"{self.prefix}_{self.shards:05d}.parquet"

    def add(self, document: Document) -> None:
        """Add one document; writes when a row group is full."""
        self.rows.append(document)
        self.chars += len(document.text)
        if len(self.rows) >= GROUP_DOCUMENTS or self.chars >= GROUP_CHARS:
            self.flush()

    def flush(self) -> None:
        """Write the row group that is being filled."""
        if not self.rows:
            return
        self.writer = self.writer or pq.ParquetWriter(
            self.path, self.schema, compression="zstd", use_dictionary=["source"]
        )
        texts, sources = ([row.text for row in self.rows], [row.source for row in self.rows])
        for text in texts:
            self.digest.update(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest())
        self.writer.write_table(pa.table([texts, sources], schema=self.schema))
        self.rows, self.chars, self.row_groups = [], 0, self.row_groups + 1
        if self.row_groups % SHARD_ROW_GROUPS == 0:
            self.close()

    def close(self) -> None:
        """Finish the shard and flush it to disk. Its footer carries a digest of all text up to its end."""
        self.flush()
        if self.writer is None:
            return
        self.writer.add_key_value_metadata({"nanochat.digest": self.digest.hexdigest()})
        self.writer.close()
        self.writer = None
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        self.shards += 1
