"""The corpus of files that --data names: parquet with small row groups in place, everything else converted first."""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nanochat.common import BadShard, UserError
from nanochat.data.listing import list_data, shown, split_entries, with_compressions
from nanochat.data.parquet import TextOptions, open_parquet, parquet_documents, text_columns
from nanochat.data.remote import RemoteFile, Source
from nanochat.data.shards import LISTING_VERSION, ShardCorpus, ShardOpener
from nanochat.data.text_stream import MIB
from nanochat.data.textfiles import KINDS, NoTextField, file_documents, kind_of
from nanochat.data.to_parquet import Tally, convert

MAX_GROUP_ROWS, MAX_GROUP_BYTES = 8192, 64 * MIB  # parquet with larger row groups is converted
OLD_KINDS = (".parquet", *with_compressions(".jsonl", ".txt"))  # see LISTING_VERSION


def open_own_files(data: str, opener: ShardOpener, known_names: Sequence[str] = ()) -> ShardCorpus:
    """The corpus of the files, folders or URLs that `data` stands for.

    Converted shards hold one split each; files read in place hold both, told apart by document hash. `known_names` are
    listed where nothing is found.
    """
    old = opener.recorded is not None and opener.recorded.get("listing") != LISTING_VERSION
    bad, options = opener.bad_shards, opener.options._replace(clean=not old)
    listing = list_data(
        data, OLD_KINDS if old else KINDS, opener.base_dir, known_names=known_names, follow_links=not old
    )
    name = shown(split_entries(data, known_names))
    paths = [path for path in listing.files if path not in bad]
    remote = [path for path in paths if isinstance(path, RemoteFile) and kind_of(path) == ".parquet"]
    for system in {file.remote for file in remote}:
        system.fetch_footers([file for file in remote if file.remote is system])
    small = {p for p in paths if kind_of(p) == ".parquet" and opener.attempt(has_small_row_groups, p, options.field)}
    in_place = [path for path in paths if path in small and path not in bad]
    train, val, tally = convert_good([path for path in paths if path not in small], opener, options)
    for path in in_place:
        with_path = replace(tally)  # a file that turns out to be bad half way does not count
        opener.attempt(tally_in_place, path, with_path, options)
        tally = tally if path in bad else with_path
    if tally.smallest >= tally.largest and not opener.recorded:
        count = "no document" if tally.largest < 0 else "only one document"
        raise UserError(f"--data {name}: {count} found; need two different ones, to train on and to validate")
    shared = opener.open(in_place, by_hash=True, options=options)
    if tally.train and tally.val:
        corpus = opener.corpus(name, shared + opener.open(train), shared + opener.open(val))
    else:
        # Small data, all on one side of the usual limit: the document with the smallest hash is for validation.
        shared += opener.open(train + val, by_hash=True)
        corpus = opener.corpus(name, shared, shared, val_limit=tally.smallest + 1)
    listing.leave_out(tally.left_out)
    corpus.files = listing.describe()
    return corpus


def convert_good(
    paths: Sequence[Source], opener: ShardOpener, options: TextOptions
) -> tuple[list[Path], list[Path], Tally]:
    """convert(paths), repeated without the bad files if those may be skipped."""
    while True:
        paths = [path for path in paths if path not in opener.bad_shards]
        try:
            return convert(paths, opener.base_dir, options) if paths else ([], [], Tally())
        except BadShard as error:
            opener.bad_shards.skip(error)
            after = [str(path) for path in paths].index(error.shard) + 1
            for path in paths[after:]:  # find the others now, not by one more conversion each
                opener.attempt(read_to_end, path, options)


def read_to_end(path: Source, options: TextOptions) -> None:
    """Read all documents of a file, for their errors. BadShard if it cannot be read to its end."""
    with suppress(NoTextField):  # the conversion decides
        deque(file_documents(path, options), maxlen=0)


def has_small_row_groups(path: Source, field: str) -> bool:
    """True if every row group fits in memory comfortably. Raises UserError if there is no column of text."""
    with open_parquet(path, field) as file:
        text_columns(path, file, field)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return all(group.num_rows <= MAX_GROUP_ROWS and group.total_byte_size <= MAX_GROUP_BYTES for group in groups)


def tally_in_place(path: Source, tally: Tally, options: TextOptions) -> None:
    """Count documents until both splits have one: a few row groups, or all of a small corpus."""
    if not (tally.train and tally.val):
        for document in parquet_documents(path, "", options):
            tally.assign(document.text)
            if tally.train and tally.val:
                return
