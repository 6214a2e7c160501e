"""tok_train and tok_eval on a small file, and the published BPE ranks that tok_eval compares with."""

import base64
import dataclasses
import json
import socket
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.tokenizer import get_tokenizer
from scripts import _bpe_ranks, tok_eval, tok_train

TEXTS = ["the cat sat on the mat, then there was été", "bananas for 1234 other mothers 漢字漢字", "aaaa don't"]


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder, and no network."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(socket, "socket", None)
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "own.jsonl"
    rows = [{"text": f"{text} {i}", "source": "ab"[i % 2]} for i, text in enumerate(TEXTS * 100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_tok_train(base_dir: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = tok_train.train(tok_train.Config(data=data, vocab_size=300))
    tokenizer = get_tokenizer(base_dir / "tokenizer")
    assert record["hash"] == tokenizer.hash and record["vocab_size"] == 300
    assert record["seconds"] > 0 and 1 < record["bytes_per_token"] < 10
    assert "300" in capsys.readouterr().out


def test_tok_train_reads_no_more_than_asked(base_dir: Path, data: str) -> None:
    tok_train.main([f"--data={data}", "--vocab-size=265", "--doc-cap=50", "--max-chars=120"])
    record = tok_train.train(tok_train.Config(data=data, vocab_size=265, doc_cap=50, max_chars=120))
    assert (record["documents"], record["characters"]) == (3, 120)


@pytest.mark.parametrize("flag", ["--vocab-size=264", "--doc-cap=0", "--max-chars=-1", "--vocab-sice=300"])
def test_tok_train_mistakes(base_dir: Path, data: str, flag: str) -> None:
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        tok_train.main([f"--data={data}", flag])


def test_tok_eval_without_ranks_says_so(
    base_dir: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bpe_ranks.Reference, "places", lambda self, base_dir: iter(()))
    with pytest.raises(UserError, match="tok_train"):
        tok_eval.main([f"--data={data}"])
    tok_train.main([f"--data={data}", "--vocab-size=300"])
    record = tok_eval.evaluate(tok_eval.Config(data=data))
    output = capsys.readouterr().out
    assert "--gpt2-ranks" in output and "--gpt4-ranks" in output
    assert set(record["bytes_per_token"]) <= {"a", "b", "all"} and record["bytes_per_token"]["all"]["nanochat"] > 1


def test_counts_by_source() -> None:
    documents = [tok_eval.Document("xyz", "a"), tok_eval.Document("é", "b"), tok_eval.Document("12345", "a")]
    counters = {"nanochat": lambda texts: sum(map(len, texts)), "other": len}
    counts = tok_eval.count_by_source(documents, counters, max_chars=5)
    assert counts == {
        "a": {"documents": 2, "bytes": 5, "characters": 5, "nanochat": 5, "other": 2},  # "12" of the third
        "b": {"documents": 1, "bytes": 2, "characters": 1, "nanochat": 1, "other": 1},
        "all": {"documents": 3, "bytes": 7, "characters": 6, "nanochat": 6, "other": 3},
    }
    many = [tok_eval.Document("x", str(i)) for i in range(100)]
    assert len(tok_eval.count_by_source(many, counters, 5)) <= tok_eval.MAX_SOURCES + 2, "a source a document"


def test_sources_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    counts = tok_eval.count_by_source([tok_eval.Document("xyz", "[/b]\r\x1b[2J")], {"nanochat": len}, 5)
    tok_eval.print_table(counts, ["nanochat"])
    shown = capsys.readouterr().out
    assert "[/b]" in shown and "\\x1b[2J" in shown and "\r" not in shown and "\x1b[2J" not in shown


# GPT-2's own bytes-as-characters table begins at "!" and writes the blank as Ġ and the byte 0xC3 as Ã.
VOCAB_BPE = "#version: 0.2\nĠ t\nĠt h\nÃ ©\n"
GPT2_MERGES = [b" t", b" th", "é".encode()]


def test_ranks_in_both_published_forms(tmp_path: Path) -> None:
    (tmp_path / "vocab.bpe").write_text(VOCAB_BPE, encoding="utf-8")
    ranks = _bpe_ranks.parse_ranks(tmp_path / "vocab.bpe")
    assert ranks[b"!"] == 0 and ranks[b"~"] == 93 and ranks[b"\x00"] == 188 and ranks[b" "] == 220
    assert [token for token, rank in ranks.items() if rank >= 256] == GPT2_MERGES
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "gpt2.tiktoken").write_bytes(b"".join(lines))
    assert _bpe_ranks.parse_ranks(tmp_path / "gpt2.tiktoken") == ranks


def test_finding_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = dataclasses.replace(_bpe_ranks.GPT2, num_ranks=259, package="no_such_package_here")
    folder = tmp_path / "tokenizer_ranks"
    folder.mkdir()
    assert _bpe_ranks.find_reference(dataclasses.replace(small, urls=()), "", tmp_path) is None
    (folder / "vocab.bpe").write_text(VOCAB_BPE, encoding="utf-8")
    for flag in ("", str(folder), str(folder / "vocab.bpe")):
        counter = _bpe_ranks.find_reference(small, flag, tmp_path)
        assert counter and counter([" the", "é", " " * 1_000_000]) == 2 + 1 + 1_000_000
    with pytest.raises(UserError, match=r"--gpt2-ranks.*259 .*50,256"):
        _bpe_ranks.find_reference(_bpe_ranks.GPT2, str(folder), tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        _bpe_ranks.find_reference(small, str(tmp_path / "nowhere"), tmp_path)
    (folder / "vocab.bpe").write_text("not ranks at all", encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab.bpe.*GPT-2"):
        _bpe_ranks.find_reference(small, str(folder), tmp_path)
    capsys.readouterr()
    assert _bpe_ranks.find_reference(dataclasses.replace(small, urls=()), "", tmp_path) is None
    assert "vocab.bpe" in capsys.readouterr().err
