"""Corpora of files: every kind of file, the split, bounded memory, and a one-line error for every broken input."""

import errno
import gzip
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpus_helpers import WORDS, both, jsonl, make_texts, texts_of, write_parquet

from nanochat import dataset
from nanochat.common import BadShard, UserError
from nanochat.data import own_files, parquet, shards, text_stream, textfiles, to_parquet
from nanochat.data.corpus import VAL_LIMIT, Document, document_hash
from nanochat.dataset import SavedCorpus, open_corpus, resolve_corpus
from nanochat.runtime import Runtime


def error_of(data: object, base: Path) -> str:
    with pytest.raises(UserError) as caught:
        corpus = resolve_corpus(str(data), base)
        for split in ("train", "val"):
            list(corpus.iter_documents(split))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 + len(str(data))
    return message


# ---------------------------------------------------------------------------------------------------
# Own data


def test_every_kind_of_file_in_one_folder(own: Path, base: Path) -> None:
    parts = [make_texts(150, seed) for seed in range(6)]
    (own / "deep" / "er").mkdir(parents=True)
    (own / "plain.jsonl").write_bytes(jsonl(parts[0]))
    (own / "deep" / "zip.JSONL.gz").write_bytes(gzip.compress(jsonl(parts[1])))
    half = jsonl(parts[2][:70]), jsonl(parts[2][70:])
    (own / "deep" / "er" / "z.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, half)))  # two frames
    for i, text in enumerate(parts[3]):
        (own / "deep" / f"tale{i}.txt").write_text(text + "\n", encoding="utf-8")
    write_parquet(own / "small.parquet", parts[4], 40)
    write_parquet(own / "deep" / "named.parquet", parts[5], 40, source=["elsewhere"] * 150)
    (own / ".hidden.txt").write_text("never")
    (own / ".git").mkdir()
    (own / ".git" / "x.txt").write_text("never")
    (own / "readme.pdf").write_bytes(b"\xff\xfe")

    corpus = resolve_corpus(str(own), base)
    assert sorted(both(corpus)) == sorted(text for part in parts for text in part)
    sources = {document.source for split in ("train", "val") for document in corpus.iter_documents(split)}
    assert {"plain", "zip", "z", "tale0", "small", "elsewhere"} <= sources and "named" not in sources
    backwards = [corpus.read("train", i) for i in reversed(range(corpus.num_row_groups("train")))]
    assert [d.text for group in backwards[::-1] for d in group] == texts_of(corpus, "train")
    assert all(len(group) <= 1024 for group in backwards)


def test_the_split_is_by_hash_alone(own: Path, base: Path) -> None:
    def is_val(text: str) -> bool:  # the definition, independently
        return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) * 100 < 2**64

    texts = make_texts(4000, words=3)
    write_parquet(own / "a.parquet", texts[:2000])
    (own / "b.jsonl").write_bytes(jsonl(texts[2000:] + texts[:500]))  # 500 are in both files
    corpus = resolve_corpus(str(own), base)
    assert sorted(set(texts_of(corpus, "val"))) == sorted(filter(is_val, texts))
    assert sorted(set(texts_of(corpus, "train"))) == sorted(t for t in texts if not is_val(t))
    assert 15 < sum(map(is_val, texts)) < 75
    before = set(texts_of(corpus, "val"))
    (own / "c.jsonl").write_bytes(jsonl(make_texts(1000, seed=9)))
    assert before < set(texts_of(resolve_corpus(str(own), base), "val"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "mixed"])
def test_small_data_validates_on_its_smallest_hash(kind: str, own: Path, base: Path) -> None:
    texts = ["one", "two", "three", "one"]
    if kind == "mixed":
        write_parquet(own / "a.parquet", texts[:1])
        (own / "a.jsonl").write_bytes(jsonl(texts[1:]))
    elif kind == "parquet":
        write_parquet(own / "a.parquet", texts)
    else:
        (own / "a.jsonl").write_bytes(jsonl(texts))
    corpus = resolve_corpus(str(own), base)
    smallest = min(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
    assert set(texts_of(corpus, "val")) == {smallest}
    assert sorted(both(corpus)) == sorted(texts)


def test_documents_all_with_validation_hashes_leave_one_for_validation(own: Path, base: Path) -> None:
    chosen = [t for t in make_texts(2000, words=2) if document_hash(t) < VAL_LIMIT][:3]
    (own / "a.jsonl").write_bytes(jsonl(chosen))
    corpus = resolve_corpus(str(own / "a.jsonl"), base)
    assert len(texts_of(corpus, "val")) == 1 and len(texts_of(corpus, "train")) == 2


def test_blank_documents_are_left_out(own: Path, base: Path) -> None:
    rows = b'{"text": ""}\n\n{"text": " \\n\\u3000"}\r\n{"text": null}\n{"text": " a "}\n{"text": "b"}'
    (own / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows)
    assert sorted(both(resolve_corpus(str(own), base))) == [" a ", "b"]
    write_parquet(own / "p.parquet", ["c", "", "\t", None, "d"])  # type: ignore[list-item]
    assert sorted(both(resolve_corpus(str(own / "*.parquet"), base))) == ["c", "d"]


def test_parquet_string_types(own: Path, base: Path) -> None:
    texts = make_texts(50)
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
        pq.write_table(pa.table({"id": list(range(50)), "text": column}), own / "x.parquet")
        assert sorted(both(resolve_corpus(str(own / "x.parquet"), base))) == sorted(texts)


def test_parquet_with_huge_row_groups_is_converted(own: Path, base: Path, monkeypatch) -> None:
    texts = make_texts(3000)
    write_parquet(own / "big.parquet", texts, row_group_size=10**6)
    assert resolve_corpus(str(own), base).num_row_groups("train") == 1  # within the limits: read in place
    assert not (base / "converted").exists()
    monkeypatch.setattr(own_files, "MAX_GROUP_ROWS", 2999)
    corpus = resolve_corpus(str(own), base)
    assert sorted(both(corpus)) == sorted(texts) and corpus.num_row_groups("train") == 3
    assert {d.source for d in corpus.iter_documents("train")} == {"big"}


def test_globs(own: Path, base: Path) -> None:
    for name in ("a1", "a2", "b"):
        (own / f"{name}.jsonl").write_bytes(jsonl(make_texts(5, seed=ord(name[-1]))))
    assert len(both(resolve_corpus(str(own / "a*.jsonl"), base))) == 10
    assert len(both(resolve_corpus(str(own.parent / "o*"), base))) == 15
    assert len(both(resolve_corpus(str(own.parent / "**" / "*.jsonl"), base))) == 15
    odd = own.parent / "[odd] name"
    odd.mkdir()
    (odd / "x.txt").write_text("first\n")
    (odd / "y.txt").write_text("second\n")
    assert sorted(both(resolve_corpus(str(odd), base))) == ["first", "second"]


# ---------------------------------------------------------------------------------------------------
# Long text files


def paragraphs(size: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    out: list[str] = []
    while sum(map(len, out)) < size:
        out.append(" ".join(rng.choices(WORDS, k=rng.randrange(5, 120))) + "\n\n")
    return "".join(out)


def test_a_long_text_is_cut_at_paragraphs(own: Path) -> None:
    text = paragraphs(300_000)
    (own / "a.txt").write_text(text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    pieces = [document.text for document in textfiles.file_documents(own / "a.txt")]
    assert "\n\n".join(pieces) + "\n\n" == text  # cut at blank lines only, nothing lost, \r\n made \n
    sizes = [len(piece.encode()) for piece in pieces]
    assert all(4_096 <= size <= 16_384 for size in sizes) and 7_000 < sum(sizes) / len(sizes) < 13_000
    (own / "b.txt").write_text(text[:8000], encoding="utf-8")
    assert len(list(textfiles.file_documents(own / "b.txt"))) == 1


@pytest.mark.parametrize("unit", ["山", "🙂", "word ", "line of words\n", "x"])
def test_text_without_paragraphs_is_cut_where_it_can(unit: str, own: Path) -> None:
    text = unit * (120_000 // len(unit.encode()))
    (own / "a.txt").write_text(text, encoding="utf-8")
    pieces = [document.text for document in textfiles.file_documents(own / "a.txt")]
    assert len(pieces) > 8 and all(len(piece.encode()) <= 16_384 for piece in pieces)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    if unit == "word ":
        assert all(piece.startswith("word") for piece in pieces)


# ---------------------------------------------------------------------------------------------------
# Conversion


def test_conversion_is_done_once_and_again_when_a_file_changes(own: Path, base: Path, monkeypatch) -> None:
    (own / "a.jsonl").write_bytes(jsonl(make_texts(300)))
    first = resolve_corpus(str(own), base)
    monkeypatch.setattr(to_parquet, "convert_into", lambda *_: pytest.fail("converted twice"))
    assert resolve_corpus(str(own), base).fingerprint == first.fingerprint
    monkeypatch.undo()
    changed = make_texts(300)
    changed[7] = changed[7].replace("0.7", "1.7")  # same length
    (own / "a.jsonl").write_bytes(jsonl(changed))
    os.utime(own / "a.jsonl", ns=(0, 0))  # another time, however coarse the clock
    second = resolve_corpus(str(own), base)
    assert second.fingerprint != first.fingerprint and sorted(both(second)) == sorted(changed)


def test_conversion_is_deterministic_and_mixes(own: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(to_parquet, "SHUFFLE_DOCUMENTS", 100)
    monkeypatch.setattr(to_parquet, "GROUP_DOCUMENTS", 64)
    monkeypatch.setattr(to_parquet, "SHARD_ROW_GROUPS", 3)
    texts = make_texts(1000)
    (own / "a.jsonl").write_bytes(jsonl(texts))
    one, two = (resolve_corpus(str(own), tmp_path / name) for name in ("x", "y"))
    assert texts_of(one, "train") == texts_of(two, "train") and one.fingerprint == two.fingerprint
    order = texts_of(one, "train")
    assert order != [t for t in texts if t in set(order)] and sorted(both(one)) == sorted(texts)
    assert len(one.shards["train"]) > 1 and one.num_row_groups("train") >= 15


def test_a_killed_conversion_leaves_nothing_behind_and_starts_over(own: Path, base: Path, monkeypatch) -> None:
    (own / "a.jsonl").write_bytes(jsonl(make_texts(300)))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_parquet, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        resolve_corpus(str(own), base)
    assert [p for p in (base / "converted").iterdir() if p.is_dir()] == []
    monkeypatch.undo()
    key = to_parquet.conversion_key([own / "a.jsonl"])
    (base / "converted" / f".{key}.dead.tmp").mkdir()  # as SIGKILL leaves it
    assert len(both(resolve_corpus(str(own), base))) == 300
    assert [p.name for p in (base / "converted").iterdir() if p.is_dir()] == [key]


@pytest.mark.parametrize("content", ['{"version": 2, "tal', "[]", '{"version": 2, "tally": {"train": "many"}}'])
def test_a_damaged_conversion_is_made_again(content: str, own: Path, base: Path) -> None:
    """With the same result: a run resumes on it."""
    (own / "a.jsonl").write_bytes(jsonl(make_texts(300)))
    first = resolve_corpus(str(own), base)
    (manifest,) = (base / "converted").glob("*/manifest.json")
    before = manifest.read_bytes()
    manifest.write_text(content)
    assert resolve_corpus(str(own), base).fingerprint == first.fingerprint and manifest.read_bytes() == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: shard.write_bytes(shard.read_bytes()[:-9])])
def test_a_conversion_with_a_shard_missing_or_cut_is_made_again(damage: Any, own: Path, base: Path) -> None:
    (own / "a.jsonl").write_bytes(jsonl(make_texts(300)))
    first = resolve_corpus(str(own), base)
    damage(next((base / "converted").glob("*/train_*.parquet")))
    again = resolve_corpus(str(own), base)
    assert again.fingerprint == first.fingerprint and len(both(again)) == 300


def test_a_conversion_damaged_inside_names_the_folder_to_delete(own: Path, base: Path) -> None:
    (own / "a.jsonl").write_bytes(jsonl(make_texts(300)))
    resolve_corpus(str(own), base)
    shard = next((base / "converted").glob("*/train_*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(BadShard, match=re.escape(f"delete {shard.parent}")):
        both(resolve_corpus(str(own), base))
    shutil.rmtree(shard.parent)
    assert len(both(resolve_corpus(str(own), base))) == 300


def test_a_full_disk_is_not_the_users_mistake(own: Path, base: Path, monkeypatch) -> None:
    (own / "a.jsonl").write_bytes(jsonl(make_texts(300)))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(to_parquet.pq.ParquetWriter, "write_table", refuse)
    with pytest.raises(OSError, match="No space left"):
        resolve_corpus(str(own), base)
    assert [p for p in (base / "converted").iterdir() if p.is_dir()] == []


def test_validation_documents_of_mixed_files_are_cached_within_limits(own: Path, base: Path, monkeypatch) -> None:
    write_parquet(own / "a.parquet", make_texts(3000), 100)
    for limit, again in ((2**20, 0), (1, 29), (-1, 30)):
        monkeypatch.setattr(shards, "VAL_CACHE_CHARS", limit)
        reads: list[int] = []

        def spy(path: Path, index: int, *args: object, reads: list[int] = reads) -> list[Document]:
            reads.append(index)
            return parquet.read_row_group(path, index, *args)

        monkeypatch.setattr(shards, "read_row_group", spy)
        corpus = resolve_corpus(str(own), base)
        first = texts_of(corpus, "val")
        assert len(reads) == 30 and texts_of(corpus, "val") == first
        assert again - 2 <= len(reads) - 30 <= again  # row groups without validation documents take no room
    assert not set(first) & set(texts_of(corpus, "train"))


def test_processes_convert_once(own: Path, base: Path) -> None:
    (own / "a.jsonl").write_bytes(jsonl(make_texts(20000)))
    code = (
        "import sys; from pathlib import Path; from nanochat import dataset; "
        "from nanochat.data import to_parquet; real = to_parquet.convert_into\n"
        "def spy(*a): print('converting'); return real(*a)\n"
        "to_parquet.convert_into = spy\n"
        "print(dataset.resolve_corpus(sys.argv[1], Path(sys.argv[2])).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(own), str(base)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [job.communicate(timeout=60)[0].split() for job in jobs]
    assert sum(words.count("converting") for words in outputs) == 1
    assert len({words[-1] for words in outputs}) == 1


# ---------------------------------------------------------------------------------------------------
# Memory


def test_memory_is_bounded_while_converting_and_reading(own: Path, base: Path, monkeypatch) -> None:
    monkeypatch.setattr(to_parquet, "SHUFFLE_CHARS", 2**20)
    monkeypatch.setattr(to_parquet, "GROUP_CHARS", 2**20)
    rng = random.Random(0)
    with gzip.open(own / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(700):
            file.write(jsonl([rng.randbytes(16384).hex()]))  # 22 MB of text
    tracemalloc.start()
    try:
        corpus = resolve_corpus(str(own), base)
        assert corpus.num_row_groups("train") > 18
        held = 0
        for i in range(corpus.num_row_groups("train")):
            corpus.read("train", i)
            held = max(held, pa.total_allocated_bytes())  # between reads Arrow holds nothing
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20 and held < 2**16


def test_a_huge_row_group_is_streamed(own: Path) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(2048).hex() for _ in range(6000)]  # 24 MB in one row group
    path = write_parquet(own / "a.parquet", texts, row_group_size=10**6)
    count = most = 0
    for document in parquet.parquet_documents(path, "a"):
        count += document.text == texts[count]
        most = max(most, pa.total_allocated_bytes())
    assert count == 6000 and most < 12 * 2**20


def test_row_groups_are_read_from_several_threads(own: Path, base: Path) -> None:
    write_parquet(own / "a.parquet", make_texts(2000), 50)
    corpus = resolve_corpus(str(own), base)
    results: dict[int, list[str]] = {}

    def work(name: int) -> None:
        results[name] = texts_of(corpus, "train")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == texts_of(corpus, "train") for result in results.values()) and len(results) == 4


# ---------------------------------------------------------------------------------------------------
# Starter and public sets


@pytest.fixture
def starter(tmp_path: Path, monkeypatch) -> list[str]:
    texts = make_texts(30)
    write_parquet(tmp_path / "starter" / "train.parquet", texts[:25], 10, source=["tales"] * 25)
    write_parquet(tmp_path / "starter" / "val.parquet", texts[25:], 10, source=["news"] * 5)
    monkeypatch.setattr(dataset, "starter_dir", lambda: tmp_path / "starter")
    return texts


def put_shards(base: Path, name: str, *indices: int) -> None:
    for index in indices:
        write_parquet(base / "base_data" / name / f"shard_{index:05d}.parquet", make_texts(20, seed=index), 8)


def test_starter_is_the_default_where_nothing_is_downloaded(starter: list[str], base: Path) -> None:
    for data in ("", "starter"):
        corpus = resolve_corpus(data, base)
        assert corpus.name == "starter"
        assert texts_of(corpus, "train") == starter[:25] and texts_of(corpus, "val") == starter[25:]
        assert next(corpus.iter_documents("val")).source == "news" and corpus.num_row_groups("train") == 3
    put_shards(base, "climbmix", 0, 6542)
    assert resolve_corpus("", base).name == "climbmix" and resolve_corpus("starter", base).name == "starter"


def test_starter_val_is_the_only_validation_text(starter: list[str], own: Path, base: Path) -> None:
    mine = make_texts(300, seed=7)
    write_parquet(own / "mine.parquet", mine, 50)
    corpus = resolve_corpus(f"{own},starter-val", base)
    assert texts_of(corpus, "val") == starter[25:]
    assert sorted(texts_of(corpus, "train")) == sorted(mine)  # nothing of it is held out
    again = resolve_corpus(f"{own},starter-val", base, recorded=corpus.record())
    assert again.fingerprint == corpus.fingerprint and texts_of(again, "val") == starter[25:]
    assert texts_of(resolve_corpus("starter,starter-val", base), "train") == starter[:25]
    for alone in ("starter-val", "starter-val,starter-val"):
        assert "no text to train on" in error_of(alone, base)


def test_public_shards_split_by_file(base: Path) -> None:
    put_shards(base, "fineweb-edu", 0, 3, 1822)
    corpus = resolve_corpus("fineweb-edu", base)
    assert texts_of(corpus, "train") == make_texts(20, seed=0) + make_texts(20, seed=3)
    assert texts_of(corpus, "val") == make_texts(20, seed=1822)
    assert {d.source for d in corpus.iter_documents("train")} == {"fineweb-edu"}
    before = corpus.fingerprint
    put_shards(base, "fineweb-edu", 1)
    assert resolve_corpus("fineweb-edu", base).fingerprint != before


def test_public_sets_that_are_absent_name_the_download(base: Path) -> None:
    assert "python -m nanochat.dataset -n 8" in error_of("fineweb-edu", base)
    assert "python -m nanochat.dataset -n 8 --set climbmix" in error_of("climbmix", base)
    put_shards(base, "climbmix", 0)
    assert "shard_06542.parquet" in error_of("climbmix", base)
    put_shards(base, "fineweb-edu", 1822)
    assert "training shards" in error_of("fineweb-edu", base)


def test_a_missing_starter_corpus_is_named(tmp_path: Path, base: Path, monkeypatch) -> None:
    monkeypatch.setattr(dataset, "starter_dir", lambda: tmp_path / "none")
    assert "train.parquet" in error_of("starter", base)


# ---------------------------------------------------------------------------------------------------
# Broken input: one line that names the place


def test_paths_without_usable_files(own: Path, base: Path) -> None:
    assert "climbmix" in error_of(own / "absent", base)  # one of the names to choose from
    assert "fineweb-edu" in error_of("fineweb", base)
    assert "*.jsonl" in error_of(own / "*.jsonl", base)
    assert "empty" in error_of(own, base)
    (own / "a.docx").write_text("text\nhello\n")
    assert " 1 " in error_of(own, base) and ".jsonl" in error_of(own, base)
    assert ".jsonl" in error_of(own / "a.docx", base)
    (own / "broken.txt").symlink_to(own / "gone")
    assert "broken.txt" in error_of(own, base)


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("One.\n\nTwo\nlines.\n\n\n\nThree.\n", ["One.", "Three.", "Two\nlines."]),
        ("One.\nTwo lines.\nThree.", ["One.", "Three.", "Two lines."]),
    ],
)
def test_a_lone_short_text_is_split_to_have_something_to_validate_on(
    text: str, documents: list[str], own: Path, base: Path
) -> None:
    (own / "notes.txt").write_text(text)
    corpus = resolve_corpus(str(own / "notes.txt"), base)
    held_out, trained = ([d.text for d in corpus.iter_documents(split)] for split in ("val", "train"))
    assert len(held_out) == 1 and sorted(held_out + trained) == documents


def test_files_without_text(own: Path, base: Path, capsys) -> None:
    for name in ("a.txt", "b.jsonl"):
        (own / name).write_bytes(b"")
        assert "no document" in error_of(own / name, base)
        assert name in capsys.readouterr().err
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), own / "c.parquet")
    assert "no document" in error_of(own / "c.parquet", base)
    (own / "d.txt").write_text("alone")
    assert "one document" in error_of(own / "d.txt", base)
    (own / "e.txt").write_text("alone\n")
    assert "one document" in error_of(own, base)  # two files, one text


def test_parquet_without_text_names_its_columns(own: Path, base: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), own / "a.parquet")
    assert "content, url" in error_of(own, base)
    pq.write_table(pa.table({"text": [1, 2]}), own / "a.parquet")
    assert "int64" in error_of(own, base)


def test_damaged_parquet(own: Path, base: Path) -> None:
    path = write_parquet(own / "a.parquet", make_texts(2000), 500)
    whole = path.read_bytes()
    for broken in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-4]):
        path.write_bytes(broken)
        message = error_of(own, base)
        assert "a.parquet" in message
    path.write_bytes(whole[:200] + bytes(2000) + whole[2200:])
    assert "a.parquet" in error_of(own, base)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', ["line 2", "JSON"]),
        (b'{"text": "a"}\n\n{"content": "b", "id": 1}\n', ["line 3", "content, id"]),
        (b'{"messages": []}\n', ["line 1", "chat_sft"]),
        (b'{"text": "a"}\n["b"]\n', ["line 2", "list"]),
        (b'{"text": "a"}\n{"text": 5}\n', ["line 2", "int"]),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ["line 2", "UTF-8", "iconv"]),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', ["line 2", "\\ud800"]),
        (b'{"text": "a", "source": "\\udfff"}\n', ["line 1", "\\udfff"]),
        ('{"text": "a"}\n'.encode("utf-16"), ["UTF-16", "iconv", "UTF-8"]),
        (b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
    ],
)
def test_broken_jsonl(content: bytes, expected: list[str], own: Path, base: Path) -> None:
    (own / "a.jsonl").write_bytes(content)
    (own / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (own / "c.jsonl.zst").write_bytes(zstandard.compress(content))
    for path in own.iterdir():
        message = error_of(path, base)
        assert path.name in message and all(words in message for words in expected), message


def test_a_line_without_end_is_refused(own: Path, base: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_stream, "MAX_LINE_BYTES", 2**20)
    (own / "a.jsonl").write_bytes(b"x" * (2**20 + 2**17))
    assert "a.jsonl" in error_of(own, base) and "MiB" in error_of(own, base)


def test_invalid_utf8_in_txt_names_the_line(own: Path, base: Path) -> None:
    lines = [line.encode() for line in paragraphs(60_000).split("\n")]
    for number in (0, 1, 200, len(lines) - 1):
        broken = list(lines)
        broken[number] = broken[number] + b" caf\xe9 "
        (own / "a.txt").write_bytes(b"\n".join(broken))
        assert f"a.txt, line {number + 1}" in error_of(own, base)
    (own / "a.txt").write_bytes(b"\n".join(lines) + "山".encode()[:2])  # cut inside a character
    assert f"a.txt, line {len(lines)}" in error_of(own, base)


def test_invalid_utf8_in_parquet_names_the_row(own: Path, base: Path) -> None:
    raw = [text.encode() for text in make_texts(500)]
    raw[321] = b"caf\xe9"
    column = pa.array(raw, pa.binary()).view(pa.string())
    for rows in (100, 10**6):
        pq.write_table(pa.table({"text": column}), own / "a.parquet", row_group_size=rows)
        assert "a.parquet, row 322" in error_of(own, base)
        with pytest.raises(UserError, match="row 322"):
            list(parquet.parquet_documents(own / "a.parquet", ""))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst"])
def test_damaged_compression(kind: str, own: Path, base: Path) -> None:
    content = jsonl(make_texts(2000)) if "jsonl" in kind else paragraphs(100_000).encode()
    packed = gzip.compress(content) if kind.endswith("gz") else zstandard.compress(content)
    path = own / f"a.{kind}"
    for broken in (packed[: len(packed) // 2], packed[:-3], b"not packed at all"):
        path.write_bytes(broken)
        message = error_of(own, base)
        assert path.name in message and "damaged" in message
    assert not any(p.is_dir() for p in (base / "converted").iterdir())


def test_a_run_on_another_starter_corpus_is_told_which_version_resumes_it(own: Path, base: Path) -> None:
    (own / "a.jsonl").write_bytes(jsonl(f"text {i}" for i in range(200)))
    saved = SavedCorpus(3, "0" * 16, {}, None)
    for data, is_starter in (("", True), ("starter", True), (f"{own},starter-val", True), (str(own), False)):
        with pytest.raises(UserError, match=r"step 3 .*--init-from") as error:
            open_corpus(data, base, Runtime.create("cpu"), saved=saved)
        assert ("version of nanochat" in str(error.value)) == is_starter
