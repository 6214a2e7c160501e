"""The interface between data and training: a corpus is two splits of documents, read one row group at a time.

Training, evaluation and the tokenizer's scripts read documents through `Corpus` only. To add a source of documents,
subclass it in a module of its own and open it in `resolve_corpus` (nanochat/dataset.py); `shards.py` is the subclass
for parquet files.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from nanochat.common import BadShard, UserError, warn
from nanochat.common.files import parse_json

SPLITS = ("train", "val")
PREFETCH_ROW_GROUPS = 4  # while iterating in order
VAL_LIMIT = 2**64 // 100  # own data: a document whose hash is below it is for validation, one in a hundred
STATE_KEY = "loader.skipped"  # among the arrays of a saved loader state

Record = dict[str, Any]  # JSON, see Corpus.record


class NoText(UserError):
    """A split has no document, or none is left without the bad shards."""


class Document(NamedTuple):
    """A self-contained text, and the name of its source (evaluations report figures by source)."""

    text: str
    source: str


def document_hash(text: str) -> int:
    """64 bits of BLAKE2b over the text's UTF-8 bytes.

    Own data is split by this number alone, so a document's split depends on no file, neighbour or seed. Adding files
    never moves a document from training to validation, and two copies of one text are in the same split.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


@dataclass
class BadShards:
    """The shards of a corpus that are skipped, and whether more may be (--skip-bad-shards)."""

    may_skip: bool = False
    skipped: dict[str, str] = field(default_factory=dict)  # shard -> why it is bad

    def __contains__(self, shard: object) -> bool:
        return str(shard) in self.skipped

    def skip(self, error: BadShard) -> None:
        """Skip the error's shard from now on and warn; raise the error if that is not allowed."""
        if not self.may_skip:
            raise self.with_hint(error) from error
        if error.shard not in self.skipped:
            self.skipped[error.shard] = str(error)
            warn(f"SKIPPED A BAD SHARD ({len(self.skipped)} so far): {error}")

    def with_hint(self, error: BadShard) -> BadShard:
        """The error, with the flag that would have skipped its shard, unless that was given."""
        hint = "; or leave out such shards: --skip-bad-shards"
        return error if self.may_skip else BadShard(f"{error}{hint}", error.shard)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The skipped shards for a saved loader state: JSON as (bytes,) uint8; nothing if there are none."""
        text = json.dumps(self.skipped).encode()
        return {STATE_KEY: np.frombuffer(text, np.uint8).copy()} if self.skipped else {}

    @staticmethod
    def from_arrays(state: Mapping[str, Any]) -> dict[str, str]:
        """The skipped shards in a saved loader state."""
        saved = state.get(STATE_KEY)
        text = b"{}" if saved is None else np.asarray(saved).tobytes()
        return parse_json(text, "the list of skipped shards in the checkpoint", dict[str, str])


class Corpus(ABC):
    """Documents in two splits, "train" and "val". Each is a sequence of row groups, readable in any order.

    A row group is the unit of reading and shuffling: up to about a thousand documents, of which the loader keeps
    several in memory. Several threads may read at once. All ranks must see the same row groups.

    name: shown to the user. fingerprint: changes whenever the documents or their order do; a run resumes only on the
    fingerprint it was saved with. bad_shards: a source that cannot have any leaves it as it is.
    """

    files = ""  # which files of --data are used and which are not, by kind; shown to the user

    def __init__(self, name: str, fingerprint: str, bad_shards: BadShards | None = None) -> None:
        self.name, self.fingerprint = name, fingerprint
        self.bad_shards = bad_shards or BadShards()

    def describe(self) -> str:
        """The name, and which files are used."""
        return f"{self.name} ({self.files})" if self.files else self.name

    @abstractmethod
    def num_row_groups(self, split: str) -> int:
        """How many row groups a split has. Constant, whatever is skipped."""

    @abstractmethod
    def read(self, split: str, index: int) -> list[Document]:
        """The documents of row group `index`; possibly none. The same every time.

        Raises BadShard if its shard is missing or damaged and not among the skipped ones.
        """

    def prefetch(self, split: str, indices: Iterable[int]) -> None:  # noqa: B027 (optional)
        """Start fetching row groups that read() will need soon. Does nothing unless overridden."""

    def record(self) -> Record:
        """What a later session needs to open the same corpus again, kept in the run's folder as JSON."""
        return {"fingerprint": self.fingerprint}

    def iter_documents(self, split: str) -> Iterator[Document]:
        """All documents of a split in order. Skips a bad shard from where it turns out to be bad, if allowed."""
        total = self.num_row_groups(split)
        for index in range(total):
            self.prefetch(split, range(index, min(index + PREFETCH_ROW_GROUPS, total)))
            try:
                documents = self.read(split, index)
            except BadShard as error:
                if not self.bad_shards.may_skip:
                    raise
                self.bad_shards.skip(error)
                continue
            yield from documents


class InMemoryCorpus(Corpus):
    """A list of documents as one row group, the same for every split."""

    def __init__(self, name: str, documents: list[Document]) -> None:
        super().__init__(name, fingerprint=name)
        self.documents = documents

    def num_row_groups(self, split: str) -> int:
        return 1

    def read(self, split: str, index: int) -> list[Document]:
        return self.documents
