"""Where documents come from: the starter corpus in the package, your own files, or public shards.

All of them end as parquet files read one row group, here called a block, at a time. Blocks are what makes
everything above simple: a block can be read without reading what stands before it, so any process can start
anywhere; an epoch's order is a permutation of block numbers; a place in the data is a few integers that fit
in a checkpoint; and memory holds a block or two, whether the corpus is ten megabytes or ten terabytes.
"""

import argparse
import glob
import hashlib
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

from nanochat.common import UserError, debug_enabled, get_base_dir
from nanochat.convert import VAL_LIMIT, Tally, convert
from nanochat.download import DEFAULT_SET, HUB_SETS, HubSet, download_shards, hub_folder
from nanochat.textfiles import (
    MIB,
    Document,
    document_hash,
    kind_of,
    open_parquet,
    parquet_documents,
    read_row_group,
    stem_of,
    text_columns,
)

SPLITS = ("train", "val")
MAX_BLOCK_ROWS, MAX_BLOCK_BYTES = 8192, 64 * MIB  # a parquet with larger row groups is converted first
KEPT_SIZE = 64 * MIB  # characters of validation text to remember


@dataclass(frozen=True)
class Part:
    """One parquet file of a corpus."""

    path: Path
    source: str  # of documents that do not name their own
    blocks: int  # row groups
    by_hash: bool = False  # it holds both splits' documents, told apart by hash while reading
    digest: bytes = b""


class Corpus:
    """Documents in two splits, "train" and "val", each a sequence of blocks that can be read in any order.

    `fingerprint` changes when the files do (names, sizes, or footers, which hold every row group's size and
    extremes), so that a run is not resumed on other data unnoticed. Several threads may read at once.
    """

    def __init__(self, name: str, train: list[Part], val: list[Part], val_limit: int = VAL_LIMIT) -> None:
        self.name, self.val_limit = name, val_limit
        self.parts = {"train": train, "val": val}
        self.ends = {split: list(accumulate(part.blocks for part in self.parts[split])) for split in SPLITS}
        digest = hashlib.blake2b(val_limit.to_bytes(9, "big"), digest_size=16)
        for split in SPLITS:
            for part in self.parts[split]:
                digest.update(split.encode() + b"\0" + part.digest)
        self.fingerprint = digest.hexdigest()
        self.kept: dict[int, list[Document]] = {}  # validation blocks of files that hold both splits
        self.kept_size = 0

    def num_blocks(self, split: str) -> int:
        """How many blocks a split has."""
        return self.ends[split][-1] if self.ends[split] else 0

    def read_block(self, split: str, index: int) -> list[Document]:
        """The documents of block `index` in 0 .. num_blocks(split) - 1. May be an empty list."""
        assert 0 <= index < self.num_blocks(split), f"block {index} of {self.num_blocks(split)}"
        if split == "val" and index in self.kept:
            return list(self.kept[index])
        which = bisect_right(self.ends[split], index)
        part = self.parts[split][which]
        documents = read_row_group(part.path, index - self.ends[split][which] + part.blocks, part.source)
        if not part.by_hash:
            return documents
        want_val = split == "val"
        documents = [d for d in documents if (document_hash(d.text) < self.val_limit) == want_val]
        if want_val and self.kept_size < KEPT_SIZE:  # evaluations come again, and a block yields one document in 100
            self.kept_size += sum(len(d.text) for d in documents)
            self.kept[index] = documents
        return list(documents)

    def iter_documents(self, split: str) -> Iterator[Document]:
        """All documents of a split in file order; one block in memory at a time."""
        for index in range(self.num_blocks(split)):
            yield from self.read_block(split, index)


def resolve_corpus(data: str, base_dir: Path) -> Corpus:
    """The corpus that --data names.

    "" is downloaded shards if there are any, else the starter corpus; "starter", "fineweb-edu" and
    "climbmix" are those; anything else is a file, a folder (searched to its depth, hidden files left out)
    or a glob of parquet, .jsonl and .txt files, the latter two also as .gz or .zst.

    Starter and public sets are split by file, your own data by document hash (see document_hash). Raises
    UserError for data that is missing, empty, damaged or without text.
    """
    if not data:
        found = (name for name in HUB_SETS if any(hub_folder(name, base_dir).glob("shard_*.parquet")))
        data = next(found, "starter")
    if data == "starter":
        return starter_corpus()
    return hub_corpus(HUB_SETS[data], base_dir) if data in HUB_SETS else own_corpus(data, base_dir)


def make_part(path: Path, source: str | None = None, by_hash: bool = False) -> Part:
    """Look at a parquet file's footer: columns, row groups, digest. UserError if it cannot be used."""
    with open_parquet(path) as file:
        text_columns(path, file)
        blocks = file.metadata.num_row_groups
        footer_bytes = file.metadata.serialized_size
    with open(path, "rb") as raw:
        size = raw.seek(0, os.SEEK_END)
        raw.seek(max(0, size - footer_bytes - 8))
        footer = raw.read()
    digest = hashlib.blake2b(os.fsencode(path.name) + f"\0{size}\0".encode() + footer, digest_size=16)
    return Part(path, source or stem_of(path), blocks, by_hash, digest.digest())


# ---------------------------------------------------------------------------------------------------
# Starter and public sets


def starter_dir() -> Path:
    """Where the package keeps the starter data."""
    return Path(str(files("nanochat"))) / "starter"


def starter_corpus() -> Corpus:
    """The corpus in the package."""
    train, val = (starter_dir() / f"{split}.parquet" for split in SPLITS)
    for path in (train, val):
        if not path.exists():
            raise UserError(f"the starter corpus is missing ({path}); install nanochat again, or set --data")
    return Corpus("starter", [make_part(train, "starter")], [make_part(val, "starter")])


def hub_corpus(hub: HubSet, base_dir: Path) -> Corpus:
    """The shards of a public set that are on disk."""
    folder = hub_folder(hub.name, base_dir)
    shards = sorted(folder.glob("shard_*.parquet"))
    train, val = [path for path in shards if path.name != hub.val_name], folder / hub.val_name
    if not shards:
        raise UserError(f"no shards of {hub.name} in {folder}; download some with: {hub.command}")
    if not train or val not in shards:
        missing = "its training shards are" if not train else f"its validation shard {hub.val_name} is"
        raise UserError(f"{hub.name} is not complete: {missing} not in {folder}; finish with: {hub.command}")
    return Corpus(hub.name, [make_part(path, hub.name) for path in train], [make_part(val, hub.name)])


# ---------------------------------------------------------------------------------------------------
# Your own data


def own_corpus(data: str, base_dir: Path) -> Corpus:
    """A corpus over files of the user's: parquet with small row groups in place, everything else converted.

    Converted shards hold one split each. Files read in place hold both, and each block is filtered.
    """
    paths = find_files(data)
    in_place = [path for path in paths if kind_of(path) == ".parquet" and has_small_blocks(path)]
    rest = sorted(set(paths) - set(in_place))
    train, val, tally = convert(rest, base_dir) if rest else ([], [], Tally())
    tally_in_place(in_place, tally)
    if tally.smallest >= tally.largest:
        count = "no document" if tally.largest < 0 else "only one document"
        raise UserError(f"--data {data}: {count} found; it takes two different ones, to train on and to validate")
    shared = [make_part(path, by_hash=True) for path in in_place]
    if tally.train and tally.val:
        return Corpus(data, shared + [make_part(path) for path in train], shared + [make_part(path) for path in val])
    # Small data, all on one side of the usual limit: the document with the smallest hash is for validation.
    shared += [make_part(path, by_hash=True) for path in train + val]
    return Corpus(data, shared, shared, val_limit=tally.smallest + 1)


def has_small_blocks(path: Path) -> bool:
    """True if every row group fits in memory comfortably. Checks the columns on the way."""
    with open_parquet(path) as file:
        text_columns(path, file)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return all(group.num_rows <= MAX_BLOCK_ROWS and group.total_byte_size <= MAX_BLOCK_BYTES for group in groups)


def tally_in_place(paths: list[Path], tally: Tally) -> None:
    """Read on until both splits are known to have a document: soon, but in a small corpus to the end."""
    for path in paths:
        for document in parquet_documents(path, ""):
            if tally.train and tally.val:
                return
            tally.count(document.text)


def find_files(data: str) -> list[Path]:
    """The usable files that a path, folder or glob stands for, sorted. UserError if there are none."""
    try:
        given = Path(data).expanduser()
        matches = [given] if given.exists() else [Path(match) for match in glob.glob(str(given), recursive=True)]
        paths = [path for match in matches for path in (walk(match) if match.is_dir() else [match])]
    except OSError as error:
        raise UserError(f"--data {data}: cannot look there ({error.strerror})") from error
    usable = sorted({path for path in paths if kind_of(path)})
    if not usable:
        accepted = "parquet, .jsonl or .txt (the latter two also as .gz or .zst)"
        found = "the folder is empty" if not paths else f"none of {len(paths)} file(s) is {accepted}"
        raise UserError(f"--data {data}: {found if matches else nothing_there(data)}")
    return usable


def nothing_there(data: str) -> str:
    """Why a name led to nothing, with the names it may have meant."""
    names = ("starter", *HUB_SETS)
    if glob.has_magic(data):
        return "no file matches"
    close = get_close_matches(data, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"give a path, a glob or one of {', '.join(names)}"
    return f"no such file or folder; {hint}"


def walk(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones. Raises OSError for a folder that may not be read."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over it in silence

    paths = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(where) / name for name in names if not name.startswith(".")]
    return paths


# ---------------------------------------------------------------------------------------------------
# python -m nanochat.dataset


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; UserError for a wrong one."""
    parser = Parser(prog="python -m nanochat.dataset", description="Download shards of a public data set.")
    about = "how many training shards to have, about 100 MB each (-1: all); the validation shard always comes too"
    parser.add_argument("-n", "--num-files", type=int, required=True, help=about)
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="downloads at a time (default 4)")
    parser.add_argument("--set", choices=list(HUB_SETS), default=DEFAULT_SET, help=f"default {DEFAULT_SET}")
    parser.add_argument("--endpoint", help="another hub than https://huggingface.co")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words[1:] if words[:1] == ["--"] else words)  # torchrun leaves a -- in front
    most = HUB_SETS[args.set].last_shard
    if args.num_files == -1:
        args.num_files = most
    if not 1 <= args.num_files <= most:
        parser.error(f"-n must be 1 to {most} (or -1 for all), got {args.num_files}")
    if args.num_workers < 1:
        parser.error(f"-w must be at least 1, got {args.num_workers}")
    if args.endpoint and not re.match(r"https?://[\w.-]+(:\d+)?(/|$)", args.endpoint):
        parser.error(f"--endpoint must look like https://huggingface.co, got {args.endpoint}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Download as asked. Exit codes: 0 done, 1 the disk failed, 2 the user's mistake or no network, 130 interrupted."""
    try:
        args = parse(argv)
        hub, base_dir = HUB_SETS[args.set], get_base_dir()
        paths = download_shards(hub, args.num_files, base_dir, args.num_workers, endpoint=args.endpoint)
        print(f"{len(paths)} shards of {hub.name} are in {paths[0].parent}; train on them with --data {hub.name}")
        return 0
    except (UserError, OSError) as error:
        if debug_enabled():
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
