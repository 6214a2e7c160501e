"""Where documents come from: the starter corpus in the package, your own files, or public shards.

All of them end as parquet files read one row group, here called a block, at a time. Blocks are what makes
everything above simple: a block can be read without reading what stands before it, so any process can start
anywhere; an epoch's order is a permutation of block numbers; a place in the data is a few integers that fit
in a checkpoint; and memory holds a block or two, whether the corpus is ten megabytes or ten terabytes.
"""

import argparse
import glob
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

from nanochat.common import BadShard, UserError, debug_enabled, get_base_dir
from nanochat.data.corpus import SPLITS, Corpus, Opening, Part, Recorded, make_part
from nanochat.data.download import DEFAULT_SET, HUB_SETS, HubSet, download_shards, hub_folder
from nanochat.data.remote import RemoteFile, find_remote, is_url
from nanochat.data.textfiles import MIB, Source, kind_of, open_parquet, parquet_documents, text_columns
from nanochat.data.to_parquet import Tally, convert

__all__ = ["Corpus", "Part", "resolve_corpus", "starter_corpus"]

MAX_BLOCK_ROWS, MAX_BLOCK_BYTES = 8192, 64 * MIB  # a parquet with larger row groups is converted first


def resolve_corpus(
    data: str,
    base_dir: Path,
    *,
    skip_bad: bool = False,
    skipped: dict[str, str] | None = None,
    recorded: Recorded | None = None,
) -> Corpus:
    """The corpus that --data names.

    "" is downloaded shards if there are any, else the starter corpus; "starter", "fineweb-edu" and
    "climbmix" are those; anything else is a file, a folder (searched to its depth, hidden files left out)
    or a glob of parquet, .jsonl and .txt files, the latter two also as .gz or .zst; or a URL of these.

    Starter and public sets are split by file, your own data by document hash (see document_hash). Raises
    UserError for data that is missing, empty or without text, BadShard for a damaged file unless skip_bad.
    `skipped` (shard -> why) are left out in any case. `recorded` is what an earlier session of the same run found
    (Corpus.record): its shards keep their places, whatever has become of those that may be skipped.
    """
    if not data:
        found = (name for name in HUB_SETS if any(hub_folder(name, base_dir).glob("shard_*.parquet")))
        data = next(found, "starter")
    opening = Opening(skip_bad, skipped or {}, recorded)
    if data == "starter":
        corpus = starter_corpus()
    elif data in HUB_SETS:
        corpus = hub_corpus(HUB_SETS[data], base_dir, opening)
    else:
        corpus = own_corpus(data, base_dir, opening)
    corpus.token_folder = base_dir / "tokens"
    return corpus


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


def hub_corpus(hub: HubSet, base_dir: Path, opening: Opening) -> Corpus:
    """The shards of a public set that are on disk."""
    folder = hub_folder(hub.name, base_dir)
    shards = sorted(folder.glob("shard_*.parquet"))
    train, val = [path for path in shards if path.name != hub.val_name], folder / hub.val_name
    if not shards:
        raise UserError(f"no shards of {hub.name} in {folder}; download some with: {hub.command}")
    if not train or val not in shards:
        missing = "its training shards are" if not train else f"its validation shard {hub.val_name} is"
        raise UserError(f"{hub.name} is not complete: {missing} not in {folder}; finish with: {hub.command}")
    return opening.corpus(hub.name, opening.parts(train, hub.name), opening.parts([val], hub.name))


# ---------------------------------------------------------------------------------------------------
# Your own data


def own_corpus(data: str, base_dir: Path, opening: Opening) -> Corpus:
    """A corpus over files of the user's: parquet with small row groups in place, everything else converted.

    Converted shards hold one split each. Files read in place hold both, and each block is filtered.
    """
    paths = [path for path in find_files(data, base_dir) if str(path) not in opening.skipped]
    remote = [path for path in paths if isinstance(path, RemoteFile) and kind_of(path) == ".parquet"]
    if remote:
        remote[0].remote.fetch_footers(remote)
    small = {path for path in paths if kind_of(path) == ".parquet" and opening.attempt(has_small_blocks, path)}
    in_place = [path for path in paths if path in small and str(path) not in opening.skipped]
    rest = [path for path in paths if path not in small]
    train, val, tally = convert_good(rest, base_dir, opening)
    for path in in_place:
        with_it = replace(tally)  # a file that is left out half way counts for nothing
        opening.attempt(tally_in_place, path, with_it)
        tally = tally if str(path) in opening.skipped else with_it
    if tally.smallest >= tally.largest and not opening.recorded:
        count = "no document" if tally.largest < 0 else "only one document"
        raise UserError(f"--data {data}: {count} found; it takes two different ones, to train on and to validate")
    shared = opening.parts(in_place, by_hash=True)
    if tally.train and tally.val:
        return opening.corpus(data, shared + opening.parts(train), shared + opening.parts(val))
    # Small data, all on one side of the usual limit: the document with the smallest hash is for validation.
    shared += opening.parts(train + val, by_hash=True)
    return opening.corpus(data, shared, shared, val_limit=tally.smallest + 1)


def convert_good(paths: Sequence[Source], base_dir: Path, opening: Opening) -> tuple[list[Path], list[Path], Tally]:
    """convert(paths), anew without a bad one for as long as there are any, if they may be left out."""
    while True:
        paths = [path for path in paths if str(path) not in opening.skipped]
        try:
            return convert(paths, base_dir) if paths else ([], [], Tally())
        except BadShard as error:
            opening.leave_out(error)


def has_small_blocks(path: Source) -> bool:
    """True if every row group fits in memory comfortably. Checks the columns on the way."""
    with open_parquet(path) as file:
        text_columns(path, file)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    return all(group.num_rows <= MAX_BLOCK_ROWS and group.total_byte_size <= MAX_BLOCK_BYTES for group in groups)


def tally_in_place(path: Source, tally: Tally) -> None:
    """Read on until both splits are known to have a document: soon, but in a small corpus to the end."""
    if tally.train and tally.val:
        return
    for document in parquet_documents(path, ""):
        tally.count(document.text)
        if tally.train and tally.val:
            return


def find_files(data: str, base_dir: Path) -> Sequence[Source]:
    """The usable files that a path, folder, glob or URL stands for, sorted. UserError if there are none."""
    accepted = "parquet, .jsonl or .txt (the latter two also as .gz or .zst)"
    if data.startswith("file://"):
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
        raise UserError(f"--data {data}: cannot look there ({error.strerror})") from error
    usable = sorted({path for path in paths if kind_of(path)})
    if not usable:
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
