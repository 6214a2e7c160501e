"""A corpus: parquet files, here or behind URLs, as two splits of blocks that can be read in any order.

A file of it is a shard. One that cannot be read stops whoever reads it, unless bad shards may be left out: then all
its blocks are empty, from when on is for the reader to decide, and the numbers of the other blocks stay as they were.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any, TypeVar

from nanochat.common import BadShard, warn
from nanochat.data.remote import RemoteFile
from nanochat.data.textfiles import (
    MIB,
    Document,
    Source,
    document_hash,
    open_parquet,
    read_row_group,
    spans_of_text,
    stem_of,
    text_columns,
)
from nanochat.data.to_parquet import VAL_LIMIT

Result = TypeVar("Result")

SPLITS = ("train", "val")
THE_FLAG = "; or leave out such shards: --skip-bad-shards"
KEPT_SIZE = 64 * MIB  # characters of validation text to remember


@dataclass(frozen=True)
class Gone:
    """The place of a shard that is not going to be read."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Part:
    """One shard of a corpus."""

    path: Any  # Source, or Gone
    source: str  # of documents that do not name their own
    blocks: int  # row groups
    by_hash: bool = False  # it holds both splits' documents, told apart by hash while reading
    digest: bytes = b""  # of its name, size and footer

    def to_dict(self) -> dict[str, Any]:
        """What a later run needs to know of a shard that it may not find any more."""
        return {
            "path": str(self.path),
            "source": self.source,
            "blocks": self.blocks,
            "by_hash": self.by_hash,
            "digest": self.digest.hex(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Part":
        """The inverse, for a shard that is not going to be read."""
        return cls(**values | {"path": Gone(values["path"]), "digest": bytes.fromhex(values["digest"])})


class Corpus:
    """Documents in two splits, "train" and "val", each a sequence of blocks that can be read in any order.

    `fingerprint` changes when the files do (names, sizes, or footers, which hold every row group's size and
    extremes), so that a run is not resumed on other data unnoticed; where they lie does not matter. Several threads
    may read at once.

    `skip_bad`: shards that cannot be read may be left out. `skipped` says which are, and why.
    """

    def __init__(
        self,
        name: str,
        train: list[Part],
        val: list[Part],
        val_limit: int = VAL_LIMIT,
        *,
        skip_bad: bool = False,
        skipped: dict[str, str] | None = None,
    ) -> None:
        self.name, self.val_limit, self.skip_bad = name, val_limit, skip_bad
        self.skipped = dict(skipped or {})
        self.parts = {"train": train, "val": val}
        self.ends = {split: list(accumulate(part.blocks for part in self.parts[split])) for split in SPLITS}
        digest = hashlib.blake2b(val_limit.to_bytes(9, "big"), digest_size=16)
        for split in SPLITS:
            for part in self.parts[split]:
                digest.update(split.encode() + b"\0" + part.digest)
        self.fingerprint = digest.hexdigest()
        self.token_folder: Path | None = None  # where tokens made beforehand may lie
        self.kept: dict[int, list[Document]] = {}  # validation blocks of files that hold both splits
        self.kept_size = 0

    def num_blocks(self, split: str) -> int:
        """How many blocks a split has."""
        return self.ends[split][-1] if self.ends[split] else 0

    def locate(self, split: str, index: int) -> tuple[Part, int]:
        """(the shard that block `index` of a split is in, which of its row groups it is)."""
        assert 0 <= index < self.num_blocks(split), f"block {index} of {self.num_blocks(split)}"
        which = bisect_right(self.ends[split], index)
        part = self.parts[split][which]
        return part, index - self.ends[split][which] + part.blocks

    def read_block(self, split: str, index: int) -> list[Document]:
        """The documents of block `index` in 0 .. num_blocks(split) - 1. May be an empty list.

        Raises BadShard for a shard that is missing or damaged, and not among the skipped ones.
        """
        part, group = self.locate(split, index)
        if str(part.path) in self.skipped:
            return []
        if split == "val" and index in self.kept:
            return list(self.kept[index])
        try:
            documents = read_row_group(part.path, group, part.source)
        except BadShard as error:
            raise self.about(error) from error
        if not part.by_hash:
            return documents
        want_val = split == "val"
        documents = [d for d in documents if (document_hash(d.text) < self.val_limit) == want_val]
        if want_val and self.kept_size < KEPT_SIZE:  # evaluations come again, and a block yields one document in 100
            self.kept_size += sum(len(d.text) for d in documents)
            self.kept[index] = documents
        return list(documents)

    def prefetch(self, split: str, indices: Iterable[int]) -> None:
        """Begin to fetch blocks that are not on this machine."""
        for index in indices:
            part, group = self.locate(split, index)
            if isinstance(part.path, RemoteFile) and str(part.path) not in self.skipped:
                part.path.prefetch(spans_of_text, group)

    def iter_documents(self, split: str) -> Iterator[Document]:
        """All documents of a split in file order; a few blocks in memory at a time. A bad shard is skipped from where
        it is found to be one, if that may be."""
        for index in range(self.num_blocks(split)):
            self.prefetch(split, range(index, min(index + 4, self.num_blocks(split))))
            try:
                documents = self.read_block(split, index)
            except BadShard as error:
                if not self.skip_bad:
                    raise
                self.skip(error.shard, str(error))
                tell_skipped(str(error), len(self.skipped))
                continue
            yield from documents

    def record(self) -> "Recorded":
        """What resolve_corpus needs, in a form for JSON, to give each shard its place again in a later session."""
        splits = {split: [part.to_dict() for part in self.parts[split]] for split in SPLITS}
        return {"fingerprint": self.fingerprint, "val_limit": str(self.val_limit), **splits}

    def skip(self, shard: str, reason: str) -> None:
        """Leave out a shard from now on."""
        self.skipped.setdefault(shard, reason)

    def about(self, error: BadShard) -> BadShard:
        """The error, with the flag that would have gone on, unless it was given."""
        if self.skip_bad:
            return error
        return BadShard(f"{error}{THE_FLAG}", error.shard)


class Lenient:
    """A corpus whose bad shards are empty where they are met, if they may be skipped: for whoever measures, and has no
    say in what is trained on."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.name, self.fingerprint = corpus, corpus.name, corpus.fingerprint
        self.told: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.corpus, name)

    def read_block(self, split: str, index: int) -> list[Document]:
        """The documents of a block; none of a bad shard."""
        try:
            return self.corpus.read_block(split, index)
        except BadShard as error:
            if not self.corpus.skip_bad:
                raise
            if error.shard not in self.told:
                warn(f"not measured on: {error}")
            self.told.add(error.shard)
            return []


def tell_skipped(reason: str, count: int) -> None:
    """Loudly: which shard, why, how many so far."""
    warn(f"SKIPPED A BAD SHARD ({count} so far): {reason}")


Recorded = dict[str, Any]  # what Corpus.record returns


class Opening:
    """Makes the shards of a corpus, leaving out bad ones if that may be, and keeping the places they had before."""

    def __init__(
        self, skip_bad: bool = False, skipped: dict[str, str] | None = None, recorded: Recorded | None = None
    ) -> None:
        self.skip_bad, self.skipped, self.recorded = skip_bad, dict(skipped or {}), recorded

    def attempt(self, action: Callable[..., Result], path: Source, *more: Any) -> Result | None:
        """action(path, ...); None if the shard is bad and left out."""
        try:
            return action(path, *more)
        except BadShard as error:
            self.leave_out(error)
            return None

    def leave_out(self, error: BadShard) -> None:
        """Note and tell a bad shard, or raise the error with the flag that would have gone on."""
        if not self.skip_bad:
            raise BadShard(f"{error}{THE_FLAG}", error.shard) from error
        if error.shard not in self.skipped:
            self.skipped[error.shard] = str(error)
            tell_skipped(str(error), len(self.skipped))

    def part(self, path: Source, source: str | None = None, by_hash: bool = False) -> Part | None:
        """make_part, or None for a shard that is left out."""
        return None if str(path) in self.skipped else self.attempt(make_part, path, source, by_hash)

    def parts(self, paths: Iterable[Source], source: str | None = None, by_hash: bool = False) -> list[Part]:
        """The shards that are not left out."""
        return [part for path in paths if (part := self.part(path, source, by_hash))]

    def corpus(self, name: str, train: list[Part], val: list[Part], val_limit: int = VAL_LIMIT) -> Corpus:
        """The corpus of these shards, or of the recorded ones as far as these are they. If none is, this is other data,
        and nothing is said of shards that are gone."""
        recorded = self.recorded or {split: [] for split in SPLITS}
        before = {split: [Part.from_dict(values) for values in recorded[split]] for split in SPLITS}
        known = {part.digest for split in SPLITS for part in before[split]}
        if any(part.digest in known for part in train + val):
            val_limit = int(recorded["val_limit"])
            left_out = {PurePath(shard).name for shard in self.skipped}
            found = {str(part.path): part for part in train + val}
            new = [part for part in found.values() if part.digest not in known and part.path.name not in left_out]
            train, val = ([self.as_before(part, found) for part in before[split]] for split in SPLITS)
            train += new
        return Corpus(name, train, val, val_limit, skip_bad=self.skip_bad, skipped=self.skipped)

    def as_before(self, before: Part, found: dict[str, Part]) -> Part:
        """A shard in the place it had, even if it was moved; left out, if it may be, when it is gone or changed."""
        path = str(before.path)
        if path in self.skipped:
            return before
        now = found.get(path)
        if now is None or now.digest != before.digest:
            now = next((part for part in found.values() if part.digest == before.digest), now)
        if now is None or (now.digest != before.digest and self.skip_bad):
            what = "is gone" if now is None else "has changed"
            self.leave_out(BadShard(f"{path} {what} since the run began", path))
            return before
        return replace(now, by_hash=before.by_hash)


def make_part(path: Source, source: str | None = None, by_hash: bool = False) -> Part:
    """Look at a parquet file's footer: columns, row groups, digest. BadShard if it is missing or damaged, UserError if
    it cannot be used."""
    with open_parquet(path) as file:
        text_columns(path, file)
        blocks = file.metadata.num_row_groups
        footer_bytes = file.metadata.serialized_size
    if isinstance(path, RemoteFile):
        size, footer = path.size, path.footer()
    else:
        with open(path, "rb") as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(max(0, size - footer_bytes - 8))
            footer = raw.read()
    digest = hashlib.blake2b(os.fsencode(path.name) + f"\0{size}\0".encode() + footer, digest_size=16)
    return Part(path, source or stem_of(path), blocks, by_hash, digest.digest())
