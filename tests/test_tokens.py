"""Token files: the same batches as from the text; made in parallel, continued, never stale or damaged."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_helpers import TEXTS, TOKENIZER, damage, jsonl, make_texts, rows_of, write_parquet

from nanochat.common import UserError
from nanochat.data import document_order, pretokenized
from nanochat.data.shards import ShardCorpus
from nanochat.dataset import resolve_corpus
from nanochat.tokenizer import RustBPETokenizer
from scripts import tok_data


@pytest.fixture
def data(base: Path) -> Path:
    """Three shards read in place, and a text file that is converted; the base folder has the tokenizer."""
    folder = base / "data"
    for i in range(3):
        write_parquet(folder / f"s{i}.parquet", [*TEXTS[i:900:3], "", "\n"], 40)
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS[900:]))
    TOKENIZER.save(base / "tokenizer")
    return folder


class NoText:
    """A tokenizer that must not be called."""

    hash, get_vocab_size, get_bos_token_id = TOKENIZER.hash, TOKENIZER.get_vocab_size, TOKENIZER.get_bos_token_id

    def encode(self, text: list[str], num_threads: int) -> list[list[int]]:
        raise AssertionError("tokenised on the fly")


def opened(data: Path, base: Path) -> ShardCorpus:
    corpus = resolve_corpus(str(data), base)
    assert isinstance(corpus, ShardCorpus)
    return corpus


def token_files(base: Path) -> list[Path]:
    return sorted(path for path in (base / "tokens").rglob("*.parquet") if not path.name.startswith("."))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_batches_as_on_the_fly(world_size: int, data: Path, base: Path, monkeypatch) -> None:
    monkeypatch.setattr(document_order, "MAX_SEGMENT_CHARS", 100)  # documents in several segments
    fly = [rows_of(opened(data, base), 120, rank, world_size) for rank in range(world_size)]
    assert tok_data.main([f"--data={data}", "--workers=1"]) == 0
    for rank in range(world_size):
        np.testing.assert_array_equal(rows_of(opened(data, base), 120, rank, world_size, NoText()), fly[rank])


def test_the_same_validation_and_small_data(data: Path, base: Path) -> None:
    """The split of small data, where one document is held out, is kept; and so is validation."""
    (data / "few").mkdir()
    write_parquet(data / "few" / "few.parquet", make_texts(9), 4)
    for folder in (data, data / "few"):

        def segments(tokenizer: object, folder: Path = folder) -> list[list[list[int]]]:
            corpus = opened(folder, base)
            reader = pretokenized.segment_reader(corpus, tokenizer)
            return [
                [
                    segment.ids.tolist() if isinstance(segment, document_order.Tokens) else TOKENIZER.encode(segment)
                    for segment in reader.read(split, i)
                ]
                for split in ("train", "val")
                for i in range(corpus.num_row_groups(split))
            ]

        before = segments(TOKENIZER)
        assert tok_data.main([f"--data={folder}", "--workers=1"]) == 0
        assert isinstance(pretokenized.segment_reader(opened(folder, base), TOKENIZER), pretokenized.TokenReader)
        assert segments(NoText()) == before


def test_token_files_of_another_tokenizer_or_text_are_not_used(data: Path, base: Path) -> None:
    assert tok_data.main([f"--data={data}", "--workers=1"]) == 0
    other = RustBPETokenizer.train_from_iterator(TEXTS[:50], 290)
    assert other.hash != TOKENIZER.hash
    expected = rows_of(opened(data, base / "elsewhere"), 30, tokenizer=other)
    np.testing.assert_array_equal(rows_of(opened(data, base), 30, tokenizer=other), expected)
    path = data / "s1.parquet"
    changed = [text[::-1] for text in TEXTS[1:900:3]]
    for make_same in (False, True):
        size, times = path.stat().st_size, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        write_parquet(path, changed if not make_same else changed[::-1], 40)
        if make_same:  # a file of the same size, which differs by its time only
            os.utime(path, ns=(times[0], times[1] + 1))
        assert make_same or path.stat().st_size != size
        expected = rows_of(opened(data, base / f"elsewhere{make_same}"), 60)
        np.testing.assert_array_equal(rows_of(opened(data, base), 60), expected)
        with pytest.raises(AssertionError, match="on the fly"):
            rows_of(opened(data, base), 60, tokenizer=NoText())
        assert tok_data.main([f"--data={data}", "--workers=1"]) == 0


@pytest.mark.parametrize("how", ["a bit", "the end", "all", "another's"])
def test_damaged_files_are_reported_and_not_used(how: str, data: Path, base: Path, capsys) -> None:
    expected = rows_of(opened(data, base), 60)
    assert tok_data.main([f"--data={data}", "--workers=1"]) == 0
    shards = opened(data, base).shards["train"]
    own, other = (pretokenized.token_path(base / "tokens", shard, TOKENIZER) for shard in shards[:2])
    if how == "a bit":
        damage(own, 300)
    elif how == "another's":
        own.write_bytes(other.read_bytes())
    else:
        own.write_bytes(own.read_bytes()[:-100] if how == "the end" else b"")
    capsys.readouterr()
    np.testing.assert_array_equal(rows_of(opened(data, base), 60), expected)
    assert str(own) in capsys.readouterr().err
    assert tok_data.main([f"--data={data}", "--workers=1"]) == 0
    rows_of(opened(data, base), 60, tokenizer=NoText())


def test_no_bit_that_flips_changes_a_token(data: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tok_data.main([f"--data={data}", "--workers=1"]) == 0
    monkeypatch.setattr(pretokenized, "warn", lambda message: None)
    corpus = opened(data, base)
    path = pretokenized.token_path(base / "tokens", corpus.shards["train"][0], TOKENIZER)
    whole = path.read_bytes()
    expected = [TOKENIZER.encode(d.text) for d in corpus.read("train", 2)]
    used = 0
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole)
        damage(path, at)
        found = pretokenized.segment_reader(corpus, TOKENIZER).read("train", 2)
        used += isinstance(found[0], document_order.Tokens)
        assert not isinstance(found[0], document_order.Tokens) or [t.ids.tolist() for t in found] == expected, at
    assert used > 50  # damage to other row groups does not affect this one


def test_token_files_are_made_in_parallel_and_only_once(data: Path, base: Path, capsys) -> None:
    assert tok_data.main([f"--data={data}", "--workers=1"]) == 0
    one = {path.name: pq.read_table(path) for path in token_files(base)}
    for path in token_files(base)[1:]:
        path.unlink()
    left = token_files(base)[0].stat().st_mtime_ns
    (token_files(base)[0].parent / ".dead.tmp").write_bytes(b"of a killed command")
    capsys.readouterr()
    assert tok_data.main([f"--data={data}", "--workers=2"]) == 0
    output = capsys.readouterr().out
    assert f"{len(one) - 1} of {len(one)} shards" in output and f"{len(one)}/{len(one)} shards" in output
    assert {path.name: pq.read_table(path) for path in token_files(base)} == one
    assert min(path.stat().st_mtime_ns for path in token_files(base)) == left
    assert not list((base / "tokens").rglob("*.tmp"))


def test_an_interrupted_command_continues(data: Path, base: Path) -> None:
    """Ctrl-C leaves no partial file and no process; complete files stay."""
    large = write_parquet(data / "t.parquet", make_texts(1000, words=600), 50).read_bytes()
    for i in range(40):
        (data / f"t{i:02d}.parquet").write_bytes(large)
    command = [sys.executable, "-m", "scripts.tok_data", f"--data={data}", "--workers=2"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(token_files(base)) < 3:
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    began = time.monotonic()
    error = job.communicate(timeout=30)[1]
    assert job.returncode == 130 and "Traceback" not in error, error
    assert time.monotonic() - began < 10 and not list((base / "tokens").rglob("*.tmp"))
    done = token_files(base)
    assert 3 <= len(done) < 45 and all(pq.ParquetFile(path).metadata.metadata for path in done)


def test_a_bad_shard(data: Path, base: Path, capsys) -> None:
    path = data / "s2.parquet"
    content = bytearray(path.read_bytes())
    content[1000:3000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"s2.parquet.*--skip-bad-shards"):
        tok_data.main([f"--data={data}", "--workers=1"])
    assert tok_data.main([f"--data={data}", "--workers=1", "--skip-bad-shards"]) == 0
    assert "s2.parquet" in capsys.readouterr().err
    with pytest.raises(UserError, match="--workers"):
        tok_data.main(["--workers=0"])
