"""Where documents come from: the name after --data becomes a `Corpus`.

How a document reaches the model, file by file:

    dataset.py                --data names a source; `open_corpus` opens it, the same on all ranks
    data/corpus.py            Corpus: two splits of row groups, each a list of documents, readable in any order
    data/shards.py            ... of parquet files: the starter corpus, public sets, the user's own files
    data/own_files.py           finds them (listing.py), has to_parquet.py rewrite what cannot be read by row group
    data/parquet.py             reads documents out of row groups; data/textfiles.py out of other files: rows.py parses
                                JSON and CSV, text_stream.py decompresses, checks UTF-8 and makes line ends alike
    data/remote.py              reads files behind URLs: filesystems.py lists them, range_cache.py keeps byte ranges
    data/document_order.py    shuffles: (seed, epoch, stream) -> the order of documents
    data/pretokenized.py        has tokens instead of text where scripts/tok_data.py made them beforehand
    data/row_streams.py       tokenises and packs (data/packing.py) into rows of T+1 tokens, in independent streams
    data/batches.py           a thread makes batches ahead of need
    dataloader.py             PretrainLoader: the rows of a rank's streams as (B, T) batches, with a state to resume

Row groups keep all of this simple. One can be read without what precedes it, so any rank can start anywhere; an epoch
is a permutation of indices; a position in the data is a few integers that fit in a checkpoint; and memory holds a few
row groups, whether the corpus is ten megabytes or ten terabytes.

Another source (a SQL table, say) is a subclass of Corpus in a new file, and one line in `resolve_corpus`.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nanochat.common import UserError, debug_enabled, get_base_dir, json_hash, warn, write_json
from nanochat.common.files import read_json
from nanochat.common.output import failsafe_output
from nanochat.data.corpus import SPLITS, VAL_LIMIT, BadShards, Corpus, Record
from nanochat.data.download import DEFAULT_SET, HUB_SETS, HubSet, download_shards, hub_folder
from nanochat.data.listing import shown, split_entries
from nanochat.data.own_files import open_own_files
from nanochat.data.parquet import TextOptions
from nanochat.data.shards import ShardCorpus, ShardOpener, open_shard
from nanochat.runtime import Runtime

__all__ = ["Corpus", "SavedCorpus", "open_corpus", "resolve_corpus", "save_record", "starter_corpus"]

RECORD = "corpus.json"  # in a run's folder: Corpus.record() of its first session

STARTER_VAL = "starter-val"  # in --data: validate on the starter corpus's validation text
KNOWN_NAMES = ("starter", STARTER_VAL, *HUB_SETS)


def resolve_corpus(
    data: str,
    base_dir: Path,
    *,
    text_field: str = "text",
    skip_bad: bool = False,
    skipped: dict[str, str] | None = None,
    recorded: Record | None = None,
) -> Corpus:
    """The corpus that --data names.

    "" is the first public set with downloaded shards, else the starter corpus; "starter", "fineweb-edu" and "climbmix"
    are those; anything else is files of the kinds in textfiles.KINDS: paths, folders (with their subfolders, hidden
    files left out), globs and URLs, separated by commas, also beside those names. `text_field` is the field or column
    with the text. "starter-val" beside them makes the starter corpus's validation text the only one, so that figures
    of models of different texts compare.

    Starter and public sets are split by file, own data by document hash (see document_hash). Raises UserError for
    data that is missing, empty or without text, BadShard for a damaged file unless skip_bad. `skipped` (shard -> why)
    are skipped in any case. `recorded` is Corpus.record() of an earlier session of the same run: its shards keep
    their places, even those that are skipped.
    """
    if not data:
        downloaded = (name for name in HUB_SETS if any(hub_folder(name, base_dir).glob("shard_*.parquet")))
        data = next(downloaded, "starter")
    opener = ShardOpener(base_dir, BadShards(skip_bad, dict(skipped or {})), recorded, TextOptions(text_field))
    entries = split_entries(data, KNOWN_NAMES)
    if STARTER_VAL in entries or (len(entries) > 1 and any(entry in KNOWN_NAMES for entry in entries)):
        return mixed_corpus(entries, opener)
    if data == "starter":
        return starter_corpus(base_dir)
    if data in HUB_SETS:
        return hub_corpus(HUB_SETS[data], opener)
    return open_own_files(data, opener, known_names=KNOWN_NAMES)


class SavedCorpus(NamedTuple):
    """What a checkpoint and its run's folder say about the corpus."""

    step: int
    fingerprint: str
    skipped: dict[str, str]
    record: Record | None

    @classmethod
    def load(cls, run: Path, step: int, fingerprint: str, loader_state: Mapping[str, Any]) -> "SavedCorpus":
        """From the run's folder and the checkpoint of `step`. A damaged or another corpus's record is not used."""
        record = load_record(run / RECORD)
        record = record if record and record["fingerprint"] == fingerprint else None
        return cls(step, fingerprint, BadShards.from_arrays(loader_state), record)


def save_record(corpus: Corpus, run: Path) -> None:
    """Keep in a run's folder what later sessions need to open the same corpus."""
    record = corpus.record()
    write_json(run / RECORD, {**record, "checksum": json_hash(record)})


def load_record(path: Path) -> Record | None:
    """The record in a run's folder; None if there is none, or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        record = read_json(path)
        checksum = record.pop("checksum", None)  # absent in those of older runs
        intact = "fingerprint" in record and checksum in (None, json_hash(record))
    except (UserError, AttributeError, TypeError):
        intact = False
    if not intact:
        warn(f"{path} is damaged: resuming without it, which needs every file of the data that the run began with")
    return record if intact else None


def open_corpus(
    data: str,
    base_dir: Path,
    runtime: Runtime,
    *,
    text_field: str = "text",
    skip_bad: bool = False,
    saved: SavedCorpus | None = None,
) -> Corpus:
    """resolve_corpus() for a run: the same corpus on all ranks. Collective: every rank must call it.

    Rank 0 opens it first (and converts files if needed); the shards it skips are skipped by all. With `saved`, shards
    keep their places and what was skipped stays so. Raises UserError if ranks find different data, or data other than
    the checkpoint's.
    """
    skipped, recorded = (saved.skipped, saved.record) if saved else ({}, None)
    opened: list[Corpus] = []
    resolve = partial(resolve_corpus, data, base_dir, text_field=text_field, skip_bad=skip_bad, recorded=recorded)

    def open_first() -> dict[str, str]:
        opened.append(resolve(skipped=skipped))
        return opened[0].bad_shards.skipped

    skipped = runtime.broadcast(open_first, "opening the data")
    corpus = opened[0] if opened else resolve(skipped=skipped)
    own = f"{corpus.fingerprint} {sorted(corpus.bad_shards.skipped)}"
    for rank, other in enumerate(found := runtime.all_gather(own, "comparing the data")):
        if other != found[0]:
            raise UserError(f"--data differs between ranks: rank {rank} finds other files than rank 0")
    if saved and saved.fingerprint != corpus.fingerprint:
        same = "give the same --data"
        if {"starter", STARTER_VAL} & set(corpus.name.split(",")):
            same += " with the version of nanochat that began the run, as the starter corpus may be another one now"
        raise UserError(
            f"the data has changed since step {saved.step} was saved: cannot resume exactly; "
            f"{same}, or start a new run with --init-from"
        )
    return corpus


# ---------------------------------------------------------------------------------------------------
# Starter and public sets


def starter_dir() -> Path:
    """The package's folder of starter data."""
    return Path(str(files("nanochat"))) / "starter"


def starter_corpus(base_dir: Path | None = None) -> ShardCorpus:
    """The corpus in the package; with a base folder, its token files are used."""
    train, val = (starter_dir() / f"{split}.parquet" for split in SPLITS)
    shards = [open_shard(train, "starter")], [open_shard(val, "starter")]
    return ShardCorpus("starter", *shards, token_folder=base_dir / "tokens" if base_dir else None)


def hub_corpus(hub: HubSet, opener: ShardOpener) -> ShardCorpus:
    """The shards of a public set that are on disk."""
    folder = hub_folder(hub.name, opener.base_dir)
    shards = sorted(folder.glob("shard_*.parquet"))
    train, val = [path for path in shards if path.name != hub.val_name], folder / hub.val_name
    if not shards:
        raise UserError(f"no shards of {hub.name} in {folder}; download some with: {hub.command}")
    if not train or val not in shards:
        missing = "its training shards are" if not train else f"its validation shard {hub.val_name} is"
        raise UserError(f"{hub.name} is not complete: {missing} not in {folder}; finish with: {hub.command}")
    return opener.corpus(hub.name, opener.open(train, hub.name), opener.open([val], hub.name))


def mixed_corpus(entries: Sequence[str], opener: ShardOpener) -> Corpus:
    """Starter or public sets beside own files: the shards of all, each split as it is alone, unless starter-val is
    there: then it is the validation text, and all of the others is trained on but what is validation text by file."""
    alone = replace(opener, recorded=None)
    named = dict.fromkeys(entry for entry in entries if entry in KNOWN_NAMES)
    sets = [name for name in named if name != STARTER_VAL]
    parts = [starter_corpus() if name == "starter" else hub_corpus(HUB_SETS[name], alone) for name in sets]
    val_limit, files = VAL_LIMIT, ""
    if own := [entry for entry in entries if entry not in named]:
        parts.append(open_own_files(",".join(own), alone, known_names=KNOWN_NAMES))
        val_limit, files = parts[-1].val_limit, f"{', '.join(named)}; {parts[-1].files}"
    if not parts:
        raise UserError(f"--data={','.join(entries)} names no text to train on: give {STARTER_VAL} beside one")
    train, val = ([shard for part in parts for shard in part.shards[split]] for split in SPLITS)
    if STARTER_VAL in named:
        train, val = [replace(shard, by_hash=False) for shard in train], starter_corpus().shards["val"]
    corpus = opener.corpus(shown(entries), train, val, val_limit)
    corpus.files = files
    return corpus


# ---------------------------------------------------------------------------------------------------
# python -m nanochat.dataset


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line; UserError if it is wrong."""
    parser = Parser(prog="python -m nanochat.dataset", description="Download shards of a public data set.")
    about = "how many training shards to have, about 100 MB each (-1: all); the validation shard always comes too"
    parser.add_argument("-n", "--num-files", type=int, required=True, help=about)
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="downloads at a time (default 4)")
    parser.add_argument("--set", choices=list(HUB_SETS), default=DEFAULT_SET, help=f"default {DEFAULT_SET}")
    parser.add_argument("--endpoint", help="another hub than https://huggingface.co")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words[1:] if words[:1] == ["--"] else words)  # torchrun leaves a leading --
    max_files = HUB_SETS[args.set].last_shard
    if args.num_files == -1:
        args.num_files = max_files
    if not 1 <= args.num_files <= max_files:
        parser.error(f"-n must be 1 to {max_files} (or -1 for all), got {args.num_files}")
    if args.num_workers < 1:
        parser.error(f"-w must be at least 1, got {args.num_workers}")
    if args.endpoint and not re.match(r"https?://[\w.-]+(:\d+)?(/|$)", args.endpoint):
        parser.error(f"--endpoint must look like https://huggingface.co, got {args.endpoint}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Download shards. Exit codes: 0 done, 1 the disk failed, 2 a user error or no network, 130 interrupted."""
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
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    with failsafe_output():
        code = main()
    sys.exit(code)
