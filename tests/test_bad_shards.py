"""Missing or damaged shards stop a run, or with --skip-bad-shards are skipped, by all ranks and for good."""

import errno
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_helpers import refused
from corpus_helpers import Bucket, both, fails, jsonl, make_texts, write_parquet
from ranks import run_ranks
from stubs import TINY

from nanochat.common import BadShard, UserError
from nanochat.data import own_files
from nanochat.data.corpus import BadShards
from nanochat.data.download import HUB_SETS, hub_folder
from nanochat.data.shards import ShardCorpus
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import resolve_corpus
from nanochat.evals.bits_per_byte import corpus_bpb
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_eval, base_train, tok_train

TOKENIZER = RustBPETokenizer.train_from_iterator(make_texts(20), 265)
SHORT = [make_texts(240, seed, words=4) for seed in range(3)]


def put(folder: Path, *which: int) -> None:
    for i in which or range(3):
        write_parquet(folder / f"s{i}.parquet", SHORT[i], 4)


def spoil_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)


def spoil_all_pages(path: Path) -> None:
    content = path.read_bytes()
    size = len(content) - int.from_bytes(content[-8:-4], "little") - 12  # of all between the first mark and the footer
    path.write_bytes(content[:4] + bytes(size) + content[4 + size :])


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def data(copied: Path) -> Path:
    put(copied / "data")
    return copied / "data"


def flags(data: Path | str, steps: int, *more: str) -> list[str]:
    return [
        *TINY,
        f"--data={data}",
        f"--num-iterations={steps}",
        "--model-tag=run",
        "--save-every=20",
        "--keep-last=0",
        *more,
    ]


def losses(base: Path, tag: str = "run") -> list[float]:
    lines = (base / "base_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def skipped_counts(base: Path, tag: str = "run") -> list[int]:
    lines = (base / "base_checkpoints" / tag / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("skipped_shards", 0) for line in lines]


def at_batch(number: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action` before the `number`-th batch of a run."""
    real, taken = PretrainLoader.next_batch, [0]

    def next_batch(self: PretrainLoader) -> Any:
        if self.rows_per_step == 2:  # the one that trains
            taken[0] += 1
            if taken[0] == number:
                action()
        return real(self)

    monkeypatch.setattr(PretrainLoader, "next_batch", next_batch)


@pytest.mark.parametrize("spoil", [cut_off, spoil_pages])
def test_a_bad_shard_stops_what_reads_it(spoil: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(data / "s1.parquet")
    for main, given in ((base_train.main, flags(data, 40)), (tok_train.main, [f"--data={data}"])):
        error = refused(main, given, capsys)
        assert "s1.parquet" in error and "--skip-bad-shards" in error


def test_tok_train_continues_without_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil_pages(data / "s1.parquet")
    tok_train.main([f"--data={data}", "--skip-bad-shards", "--vocab-size=265"])
    assert capsys.readouterr().err.count("s1.parquet") == 1


@pytest.mark.parametrize("spoil", [cut_off, spoil_pages])
def test_a_skipped_shard_stays_skipped(
    spoil: Any, data: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is resumed after the shard has come back is the run that never saw it."""
    spoil(data / "s1.parquet")
    assert base_train.main(flags(data, 40, "--skip-bad-shards")) == 0
    assert capsys.readouterr().err.count("s1.parquet") == 1
    straight = losses(copied)
    assert skipped_counts(copied) == ([1] * 40 if spoil is cut_off else skipped_counts(copied))
    assert skipped_counts(copied)[-1] == 1
    shutil.rmtree(copied / "base_checkpoints" / "run" / "000040")
    put(data)
    assert base_train.main(flags(data, 40, "--resume")) == 0
    assert losses(copied) == straight and skipped_counts(copied)[-1] == 1
    assert base_train.main([*flags(data, 40), "--model-tag=whole"]) == 0
    assert losses(copied, "whole") != straight


def test_shards_keep_their_places_when_the_folder_moves(data: Path, tmp_path: Path) -> None:
    first = resolve_corpus(str(data), tmp_path / "b", skip_bad=True)
    record = json.loads(json.dumps(first.record()))
    moved = data.rename(data.with_name("moved"))
    skipped = {str(data / "s0.parquet"): "it was damaged"}
    again = resolve_corpus(str(moved), tmp_path / "b", skipped=skipped, recorded=record)
    assert again.fingerprint == first.fingerprint and not again.read("train", 3)
    part, group = first.locate("train", 100)
    assert part.path.name == "s1.parquet" and again.locate("train", 100)[1] == group
    assert {d.text for d in again.read("train", 100)} <= set(SHORT[1][4 * group : 4 * group + 4])
    (moved / "s1.parquet").unlink()
    with pytest.raises(BadShard, match=r"s1.parquet"):
        resolve_corpus(str(moved), tmp_path / "b", skipped=skipped, recorded=record)
    put(moved, 1)
    write_parquet(moved / "s9.parquet", SHORT[1], 4)
    assert resolve_corpus(str(moved), tmp_path / "b", recorded=record).fingerprint != first.fingerprint


def test_a_shard_that_vanishes_while_training(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends, saved, and resumes without the shard, as if it had been skipped from that step on."""
    at_batch(5, (data / "s1.parquet").unlink, monkeypatch)
    assert base_train.main(flags(data, 70)) == 1
    error = capsys.readouterr().err
    assert all(words in error for words in ("s1.parquet", "--skip-bad-shards", "--resume"))
    ended = len(losses(copied))
    assert 5 <= ended < 70
    assert "s1.parquet" in refused(base_train.main, flags(data, 70, "--resume"), capsys)
    assert base_train.main(flags(data, 70, "--resume", "--skip-bad-shards")) == 0
    assert skipped_counts(copied) == [0] * ended + [1] * (70 - ended)
    gone = losses(copied)
    # With the flag from the start it continues by itself, with the same losses.
    put(data)
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(copied))
    at_batch(5, (data / "s1.parquet").unlink, monkeypatch)
    assert base_train.main([*flags(data, 70, "--skip-bad-shards"), "--model-tag=on"]) == 0
    assert losses(copied, "on") == gone and skipped_counts(copied, "on") == skipped_counts(copied)


def test_only_bad_shards_are_an_error(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in data.iterdir():
        spoil_pages(path)
    assert (
        "no document" in (error := refused(base_train.main, flags(data, 3, "--skip-bad-shards"), capsys))
        or "no text" in error
    )


@pytest.mark.parametrize("spoil", [cut_off, spoil_all_pages])
def test_a_run_continues_without_its_validation_shard(
    spoil: Any, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = HUB_SETS["fineweb-edu"]
    folder = hub_folder(hub.name, copied)
    for i, name in enumerate(("shard_00000.parquet", hub.val_name)):
        write_parquet(folder / name, SHORT[i], 4)
    given = [*flags(hub.name, 8, "--skip-bad-shards"), "--eval-every=4"]
    assert base_train.main([*given, "--model-tag=whole"]) == 0
    spoil(folder / hub.val_name)
    capsys.readouterr()
    assert base_train.main(given) == 0
    output = capsys.readouterr()
    assert hub.val_name in output.err and output.err.count("not evaluated: fineweb-edu") == 2
    assert losses(copied) == losses(copied, "whole")
    measure = ["--eval=bpb", f"--data={hub.name}", "--skip-bad-shards", "--split-tokens=64", "--device-type=cpu"]
    assert "fineweb-edu" in refused(base_eval.main, measure, capsys)


def test_the_rest_of_a_split_is_evaluated(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two validation shards one is damaged: the figure is finite, and not that of both."""
    whole = resolve_corpus(str(data), tmp_path / "b", skip_bad=True)
    one, other, last = (replace(part, by_hash=False) for part in whole.shards["train"])
    corpus = ShardCorpus("mine", [last], [one, other], bad_shards=BadShards(may_skip=True))
    model = GPT.create(GPTConfig(sequence_len=16, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    measure = partial(
        corpus_bpb, model, corpus, TOKENIZER, Runtime.create("cpu"), split="val", tokens=4096, device_batch_size=32
    )
    both_of_them = measure()
    spoil_pages(data / "s1.parquet")
    assert measure() != both_of_them and capsys.readouterr().err.count("s1.parquet") == 1


def train_on_rank(runtime: Runtime, given: list[str], broken_on: int) -> list[float]:
    """Train; the shard s1 cannot be read on rank `broken_on`, on all others it can."""
    from nanochat.data import shards
    from scripts import _cli

    real = shards.read_row_group

    def read(path: Path, group: int, *args: Any) -> Any:
        if path.name == "s1.parquet" and runtime.rank == broken_on:
            raise BadShard(f"{path} is damaged here", path)
        return real(path, group, *args)

    shards.read_row_group = read  # type: ignore[assignment]
    try:
        assert base_train.train(_cli.parse(base_train.Config, given), runtime) == 0
    finally:
        shards.read_row_group = real
    return []


def test_all_ranks_skip_the_same(data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two ranks finds the damage; both skip the shard from the same step on."""
    given = [*flags(data, 40, "--skip-bad-shards"), "--model-tag=two", "--total-batch-size=64"]
    run_ranks(2, train_on_rank, given, 1)
    assert skipped_counts(copied, "two")[-1] == 1
    checkpoint = copied / "base_checkpoints" / "two"
    shutil.rmtree(checkpoint / "000040")
    two = losses(copied, "two")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert base_train.main([*given, "--resume"]) == 0  # alone, and the shard is whole here
    np.testing.assert_allclose(losses(copied, "two"), two, rtol=1e-4)


def test_loaders_agree_after_a_skip(data: Path, tmp_path: Path) -> None:
    """Two ranks' rows are those of one, and what is skipped never comes, whatever was read ahead."""

    def loaders(world_size: int) -> list[PretrainLoader]:
        corpora = [resolve_corpus(str(data), tmp_path / "b", skip_bad=True) for _ in range(world_size)]
        return [
            PretrainLoader(corpus, TOKENIZER, sequence_len=16, rows_per_step=4, rank=rank, world_size=world_size)
            for rank, corpus in enumerate(corpora)
        ]

    def rows(group: list[PretrainLoader], steps: int) -> np.ndarray:
        out = [[loader.next_batch().inputs.numpy() for loader in group] for _ in range(steps)]
        return np.array([[parts[i % len(parts)][i // len(parts)] for i in range(4)] for parts in out])

    one, two = loaders(1), loaders(2)
    np.testing.assert_array_equal(rows(one, 10), rows(two, 10))
    for loader in one + two:
        loader.skip({str(data / "s1.parquet"): "for a test"})
    np.testing.assert_array_equal(rows(one, 200), rows(two, 200))
    again = loaders(1)
    again[0].load_state_dict(one[0].state_dict())
    assert again[0].skipped == one[0].skipped
    np.testing.assert_array_equal(rows(again, 100), late := rows(one, 100))
    words = TOKENIZER.decode(late.flatten().tolist())
    assert "1.1" not in words.replace("0.1", "") or not any(text in words for text in SHORT[1])
    for loader in one + two + again:
        loader.close()


def test_a_text_file_that_ends_too_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, base = tmp_path / "own", tmp_path / "base"
    own.mkdir()
    for i in range(3):
        (own / f"{i}.jsonl.gz").write_bytes(gzip.compress(jsonl(SHORT[i])))
    cut_off(own / "1.jsonl.gz")
    with pytest.raises(UserError, match=r"1.jsonl.gz.*--skip-bad-shards"):
        resolve_corpus(str(own), base)
    assert sorted(both(resolve_corpus(str(own), base, skip_bad=True))) == sorted(SHORT[0] + SHORT[2])
    assert "1.jsonl.gz" in capsys.readouterr().err


def test_many_bad_files_are_found_in_two_conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, conversions = tmp_path / "own", []
    own.mkdir()
    for i in range(8):
        (own / f"{i}.jsonl").write_bytes(jsonl(SHORT[i % 3]) if i in (0, 5) else b'{"text": \xff}')
    convert = own_files.convert
    monkeypatch.setattr(own_files, "convert", lambda *args: (conversions.append(args), convert(*args))[1])
    corpus = resolve_corpus(str(own), tmp_path / "base", skip_bad=True)
    assert len(conversions) == 2 and len(corpus.bad_shards.skipped) == 6
    assert sorted(both(corpus)) == sorted(SHORT[0] + SHORT[2])


def test_a_network_that_dies_while_training_costs_no_step(
    bucket: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(bucket / "data")
    monkeypatch.setenv("NANOCHAT_NETWORK_SECONDS", "0.3")
    monkeypatch.setenv("NANOCHAT_CACHE_GB", "0")

    def cut_the_line() -> None:
        Bucket.fail = fails(10**9, ConnectionResetError("reset by peer"))  # type: ignore[misc]

    assert base_train.main([*flags("bucket://data", 90), "--model-tag=straight"]) == 0
    at_batch(5, cut_the_line, monkeypatch)
    assert base_train.main(flags("bucket://data", 90, "--skip-bad-shards", "--eval-every=-1")) == 1
    error = capsys.readouterr().err
    assert "0.3 seconds" in error and "--resume" in error and "SKIPPED" not in error
    assert 5 <= len(losses(copied)) < 90
    Bucket.fail = staticmethod(lambda path, start, end: None)  # type: ignore[misc]
    assert base_train.main(flags("bucket://data", 90, "--resume")) == 0
    assert losses(copied) == losses(copied, "straight")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EIO])
def test_an_error_of_this_machine_is_no_bad_shard(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    put(tmp_path / "data")
    corpus = resolve_corpus(str(tmp_path / "data"), tmp_path, skip_bad=True)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, "not the file's fault")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    with pytest.raises(OSError, match="not the file's fault"):
        corpus.read("train", 0)
