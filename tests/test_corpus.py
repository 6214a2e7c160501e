"""The corpus interface: what another source of documents has to implement, and what it gets for that."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_helpers import TOKENIZER, make_texts, rows_of, texts_of
from stubs import TINY

from nanochat import dataset
from nanochat.common import BadShard
from nanochat.data.corpus import BadShards, Corpus, Document, InMemoryCorpus
from nanochat.dataloader import PretrainLoader
from scripts import base_train

ROWS = 50  # per row group


class SqliteCorpus(Corpus):
    """The rows of the table `documents(text)`, one in ten of them for validation."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_rows = self.query("SELECT max(rowid) FROM documents")[0][0]
        super().__init__(path, fingerprint=str(self.query("SELECT count(*), sum(length(text)) FROM documents")))

    def num_row_groups(self, split: str) -> int:
        return -(-self.num_rows // ROWS)

    def read(self, split: str, index: int) -> list[Document]:
        side = "= 0" if split == "val" else "> 0"
        where = f"rowid > {index * ROWS} AND rowid <= {(index + 1) * ROWS} AND rowid % 10 {side}"
        return [Document(text, "sqlite") for (text,) in self.query(f"SELECT text FROM documents WHERE {where}")]

    def query(self, sql: str) -> list[Any]:
        connection = sqlite3.connect(self.path)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = str(tmp_path / "table.db")
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE documents (text)")
    connection.executemany("INSERT INTO documents VALUES (?)", [(text,) for text in make_texts(220)])
    connection.commit()
    connection.close()
    return path


def test_two_methods_are_enough_to_train_and_resume(table: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "open_own_files", lambda data, opener, known_names: SqliteCorpus(data))
    flags = [*TINY, f"--data={table}", "--model-tag=sql", "--num-iterations=4", "--save-every=2", "--keep-last=0"]
    run = copied / "base_checkpoints" / "sql"

    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert base_train.main(flags) == 0
    straight = losses()
    (run / "000004").rename(copied / "gone")
    assert base_train.main([*flags, "--resume"]) == 0
    assert len(straight) == 4 and losses() == straight


def test_documents_in_order_and_the_same_rows_every_time(table: str) -> None:
    corpus, texts = SqliteCorpus(table), make_texts(220)
    assert texts_of(corpus, "val") == texts[9::10]
    assert texts_of(corpus, "train") == [text for i, text in enumerate(texts) if i % 10 != 9]
    np.testing.assert_array_equal(rows_of(corpus, 10), rows_of(SqliteCorpus(table), 10))
    assert corpus.record() == {"fingerprint": corpus.fingerprint} and not corpus.bad_shards.skipped


class TwoShards(InMemoryCorpus):
    """Two row groups, of which the second is a shard that cannot be read."""

    def num_row_groups(self, split: str) -> int:
        return 2

    def read(self, split: str, index: int) -> list[Document]:
        if index == 1 and "two" not in self.bad_shards:
            raise self.bad_shards.with_hint(BadShard("two is damaged", "two"))
        return self.documents if index == 0 else []


def test_bad_shards_are_skipped_only_if_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = TwoShards("mine", [Document(text, "a") for text in make_texts(5)])
    with pytest.raises(BadShard, match="--skip-bad-shards"):
        texts_of(corpus, "train")
    corpus.bad_shards = BadShards(may_skip=True)
    for _ in range(2):
        assert texts_of(corpus, "train") == make_texts(5)
    assert corpus.bad_shards.skipped == {"two": "two is damaged"}
    assert capsys.readouterr().err.count("two is damaged") == 1
    state = corpus.bad_shards.to_arrays()
    assert BadShards.from_arrays(state) == corpus.bad_shards.skipped and BadShards.from_arrays({}) == {}


def test_evaluation_reads_bad_shards_as_empty_and_skips_none(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = TwoShards("mine", [Document(text, "a") for text in make_texts(5)])
    corpus.bad_shards = BadShards(may_skip=True)
    loader = PretrainLoader(corpus, TOKENIZER, sequence_len=16, rows_per_step=4, empty_if_bad=True)
    for _ in range(3):
        loader.next_batch()
    loader.close()
    assert loader.skips_bad_shards and not loader.skipped
    assert capsys.readouterr().err.count("two is damaged") == 1
