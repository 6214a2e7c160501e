"""Public data sets in the Hugging Face hub's layout, and tasks over their rows.

Rows come from a local mirror, from the hub, or from the embedded sample, all with the hub's schema. A split is never
replaced by another one.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_datasets_dir
from tasks.common import Task

SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-(?P<count>\d{5})\.parquet")


class DatasetMissing(UserError):
    """A data set (or one split of it) is available neither in the mirror nor from the hub."""


class HubRows(Sequence[dict[str, Any]]):
    """The rows of one split as dicts; `origin` describes where they came from."""

    def __init__(self, table: pa.Table, origin: str):
        if table.num_columns == 1 and pa.types.is_struct(table.schema.types[0]):  # MMLU's auxiliary_train
            table = pa.Table.from_struct_array(table.column(0))
        self.table = table
        self.origin = origin

    def require(self, *columns: str) -> "HubRows":
        """These rows; raises UserError if a column is missing."""
        if missing := [column for column in columns if column not in self.table.column_names]:
            present = ", ".join(self.table.column_names)
            raise UserError(f"{self.origin} has no column {missing[0]!r} (columns: {present}); is it another data set?")
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


class HubTask(Task):
    """A task over the rows of one split of a public data set. Subclasses set the three attributes below.

    `sample`: use a few embedded rows instead, to try the code; never report a score on them.
    """

    repo: ClassVar[str]  # the data set's name on the hub
    splits: ClassVar[Mapping[str, Sequence[str]]]  # subset ("config" on the hub) -> its splits
    columns: ClassVar[Sequence[str]]  # that every row must have

    def __init__(self, subset: str, split: str, *, sample: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if split not in self.splits.get(subset, ()):
            available = "; ".join(f"{name} with {', '.join(splits)}" for name, splits in self.splits.items())
            raise UserError(f"{type(self).__name__} has {available}, not {subset!r} with {split!r}")
        self.subset, self.split = subset, split
        self.rows = load_hub_rows(self.repo, subset, split, sample=sample).require(*self.columns)

    def num_examples(self) -> int:
        return len(self.rows)

    @staticmethod
    def published_texts(row: dict[str, Any]) -> list[str]:
        """The texts of a row that give the item away if training data contains them: question, question and answer."""
        raise NotImplementedError


def load_hub_rows(repo: str, config: str, split: str, *, sample: bool = False) -> HubRows:
    """Rows of `split` of data set `repo`.

    Searched in $NANOCHAT_DATASETS_DIR (hub layout: repo/config/split-XXXXX-of-XXXXX.parquet), then on the hub
    (downloaded once into `hub/` in the base folder). With `sample=True` the embedded rows are used instead.

    Raises DatasetMissing naming repo, split and how to provide it.
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
        problem = f"the hub has no such split{available_names(on_hub)}"
    where = f"{mirror / repo} has {', '.join(found)} only" if mirror and found else problem
    raise DatasetMissing(
        f"data set {repo} ({config}), split {split!r} is not available: {where}; "
        f"connect to the internet or put its parquet files under NANOCHAT_DATASETS_DIR/{repo}/{config}/"
    )


def find_shards(folder: Path, config: str, split: str) -> tuple[list[Path], list[str]]:
    """The shard files of `split` in order, and the names of all splits present.

    The hub keeps data sets with a single config in `data/`. Raises UserError if a shard of the split is missing.
    """
    splits: set[str] = set()
    for place in (folder / config, folder / "data"):
        matches = [(path, match) for path in sorted(place.glob("*.parquet")) if (match := SHARD.fullmatch(path.name))]
        splits |= {match["split"] for _, match in matches}
        shards = [(path, int(match["count"])) for path, match in matches if match["split"] == split]
        if shards:
            if len(shards) != shards[0][1]:
                raise UserError(f"{place} holds {len(shards)} of {shards[0][1]} files of split {split!r}; add the rest")
            return [path for path, _ in shards], sorted(splits)
    return [], sorted(splits)


def read_shards(files: list[Path], origin: str) -> HubRows:
    """All rows of the shard files; raises UserError naming a file that is not parquet or has no rows."""
    tables = []
    for path in files:
        try:
            tables.append(pq.read_table(path, partitioning=None))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as parquet ({error}); download it again") from error
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise UserError(f"{files[0].parent} holds no rows for {origin}; download it again")
    return HubRows(table, origin)


def download_split(repo: str, config: str, split: str) -> tuple[Path | None, str]:
    """A folder with the split's files, from the hub or its cache; or None and the reason."""
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
        return None, "the hub does not have it (or it is private)"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None, "it is not in the mirror and the hub cannot be reached"


def load_sample(repo: str, config: str, split: str) -> HubRows:
    """The few embedded rows of a benchmark, for tests and first steps."""
    samples = json.loads(starter_file("benchmark_samples.json").read_text(encoding="utf-8"))["rows"]
    rows = samples.get(f"{repo}/{config}/{split}")
    if not rows:
        raise DatasetMissing(f"no embedded sample of {repo} ({config}), split {split!r}{available_names(samples)}")
    return HubRows(pa.Table.from_pylist(rows), f"embedded sample ({len(rows)} rows of {repo}, {split})")


def starter_file(name: str, folder: Path | str | None = None) -> Path:
    """The path of a starter data file, in `folder` or else in the package. Raises DatasetMissing."""
    path = Path(folder or str(resources.files("nanochat") / "starter")) / name
    if not path.exists():
        raise DatasetMissing(f"{path} is missing; rebuild it with `python dev/build_starter_data.py`")
    return path


def available_names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return f" (available: {', '.join(sorted(names))})" if names else ""
