"""Texts, files and a fake remote file system for the tests of data."""

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem

from nanochat.data import remote
from nanochat.data.corpus import Corpus
from nanochat.dataloader import PretrainLoader
from nanochat.tokenizer import RustBPETokenizer

WORDS = ["river", "мир", "山", "कथा", "ocean", "straße", "ñandú", "سلام", "night", "🙂", "wind"]


def make_texts(count: int, seed: int = 0, words: int = 20) -> list[str]:
    rng = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=words)) for i in range(count)]


def jsonl(texts: Iterable[str], **extra: str) -> bytes:
    return "".join(json.dumps({"text": t, **extra}, ensure_ascii=False) + "\n" for t in texts).encode()


def write_parquet(path: Path, texts: list[str], row_group_size: int = 1024, **columns: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=row_group_size)
    return path


def texts_of(corpus: Corpus, split: str) -> list[str]:
    return [document.text for document in corpus.iter_documents(split)]


def both(corpus: Corpus) -> list[str]:
    return texts_of(corpus, "train") + texts_of(corpus, "val")


TEXTS = make_texts(1200)
TOKENIZER = RustBPETokenizer.train_from_iterator(TEXTS[:50], 300)


def damage(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def rows_of(corpus: Any, steps: int, rank: int = 0, world_size: int = 1, tokenizer: Any = TOKENIZER) -> np.ndarray:
    loader = PretrainLoader(corpus, tokenizer, sequence_len=32, rows_per_step=8, rank=rank, world_size=world_size)
    batches = [loader.next_batch().inputs.numpy() for _ in range(steps)]
    loader.close()
    return np.stack(batches)


class Bucket(AbstractFileSystem):
    """A folder on disk that behaves like a remote store: counts reads; fails, waits or denies access as set."""

    protocol = "bucket"
    root_marker = ""  # paths in it have no leading slash
    folder = Path()
    reads: ClassVar[Counter[str]] = Counter()
    fail: ClassVar[Any] = staticmethod(lambda path, start, end: None)
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # type: ignore[override]
        inside = path.removeprefix("bucket://").strip("/")
        return inside if inside.startswith(str(cls.folder).lstrip("/")) else f"{cls.folder}/{inside}".lstrip("/")

    def _local(self, path: str) -> str:
        return "/" + self._strip_protocol(path)

    def unstrip_protocol(self, name: str) -> str:
        return "bucket://" + name.removeprefix(str(self.folder).lstrip("/")).lstrip("/")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        type(self).fail(path, None, None)
        stat = os.stat(self._local(path))
        kind = "directory" if os.path.isdir(self._local(path)) else "file"
        return {"name": self._strip_protocol(path), "size": stat.st_size, "type": kind, "ETag": str(stat.st_mtime_ns)}

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        if self.info(path)["type"] == "file":
            return [self.info(path)]
        found = [self.info(f"{self._strip_protocol(path)}/{name}") for name in os.listdir(self._local(path))]
        return found if detail else [one["name"] for one in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        assert start is not None and end is not None, "whole files are not read"
        type(self).fail(path, start, end)
        Bucket.reads[Path(path).name] += 1
        with open(self._local(path), "rb") as file:
            file.seek(start)
            return file.read(end - start)


fsspec.register_implementation("bucket", Bucket, clobber=True)


def fill_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three shards, as bucket://data."""
    folder = tmp_path / "far"
    for i in range(3):
        extra = {"url": [f"http://{i}/{n}" for n in range(400)]}
        write_parquet(folder / "data" / f"s{i}.parquet", TEXTS[i::3], 40, **extra)
    (folder / "data" / ".hidden.parquet").write_bytes(b"no")
    (folder / "data" / "readme.pdf").write_bytes(b"no")
    monkeypatch.setattr(Bucket, "folder", folder)
    monkeypatch.setattr(Bucket, "reads", Counter())
    monkeypatch.setattr(Bucket, "fail", staticmethod(lambda path, start, end: None))
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(remote, "MAX_DELAY_SECONDS", 0.05)
    return folder


def fails(times: int, error: Exception, name: str = "") -> Any:
    """For Bucket.fail: the first reads whose path holds `name` raise `error`."""
    left, lock = [times], threading.Lock()

    def fail(path: str, start: int | None, end: int | None) -> None:
        with lock:
            if start is not None and name in path and left[0] > 0:
                left[0] -= 1
                raise error

    return staticmethod(fail)
