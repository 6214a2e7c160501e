"""Rows of public data sets: from a local mirror, from the Hugging Face hub, or from the embedded sample.

All three hold the hub's schemas. A split is never replaced by another one.
"""

import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_datasets_dir

SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-(?P<count>\d{5})\.parquet")
SAMPLE_FILE = "benchmark_samples.json"


class DatasetMissing(UserError):
    """A public data set (or one split of it) is not at hand: neither in the mirror nor from the hub."""


class HubRows(Sequence[dict[str, Any]]):
    """The rows of one split, read as plain dicts; `origin` says in words where they came from."""

    def __init__(self, table: pa.Table, origin: str):
        self.table = table
        self.origin = origin

    def require(self, *columns: str) -> "HubRows":
        """These rows; raises UserError if a column is missing."""
        if missing := [column for column in columns if column not in self.table.column_names]:
            there = ", ".join(self.table.column_names)
            raise UserError(f"{self.origin} has no column {missing[0]!r} (columns: {there}); is it another data set?")
        return self

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.table.take(list(range(len(self))[index])).to_pylist()
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.table.slice(index % len(self), 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()


def load_hub_rows(repo: str, config: str, split: str, *, sample: bool = False) -> HubRows:
    """Rows of `split` of data set `repo`.

    Looked for in $NANOCHAT_DATASETS_DIR (hub layout: repo/config/split-XXXXX-of-XXXXX.parquet), then
    on the hub (downloaded once into the base folder's `hub/`). With `sample=True` a few embedded
    rows are used instead: enough to try the code, never to report a score.

    Raises DatasetMissing, one line, naming repo, split and the way to provide it.
    """
    if sample:
        return load_sample(repo, config, split)
    found: list[str] = []
    mirror = get_datasets_dir()
    if mirror is not None:
        folder = mirror / repo
        files, found = find_shards(folder, config, split)
        if files:
            return read_shards(files, f"{folder} ({split})")
    fetched, problem = download_split(repo, config, split)
    if fetched is not None:
        files, on_hub = find_shards(fetched, config, split)
        if files:
            return read_shards(files, f"hub {repo} ({split})")
        problem = f"the hub has no such split{among(on_hub)}"
    where = f"{mirror / repo} has {', '.join(found)} only" if mirror and found else problem
    raise DatasetMissing(
        f"data set {repo} ({config}), split {split!r} is not at hand: {where}; "
        f"connect to the internet or put its parquet files under NANOCHAT_DATASETS_DIR/{repo}/{config}/"
    )


def find_shards(folder: Path, config: str, split: str) -> tuple[list[Path], list[str]]:
    """The shard files of `split` in order, and the names of all splits there.

    The hub keeps single-config sets in `data/`. Raises UserError if a shard of the split is missing.
    """
    shards: list[Path] = []
    splits: set[str] = set()
    count = 0
    for place in dict.fromkeys((folder / config, folder / "data")):
        for path in sorted(place.glob("*.parquet")) if not shards else []:
            if match := SHARD.fullmatch(path.name):
                splits.add(match["split"])
                if match["split"] == split:
                    shards.append(path)
                    count = int(match["count"])
    if shards and len(shards) != count:
        raise UserError(f"{shards[0].parent} holds {len(shards)} of {count} files of split {split!r}; add the rest")
    return shards, sorted(splits)


def read_shards(files: list[Path], origin: str) -> HubRows:
    """All rows of the shard files; raises UserError naming a file that is not parquet or has no rows."""
    tables = []
    for path in files:
        try:
            tables.append(pq.read_table(path, partitioning=None))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as parquet ({error}); fetch it again") from error
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise UserError(f"{files[0].parent} holds no rows for {origin}; fetch it again")
    return HubRows(table, origin)


def download_split(repo: str, config: str, split: str) -> tuple[Path | None, str]:
    """A folder with the split's files, fetched from the hub or its cache; or None and the reason."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            repo_type="dataset",
            allow_patterns=[f"{config}/{split}-*.parquet", f"data/{split}-*.parquet"],
            cache_dir=get_base_dir() / "hub",
        )
        return Path(folder), ""
    except RepositoryNotFoundError:
        return None, "the hub does not know it (or it is private)"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None, "it is not in the mirror and the hub cannot be reached"


def load_sample(repo: str, config: str, split: str) -> HubRows:
    """The few embedded rows of a benchmark, for tests and first steps."""
    path = resources.files("nanochat").joinpath("starter", SAMPLE_FILE)
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        samples = {}
    rows = samples.get(f"{repo}/{config}/{split}")
    if not rows:
        raise DatasetMissing(f"no embedded sample of {repo} ({config}), split {split!r}{among(sorted(samples))}")
    return HubRows(pa.Table.from_pylist(rows), f"embedded sample ({len(rows)} rows of {repo}, {split})")


def among(names: list[str]) -> str:
    return f" (there: {', '.join(names)})" if names else ""
