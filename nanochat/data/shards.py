"""A corpus of parquet files (shards), on disk or behind URLs.

A shard that cannot be read stops the run, or is skipped with --skip-bad-shards: its row groups are then empty, and the
indices of all others stay as they were. A resumed run opens its shards in the order its first session recorded, so
that this holds although a shard has gone, moved or come back in between.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any, TypeVar

from nanochat.common import BadShard
from nanochat.data.corpus import SPLITS, VAL_LIMIT, BadShards, Corpus, Document, Record, document_hash
from nanochat.data.parquet import (
    CLEANED,
    UNCHANGED,
    TextOptions,
    open_parquet,
    read_row_group,
    text_columns,
    text_ranges,
)
from nanochat.data.remote import RemoteFile, Source
from nanochat.data.text_stream import MIB
from nanochat.data.textfiles import stem_of

Result = TypeVar("Result")

LISTING_VERSION = 2  # in a record; 1, not written: only the kinds of OLD_KINDS were read, and no linked folders
VAL_CACHE_CHARS = 64 * MIB  # of validation documents kept in memory


@dataclass(frozen=True)
class Shard:
    """One file of a corpus."""

    path: Any  # Source, or the str of one that is not going to be read
    source: str  # of documents that do not name their own
    row_groups: int
    by_hash: bool = False  # it holds both splits, told apart by document hash while reading
    digest: bytes = b""  # of its name, size and footer, and of the text's column if that is not `text`
    options: TextOptions = UNCHANGED

    def to_dict(self) -> dict[str, Any]:
        """The shard as JSON, from which a later session can hold its place without the file, and read it alike."""
        return {
            "path": str(self.path),
            "source": self.source,
            "blocks": self.row_groups,
            "by_hash": self.by_hash,
            "digest": self.digest.hex(),
            **self.options._asdict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shard":
        """The inverse of to_dict, for a shard that is not going to be read."""
        digest = bytes.fromhex(values["digest"])
        options = TextOptions(values.get("field", "text"), values.get("clean", False))  # older records have neither
        return cls(values["path"], values["source"], values["blocks"], values["by_hash"], digest, options)

    def read(self, row_group: int) -> list[Document]:
        """The documents of a row group, of both splits. Raises BadShard."""
        return read_row_group(self.path, row_group, self.source, self.options)


def open_shard(
    path: Source, source: str | None = None, by_hash: bool = False, options: TextOptions = UNCHANGED
) -> Shard:
    """Read a parquet file's footer: columns, row groups, digest.

    Raises BadShard if the file is missing or damaged, UserError if it holds no text.
    """
    with open_parquet(path, options.field) as file:
        text_columns(path, file, options.field)
        row_groups = file.metadata.num_row_groups
        footer_bytes = file.metadata.serialized_size
    if isinstance(path, RemoteFile):
        size, footer = path.size, path.footer()
    else:
        with open(path, "rb") as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(max(0, size - footer_bytes - 8))
            footer = raw.read()
    digest = hashlib.blake2b(os.fsencode(path.name) + f"\0{size}\0".encode() + footer, digest_size=16)
    if options.field != "text":
        digest.update(b"\0" + options.field.encode("utf-8", "surrogateescape"))
    return Shard(path, source or stem_of(path), row_groups, by_hash, digest.digest(), options)


class ShardCorpus(Corpus):
    """The row groups of some shards per split, numbered through.

    The fingerprint covers each shard's name, size and footer (with every row group's size and extremes), not its
    folder. A document of a `by_hash` shard is for validation if its hash is below val_limit. Token files made
    beforehand are looked for in token_folder.
    """

    def __init__(
        self,
        name: str,
        train: list[Shard],
        val: list[Shard],
        val_limit: int = VAL_LIMIT,
        *,
        bad_shards: BadShards | None = None,
        token_folder: Path | None = None,
    ) -> None:
        self.shards = {"train": train, "val": val}
        self.val_limit, self.token_folder = val_limit, token_folder
        self._ends = {split: [0, *accumulate(shard.row_groups for shard in self.shards[split])] for split in SPLITS}
        self._val_cache: dict[int, list[Document]] = {}  # validation row groups of `by_hash` shards
        self._val_cache_chars = 0
        digest = hashlib.blake2b(val_limit.to_bytes(9, "big"), digest_size=16)
        for split in SPLITS:
            for shard in self.shards[split]:
                digest.update(split.encode() + b"\0" + shard.digest)
        super().__init__(name, digest.hexdigest(), bad_shards)

    def num_row_groups(self, split: str) -> int:
        return self._ends[split][-1]

    def locate(self, split: str, index: int) -> tuple[Shard, int]:
        """(the shard that holds row group `index` of a split, the row group's number in that shard)."""
        ends = self._ends[split]
        assert 0 <= index < ends[-1], f"row group {index} of {ends[-1]}"
        which = bisect_right(ends, index) - 1
        return self.shards[split][which], index - ends[which]

    def read(self, split: str, index: int) -> list[Document]:
        shard, number = self.locate(split, index)
        if shard.path in self.bad_shards:
            return []
        if split == "val" and index in self._val_cache:
            return list(self._val_cache[index])
        try:
            documents = shard.read(number)
        except BadShard as error:
            raise self.bad_shards.with_hint(error) from error
        if not shard.by_hash:
            return documents
        want_val = split == "val"
        documents = [d for d in documents if (document_hash(d.text) < self.val_limit) == want_val]
        if want_val and self._val_cache_chars < VAL_CACHE_CHARS:  # read at every evaluation, for 1 document in 100
            self._val_cache_chars += sum(len(d.text) for d in documents)
            self._val_cache[index] = documents
        return list(documents)

    def prefetch(self, split: str, indices: Iterable[int]) -> None:
        for index in indices:
            shard, number = self.locate(split, index)
            if isinstance(shard.path, RemoteFile) and shard.path not in self.bad_shards:
                shard.path.prefetch(text_ranges(shard.options.field), number)

    def record(self) -> Record:
        """The shards of each split, so that they get the same places in a later session."""
        splits = {split: [shard.to_dict() for shard in self.shards[split]] for split in SPLITS}
        known = {"fingerprint": self.fingerprint, "val_limit": str(self.val_limit), "listing": LISTING_VERSION}
        return known | splits


@dataclass
class ShardOpener:
    """Opens the shards of one corpus, skipping bad ones if allowed.

    `recorded` is the record of an earlier session of the same run, whose shards keep their places.
    """

    base_dir: Path
    bad_shards: BadShards
    recorded: Record | None = None
    options: TextOptions = CLEANED  # of the user's own files

    def attempt(self, action: Callable[..., Result], path: Source, *args: Any) -> Result | None:
        """action(path, *args), or None if the shard is bad and skipped."""
        try:
            return action(path, *args)
        except BadShard as error:
            self.bad_shards.skip(error)
            return None

    def open(self, paths: Iterable[Source], *args: Any, **kwargs: Any) -> list[Shard]:
        """open_shard(path, ...) of each path, without shards that are skipped."""
        good = (path for path in paths if path not in self.bad_shards)
        opened = (self.attempt(partial(open_shard, **kwargs), path, *args) for path in good)
        return [shard for shard in opened if shard]

    def corpus(self, name: str, train: list[Shard], val: list[Shard], val_limit: int = VAL_LIMIT) -> ShardCorpus:
        """The corpus of these shards, in their recorded places if any of them was recorded.

        If none was, this is other data, and missing shards are not reported one by one.
        """
        recorded = self.recorded or {split: [] for split in SPLITS}
        before = {split: [Shard.from_dict(values) for values in recorded[split]] for split in SPLITS}
        known = {shard.digest for split in SPLITS for shard in before[split]}
        if any(shard.digest in known for shard in train + val):
            val_limit = int(recorded["val_limit"])
            skipped = {PurePath(shard).name for shard in self.bad_shards.skipped}
            found = {str(shard.path): shard for shard in train + val}
            new = [shard for shard in found.values() if shard.digest not in known and shard.path.name not in skipped]
            train, val = ([self._find(shard, found) for shard in before[split]] for split in SPLITS)
            train += new
        tokens = self.base_dir / "tokens"
        return ShardCorpus(name, train, val, val_limit, bad_shards=self.bad_shards, token_folder=tokens)

    def _find(self, recorded: Shard, found: dict[str, Shard]) -> Shard:
        """The file of a recorded shard, even if it was moved; skipped, if allowed, when it is gone or has changed."""
        path = str(recorded.path)
        if path in self.bad_shards:
            return recorded
        now = found.get(path)
        if now is None or now.digest != recorded.digest:
            now = next((shard for shard in found.values() if shard.digest == recorded.digest), now)
        if now is None or (now.digest != recorded.digest and self.bad_shards.may_skip):
            problem = "is gone" if now is None else "has changed"
            self.bad_shards.skip(BadShard(f"{path} {problem} since the run began", path))
            return recorded
        return replace(now, by_hash=recorded.by_hash, options=recorded.options)
