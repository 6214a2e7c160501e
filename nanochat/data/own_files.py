"""The corpus of files that --data names: parquet with small row groups in place, everything else converted first."""

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nanochat.common import BadShard, UserError
from nanochat.data.corpus import Corpus
from nanochat.data.parquet import open_parquet, parquet_documents, text_columns
from nanochat.data.remote import RemoteFile, Source, find_remote, is_url
from nanochat.data.shards import ShardOpener
from nanochat.data.textfiles import MIB, kind_of
from nanochat.data.to_parquet import Tally, convert

MAX_GROUP_ROWS, MAX_GROUP_BYTES = 8192, 64 * MIB  # parquet with larger row groups is converted


def open_own_files(data: str, opener: ShardOpener, known_names: Sequence[str] = ()) -> Corpus:
    """The corpus of the files, folders or URLs that `data` stands for.

    Converted shards hold one split each; files read in place hold both, told apart by document hash. `known_names` are
    listed where nothing is found.
    """
    bad = opener.bad_shards
    paths = [path for path in find_files(data, opener.base_dir, known_names) if path not in bad]
    remote = [path for path in paths if isinstance(path, RemoteFile) and kind_of(path) == ".parquet"]
    if remote:
        remote[0].remote.fetch_footers(remote)
    small = {path for path in paths if kind_of(path) == ".parquet" and opener.attempt(has_small_row_groups, path)}
    in_place = [path for path in paths if path in small and path not in bad]
    train, val, tally = convert_good([path for path in paths if path not in small], opener)
    for path in in_place:
        with_path = replace(tally)  # a file that turns out to be bad half way does not count
        opener.attempt(tally_in_place, path, with_path)
        tally = tally if path in bad else with_path
    if tally.smallest >= tally.largest and not opener.recorded:
        count = "no document" if tally.largest < 0 else "only one document"
        raise UserError(f"--data {data}: {count} found; need two different ones, to train on and to validate")
    shared = opener.open(in_place, by_hash=True)
    if tally.train and tally.val:
        return opener.corpus(data, shared + opener.open(train), shared + opener.open(val))
    # Small data, all on one side of the usual limit: the document with the smallest hash is for validation.
    shared += opener.open(train + val, by_hash=True)
    return opener.corpus(data, shared, shared, val_limit=tally.smallest + 1)


def convert_good(paths: Sequence[Source], opener: ShardOpener) -> tuple[list[Path], list[Path], Tally]:
    """convert(paths), repeated without each bad file if those may be skipped."""
    while True:
        paths = [path for path in paths if path not in opener.bad_shards]
        try:
            return convert(paths, opener.base_dir) if paths else ([], [], Tally())
        except BadShard as error:
            opener.bad_shards.skip(error)


def has_small_row_groups(path: Source) -> bool:
    """True if every row group fits in memory comfortably. Raises UserError if there is no column of text."""
    with open_parquet(path) as file:
        text_columns(path, file)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return all(group.num_rows <= MAX_GROUP_ROWS and group.total_byte_size <= MAX_GROUP_BYTES for group in groups)


def tally_in_place(path: Source, tally: Tally) -> None:
    """Count documents until both splits have one: a few row groups, or all of a small corpus."""
    if not (tally.train and tally.val):
        for document in parquet_documents(path, ""):
            tally.assign(document.text)
            if tally.train and tally.val:
                return


def find_files(data: str, base_dir: Path, known_names: Sequence[str] = ()) -> Sequence[Source]:
    """The usable files that a path, folder, glob or URL stands for, sorted. Raises UserError if there are none."""
    accepted = "parquet, .jsonl or .txt (the latter two also as .gz or .zst)"
    data = data.removeprefix("file://")
    if is_url(data):
        remote = find_remote(data, kind_of, base_dir)
        if not remote:
            raise UserError(f"--data {data}: no file there is {accepted}")
        return remote
    try:
        given = Path(data).expanduser()
        matches = [given] if given.exists() else [Path(match) for match in glob.glob(str(given), recursive=True)]
        paths = [path for match in matches for path in (walk(match) if match.is_dir() else [match])]
    except OSError as error:
        raise UserError(f"--data {data}: cannot read it ({error.strerror})") from error
    if not matches:
        names = ", ".join(known_names)
        raise UserError(f"--data {data}: no such file or folder; give a path, a glob or one of {names}")
    usable = sorted({path for path in paths if kind_of(path)})
    if not usable:
        found = "the folder is empty" if not paths else f"none of {len(paths)} file(s) is {accepted}"
        raise UserError(f"--data {data}: {found}")
    return usable


def walk(folder: Path) -> list[Path]:
    """All files below a folder except hidden ones. Raises OSError for a folder that may not be read."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would ignore it

    paths = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(where) / name for name in names if not name.startswith(".")]
    return paths
