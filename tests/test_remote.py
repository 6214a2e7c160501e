"""Corpora behind URLs: the same batches as from disk, while the network fails or the cache is damaged or too small."""

import gzip
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_helpers import refused
from corpus_helpers import TEXTS, TOKENIZER, Bucket, both, damage, fails, jsonl, rows_of, write_parquet
from fsspec import AbstractFileSystem
from stubs import TINY

from nanochat.checkpoint.folder import list_steps
from nanochat.common import BadShard, UserError
from nanochat.data import parquet, remote, textfiles
from nanochat.data.batches import Prefetcher
from nanochat.data.filesystems import list_files
from nanochat.data.range_cache import RangeCache
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import resolve_corpus
from nanochat.distributed.signals import StopRequested
from scripts import base_train, tok_train

# ---------------------------------------------------------------------------------------------------
# The same as from disk


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_batches_as_from_disk(world_size: int, bucket: Path, tmp_path: Path) -> None:
    near = resolve_corpus(str(bucket / "data"), tmp_path / "near")
    far = resolve_corpus("bucket://data", tmp_path / "far_base")
    assert far.fingerprint == near.fingerprint and sorted(both(far)) == sorted(TEXTS)
    for rank in range(world_size):
        np.testing.assert_array_equal(rows_of(far, 150, rank, world_size), rows_of(near, 150, rank, world_size))


def test_every_kind_of_url(bucket: Path, base: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("s0", "s1", "s2"):
        memory.pipe_file(f"/folder/deep/{name}.parquet", (bucket / "data" / f"{name}.parquet").read_bytes())
    whole = resolve_corpus(str(bucket / "data"), base)
    for url in (
        "memory://folder",
        "memory://folder/deep/",
        "memory://folder/**/*.parquet",
        f"file://{bucket}/data",
        f"file://{bucket}/data/s*.parquet",
        "bucket://data/*.parquet",
        "bucket://d*",
    ):
        assert resolve_corpus(url, base).fingerprint == whole.fingerprint, url
    one = resolve_corpus("memory://folder/deep/s1.parquet", base)
    assert one.fingerprint == resolve_corpus(str(bucket / "data" / "s1.parquet"), base).fingerprint
    memory.rm("/folder", recursive=True)


def test_text_files_are_converted_to_the_same_shards(bucket: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(remote, "CHUNK_BYTES", 10_000)  # several to a file
    monkeypatch.setattr("nanochat.data.own_files.MAX_GROUP_ROWS", 350)
    write_parquet(bucket / "mixed" / "big.parquet", TEXTS[:400], 400)
    (bucket / "mixed" / "a.jsonl").write_bytes(jsonl(TEXTS[400:900]))
    (bucket / "mixed" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[900:])))
    near, far = (
        resolve_corpus(*which)
        for which in ((str(bucket / "mixed"), tmp_path / "x"), ("bucket://mixed", tmp_path / "y"))
    )
    assert far.fingerprint == near.fingerprint and sorted(both(far)) == sorted(TEXTS)
    np.testing.assert_array_equal(rows_of(far, 20), rows_of(near, 20))


def test_files_go_to_worker_processes(bucket: Path, tmp_path: Path) -> None:
    """A copy of a file reads the same, and the copies of one process share the threads and the cache."""
    corpus = resolve_corpus("bucket://data", tmp_path / "base")
    shards = corpus.shards["train"]
    first, second = (pickle.loads(pickle.dumps(shard)) for shard in shards[:2])
    assert first == shards[0] and first.path.remote is second.path.remote
    assert parquet.read_row_group(first.path, 1, "") == parquet.read_row_group(shards[0].path, 1, "")


def test_a_shard_is_read_by_row_group_and_none_before_it_is_needed(bucket: Path, tmp_path: Path) -> None:
    """Opening reads the ends of the files; a row group is one fetch, without the columns that are not needed."""
    sizes: list[int] = []
    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(400)]
    for i in range(3):
        waste = pa.array([rng.bytes(3000) for _ in texts])
        pq.write_table(
            pa.table({"waste": waste, "text": texts}),
            bucket / "data" / f"s{i}.parquet",
            row_group_size=40,
            use_dictionary=False,
        )
    Bucket.fail = staticmethod(lambda path, start, end: start is not None and sizes.append(end - start))
    corpus = resolve_corpus("bucket://data", tmp_path / "base")
    assert both(corpus)
    ends = 3 * (remote.TAIL_BYTES + 20_000)
    assert sum(sizes) < ends + 1.1 * 3 * 400 * 1000 and sizes.count(remote.TAIL_BYTES) == 3  # waste: three times that
    assert len([size for size in sizes if 30_000 < size < 50_000]) == 30  # a row group each


def test_what_was_fetched_is_not_fetched_again(bucket: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    first = both(resolve_corpus("bucket://data", base))
    reads = Bucket.reads.total()
    assert reads <= 3 + 30
    assert both(resolve_corpus("bucket://data", base)) == first and Bucket.reads.total() == reads
    write_parquet(bucket / "data" / "s1.parquet", TEXTS[1::3][::-1], 40)  # written again: another version
    assert sorted(both(resolve_corpus("bucket://data", base))) == sorted(first)
    assert Bucket.reads["s1.parquet"] == 2 * Bucket.reads["s0.parquet"]


def test_row_groups_are_fetched_ahead(bucket: Path, tmp_path: Path) -> None:
    """With a slow network the row groups of several streams are fetched at once."""
    corpus = resolve_corpus("bucket://data", tmp_path / "base")
    in_flight, four, lock = [0], threading.Event(), threading.Lock()

    def slow(path: str, start: int | None, end: int | None) -> None:
        with lock:
            in_flight[0] += 1
            if in_flight[0] >= 4:
                four.set()
        four.wait(1)
        with lock:
            in_flight[0] -= 1

    Bucket.fail = staticmethod(slow)
    rows_of(corpus, 3)
    assert four.is_set()


# ---------------------------------------------------------------------------------------------------
# The cache


def test_damaged_ranges_are_fetched_again(bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    first = both(resolve_corpus("bucket://data", base))
    files = [path for path in (base / "stream").rglob("??/*") if path.is_file()]
    assert len(files) == 33
    for path in files[::2]:
        damage(path)
    files[1].write_bytes(b"")
    reads = Bucket.reads.total()
    assert both(resolve_corpus("bucket://data", base)) == first
    assert Bucket.reads.total() - reads == 18 and str(files[0]) in capsys.readouterr().err


def test_the_cache_stays_within_its_limit(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 100_000)
    others = RangeCache(tmp_path, 100_000)
    for i in range(60):
        (cache if i % 2 else others).get(f"{i:04d}", lambda i=i: bytes([i]) * 5000)  # type: ignore[misc]
        used = sum(path.stat().st_size for path in tmp_path.rglob("00/*"))
        assert used <= 100_000
        if i == 30:
            os.utime(cache.path("0030"), (time.time() + 60,) * 2)  # used last
    assert used > 60_000 and cache.load("0030") == bytes([30]) * 5000 and cache.load("0001") is None


def test_a_limit_of_zero_keeps_nothing(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE_GB", "0")
    assert sorted(both(resolve_corpus("bucket://data", tmp_path / "base"))) == sorted(TEXTS)
    assert not (tmp_path / "base" / "stream" / "pieces").exists()
    monkeypatch.setenv("NANOCHAT_CACHE_GB", "much")
    with pytest.raises(UserError, match="NANOCHAT_CACHE_GB"):
        resolve_corpus("bucket://data", tmp_path / "base")


def test_a_cache_that_cannot_be_written_is_done_without(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE_DIR", "/proc/self/nothing")
    assert sorted(both(resolve_corpus("bucket://data", tmp_path / "base"))) == sorted(TEXTS)
    assert capsys.readouterr().err.count("/nothing/") == 2  # footers and ranges


def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Ranges are fetched at most once by each, and read correctly while the processes evict each other's."""
    code = (
        "import sys; from pathlib import Path; from nanochat.data.range_cache import RangeCache\n"
        "cache = RangeCache(Path(sys.argv[1]), int(sys.argv[2])); fetched = 0\n"
        "def fetch(i):\n"
        "    global fetched; fetched += 1; return i.to_bytes(2, 'big') * 1000\n"
        "for turn in range(3):\n"
        "    for i in range(150):\n"
        "        assert cache.get(f'{i:04d}', lambda: fetch(i)) == i.to_bytes(2, 'big') * 1000\n"
        "print(fetched)"
    )
    for limit, min_fetched, max_fetched in ((10**9, 150, 300), (50_000, 151, 10**9)):
        command = [sys.executable, "-c", code, str(tmp_path / str(limit)), str(limit)]
        jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert min_fetched <= sum(int(job.communicate(timeout=60)[0]) for job in jobs) <= max_fetched
        assert all(job.returncode == 0 for job in jobs)


# ---------------------------------------------------------------------------------------------------
# What fails


def test_a_network_that_fails_for_a_while_changes_nothing(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = resolve_corpus(str(bucket / "data"), tmp_path / "near")
    Bucket.fail = fails(3, ConnectionResetError("reset by peer"))
    far = resolve_corpus("bucket://data", tmp_path / "far_base")
    Bucket.fail = fails(12, TimeoutError("timed out"))
    np.testing.assert_array_equal(rows_of(far, 50), rows_of(near, 50))
    assert 1 <= capsys.readouterr().err.count("reset by peer") <= 2


def test_a_network_that_stays_away_ends_loudly(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_NETWORK_SECONDS", "0.3")
    corpus = resolve_corpus("bucket://data", tmp_path / "base")
    Bucket.fail = fails(10**9, ConnectionResetError("reset by peer"))
    with pytest.raises(UserError, match=r"0.3 seconds.*reset by peer") as caught:
        rows_of(corpus, 5)
    assert not isinstance(caught.value, BadShard)  # else a dead network would be skipped shard by shard
    with pytest.raises(UserError, match=r"0.3 seconds"):
        resolve_corpus("bucket://data", tmp_path / "other")


def test_a_shard_that_vanishes_or_changes_is_named(bucket: Path, tmp_path: Path) -> None:
    for number, (spoil, problem) in enumerate(
        {
            lambda path: path.unlink(): "not there",
            lambda path: path.write_bytes(path.read_bytes()[:9000]): "has changed",
        }.items()
    ):
        corpus = resolve_corpus("bucket://data", tmp_path / str(number))
        spoil(bucket / "data" / "s2.parquet")
        with pytest.raises(BadShard, match=rf"bucket://data/s2.parquet .*{problem}.*--skip-bad-shards") as caught:
            both(corpus)
        assert caught.value.shard == "bucket://data/s2.parquet"
        write_parquet(bucket / "data" / "s2.parquet", TEXTS[2::3], 40)


def test_a_server_that_knows_no_ranges(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TAIL_BYTES", 100)
    monkeypatch.setattr(Bucket, "cat_file", lambda self, path, **where: Path("/", path).read_bytes())
    with pytest.raises(UserError, match=r"s0.parquet.*server"):
        resolve_corpus("bucket://data", tmp_path / "base")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("bucket://nothing", "--data bucket://nothing: there is no such"),
        ("bucket://data/none*.parquet", ".jsonl"),
        ("bucket://data/**x", "Invalid pattern"),
        ("bucket://data/readme.pdf", ".jsonl"),
        ("bucket://data/denied.parquet", "access denied"),
        ("s3://bucket/folder", "pip install 'nanochat[s3]'"),
        ("https://example.org/a.parquet", "pip install 'nanochat[http]'"),
        ("gs://bucket/a*.jsonl", "pip install 'nanochat[gcs]'"),
        ("nonsense://x", "nonsense"),
        ("zip://data::file://archive.zip", "unpack it"),
        ("zip://archive.zip", "s3://bucket/folder"),
    ],
)
def test_mistakes(
    data: str,
    expected: str,
    bucket: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(data: str) -> None:
        raise ImportError("Install it")

    if "[" in expected:  # whether or not it is installed here
        monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    (bucket / "data" / "denied.parquet").write_bytes(b"x")
    Bucket.fail = fails(10**9, PermissionError("Access Denied"), "denied")
    for main, flags in ((base_train.main, TINY), (tok_train.main, [])):
        assert expected in refused(main, [*flags, f"--data={data}"], capsys)


class Web(AbstractFileSystem):
    """Pages with links, to themselves and their parents too, as fsspec sees them; what is not here does not answer."""

    protocol = ("http", "https")
    pages: ClassVar[dict[str, list[str]]] = {
        "http://host/data": ["http://host/data/", "http://host/data/a.parquet", "http://host/data/sub/"],
        "http://host/data/sub": ["http://host/data/", "http://host/data/sub/b.parquet", "http://host/data/sub/./"],
        "http://host/half": ["http://host/half/a.parquet", "http://host/half/down/"],
    }

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if (folder := path.rstrip("/")) not in self.pages:
            raise ConnectionRefusedError(111, "refused")
        return [
            {"name": name, "size": None, "type": "directory" if name.endswith("/") else "file"}
            for name in self.pages[folder]
        ]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": 1, "type": "file"}


def test_a_page_that_cannot_be_fetched_is_no_empty_folder() -> None:
    found, unused = list_files(Web(), "http://host/data", textfiles.kind_of)
    assert sorted(found) == ["http://host/data/a.parquet", "http://host/data/sub/b.parquet"] and not unused
    for folder in ("http://host/half", "http://closed/data/"):
        with pytest.raises(ConnectionRefusedError):
            list_files(Web(), folder, textfiles.kind_of)


def test_waiting_for_a_network_can_be_given_up(bucket: Path, tmp_path: Path) -> None:
    corpus = resolve_corpus("bucket://data", tmp_path / "base")
    Bucket.fail = fails(10**9, ConnectionResetError("reset by peer"))
    loader = PretrainLoader(corpus, TOKENIZER, sequence_len=32, rows_per_step=8)
    assert not loader.wait(0.1) and loader.failure is None
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 5
    Bucket.fail = staticmethod(lambda path, start, end: None)
    np.testing.assert_array_equal(rows_of(corpus, 5), rows_of(resolve_corpus("bucket://data", tmp_path / "b"), 5))
    waiting = threading.Event()

    def wait_for_ever() -> None:
        waiting.set()
        corpus.shards["train"][0].path.remote.wait(remote.Future())

    prefetcher = Prefetcher(wait_for_ever, 1)
    assert waiting.wait(10)
    prefetcher.close()
    with pytest.raises(StopRequested):
        prefetcher.get()


@pytest.mark.parametrize("few_row_groups", [False, True])
def test_a_signal_is_heard_where_an_evaluation_waits_for_the_network(
    few_row_groups: bool,
    bucket: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With few row groups the first is read where the loader is made, with many on its thread."""
    monkeypatch.setenv("NANOCHAT_NETWORK_SECONDS", "20")
    monkeypatch.setenv("NANOCHAT_CACHE_GB", "0")
    for path in (bucket / "data").iterdir():
        path.unlink()
    write_parquet(bucket / "data" / "s.parquet", TEXTS[:400], 200 if few_row_groups else 40)
    evaluate, cut_at = base_train.corpus_bpb, []

    def cut_the_line(*args: Any, **kwargs: Any) -> Any:
        Bucket.fail = fails(10**9, ConnectionResetError("reset by peer"))  # type: ignore[misc]
        cut_at.append(time.monotonic())
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(base_train, "corpus_bpb", cut_the_line)
    flags = [*TINY, "--data=bucket://data", "--num-iterations=9", "--eval-every=4", "--model-tag=run"]
    assert base_train.main(flags) == 128 + signal.SIGINT
    assert time.monotonic() - cut_at[0] < 5 and "stop requested" in capsys.readouterr().err
    assert list_steps(copied / "base_checkpoints" / "run") == [4]
    Bucket.fail = staticmethod(lambda path, start, end: None)  # type: ignore[misc]
    monkeypatch.setattr(base_train, "corpus_bpb", evaluate)
    assert base_train.main([*flags, "--resume"]) == 0


def test_ranges_are_where_parquet_has_the_text(bucket: Path) -> None:
    path = bucket / "data" / "s0.parquet"
    ranges = parquet.text_ranges("text")(path.read_bytes()[-20_000:])
    assert len(ranges) == 10 and all(0 < start < end < path.stat().st_size for start, end in ranges)
    assert parquet.text_ranges("text")(b"no parquet at all") == []


def test_other_files_in_the_cache_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a folder of ranges")
    cache = RangeCache(tmp_path, 100_000)
    assert cache.get("ab12", lambda: b"first") == b"first"  # the folder is measured when the first one is kept
    assert cache.get("ab12", lambda: b"again") == b"first" and not cache.failed


def test_a_read_only_cache_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RangeCache(tmp_path, 100_000)
    cache.get("ab12", lambda: b"first")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("nanochat.data.range_cache.os.utime", refuse)
    monkeypatch.setattr("nanochat.data.range_cache.atomic_write", refuse)
    assert cache.get("cd34", lambda: b"second") == b"second" and cache.failed
    assert cache.get("ab12", lambda: b"again") == b"first"


def test_names_are_as_on_disk(bucket: Path, tmp_path: Path) -> None:
    for old, new in (("s0", "a#b"), ("s1", "c d"), ("s2", "e%20f?")):
        (bucket / "data" / f"{old}.parquet").rename(bucket / "data" / f"{new}.parquet")
    far = resolve_corpus("bucket://data", tmp_path / "base")
    assert far.fingerprint == resolve_corpus(str(bucket / "data"), tmp_path / "base").fingerprint
    quoted = [f"http://host/data/{name}" for name in ("c%20d.parquet", "a%23b.parquet")]
    web = [remote.RemoteFile(url, 1, "1", url, None) for url in quoted]  # type: ignore[arg-type]
    assert [file.name for file in sorted(web)] == ["a#b.parquet", "c d.parquet"]


def test_without_a_version_nothing_is_kept(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "version_of", lambda info: "")
    first = both(resolve_corpus("bucket://data", tmp_path / "base"))
    for path in (bucket / "data").glob("s*.parquet"):
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes(4) + content[104:])  # of the same size: only reading it tells
    with pytest.raises(BadShard, match="damaged"):
        both(resolve_corpus("bucket://data", tmp_path / "base"))
    assert len(first) == len(TEXTS)


def test_a_file_that_became_shorter_is_a_bad_shard(bucket: Path, tmp_path: Path) -> None:
    corpus = resolve_corpus("bucket://data", tmp_path / "base")
    error = OSError("Requested Range Not Satisfiable")
    error.status = 416  # type: ignore[attr-defined]
    Bucket.fail = fails(99, error)
    with pytest.raises(BadShard, match="shorter"):
        both(corpus)
