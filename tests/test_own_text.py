"""Text as people bring it: kinds of files, fields, encodings, line ends, links; what is used and what is not."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpus_helpers import Bucket, both, fill_bucket, jsonl, make_texts, texts_of, write_parquet

from nanochat.common import UserError
from nanochat.data import listing, own_files, rows, textfiles
from nanochat.data.corpus import Corpus
from nanochat.data.listing import list_data, split_entries
from nanochat.data.to_parquet import MAX_WARNINGS
from nanochat.dataset import resolve_corpus
from scripts import _cli, tok_train

PLAIN = [text + '\nsecond line, with "quotes"; and\ttabs' for text in make_texts(30)]


def refusal(data: object, base: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        both(resolve_corpus(str(data), base, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(texts: list[str], delimiter: str = ",", field: str = "text") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", field], *([i, text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def objects(texts: list[str], field: str = "text") -> list[dict[str, Any]]:
    return [{"id": i, field: text} for i, text in enumerate(texts)]


def array(texts: list[str], field: str = "text", **kwargs: Any) -> bytes:
    return json.dumps(objects(texts, field), **kwargs).encode()


# ---------------------------------------------------------------------------------------------------
# Kinds

WRITERS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "lines": ("jsonl", jsonl),
    "ndjson": ("ndjson", jsonl),
    "array": ("json", array),
    "indented": ("json", lambda texts: array(texts, indent=2, ensure_ascii=False)),
    "lines by another name": ("json", jsonl),
    "one after another": ("json", lambda texts: b"".join(json.dumps(row).encode() for row in objects(texts))),
    "csv": ("csv", table),
    "semicolons": ("csv", lambda texts: table(texts, ";")),
    "tabs": ("tsv", lambda texts: table(texts, "\t")),
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_documents(name: str, compression: str, own: Path, base: Path) -> None:
    kind, write = WRITERS[name]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    (own / f"tales.{kind}{compression}").write_bytes(pack(write(PLAIN)))
    corpus = resolve_corpus(str(own), base)
    assert sorted(both(corpus)) == sorted(PLAIN)
    assert {d.source for d in corpus.iter_documents("train")} == {"tales"}
    assert f"1 file: 1 .{kind}{compression}" == corpus.files


def test_markdown_and_a_json_file_for_each_document(own: Path, base: Path) -> None:
    (own / "a.md").write_text("# Title\n\nBody.\n")
    (own / "b.json").write_text('{"text": "alone", "source": "elsewhere"}')
    corpus = resolve_corpus(str(own), base)
    assert sorted(both(corpus)) == ["# Title\n\nBody.", "alone"]
    assert {d.source for s in ("train", "val") for d in corpus.iter_documents(s)} == {"a", "elsewhere"}


def test_json_larger_than_a_chunk_is_streamed(own: Path) -> None:
    texts = [f"{i} " + 'é\\"山' * 5000 for i in range(50)]
    (own / "a.json").write_bytes(array(texts))
    assert [d.text for d in textfiles.file_documents(own / "a.json")] == texts


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice([None, True, False, 0, -1.5e300, 123456789012345678901234567890]),
        lambda: "".join(rng.choices('ab"\\\n\t山🙂[]{},: \u2028', k=rng.randrange(30))),
    ]
    if depth < 3:
        kinds.append(lambda: [random_value(rng, depth + 1) for _ in range(rng.randrange(4))])
        kinds.append(lambda: {f"k{i}": random_value(rng, depth + 1) for i in range(rng.randrange(4))})
    return rng.choice(kinds)()


def test_streamed_json_is_what_json_reads_wherever_chunks_end(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    for _ in range(300):
        items = [{"value": random_value(rng)} for _ in range(rng.randrange(1, 6))]
        settings = {"indent": rng.choice([None, 0, 2]), "ensure_ascii": rng.random() < 0.5}
        written = [json.dumps(item, **settings) for item in items]
        whole = rng.choice(
            [json.dumps(items, **settings), "\n".join(written), "".join(written), f"[{' , '.join(written)} ]"]
        )
        data, cut = whole.encode(), rng.choice([1, 2, 7, 40])
        for end in (len(data), len(data) - 1):  # the last byte closes an array or an object
            pieces = [data[i : min(i + cut, end)] for i in range(0, end, cut)]
            monkeypatch.setattr(rows, "text_chunks", lambda path, pieces=pieces: iter(pieces))
            found = list(rows.json_rows(own / "a.json"))
            if end == len(data):
                assert [row.value for row in found] == items and not any(row.error for row in found), whole
            else:
                assert found[-1].error, whole


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"', ["item 2"]),
        ("a.json", '[{"text": "a"}, {"text": "b"}', ["item 3"]),
        ("a.json", '[{"text": "a"}, {"text": b}]', ["item 2"]),
        ("a.json", "[" * 100_000, ["item 1"]),
        ("a.json", '["a", "b"]', ["item 1", "str"]),
        ("a.json", '{"titel": "a"}', ["titel", "--text-field"]),
        ("a.csv", "text\na,b\n", ["line 2", "2"]),
        ("a.csv", 'text\n"a\n', ["CSV"]),
        ("a.csv", "text,text\na,b\n", ["two", "text"]),
        ("a.csv", "id,body\n1,b\n", ["id, body", "--text-field"]),
    ],
)
def test_broken_files_name_the_place(name: str, content: str, words: list[str], own: Path, base: Path) -> None:
    (own / name).write_text(content)
    message = refusal(own / name, base)
    assert name in message and all(word in message for word in words), message


def test_two_columns_of_one_name(own: Path, base: Path) -> None:
    columns = [pa.array(["a", "b"]), pa.array(["c", "d"])]
    for names in (["text", "text"], ["text", "source", "source"]):
        data = [*columns, columns[0]][: len(names)]
        pq.write_table(pa.table(data, names=names), own / "twice.parquet")
        assert f"2 columns named {names[-1]}" in refusal(own, base)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())]
)
def test_binary_columns_are_text(kind: pa.DataType, own: Path, base: Path) -> None:
    raw = pa.array([text.encode() for text in PLAIN], pa.binary())
    column = raw.dictionary_encode() if pa.types.is_dictionary(kind) else raw.cast(kind)
    pq.write_table(pa.table({"text": column, "source": pa.array([b"here"] * 30)}), own / "a.parquet")
    corpus = resolve_corpus(str(own), base)
    assert sorted(both(corpus)) == sorted(PLAIN)
    assert {d.source for d in corpus.iter_documents("train")} == {"here"}
    bad = [*PLAIN[:5], "caf\xe9"]
    pq.write_table(
        pa.table({"text": pa.array([t.encode("latin-1") if t == bad[-1] else t.encode() for t in bad])}),
        own / "a.parquet",
    )
    assert "row 6" in refusal(own, base)


def test_text_field(own: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "a.jsonl").write_bytes(
        jsonl([]) + b"".join(json.dumps(row).encode() + b"\n" for row in objects(PLAIN, "body"))
    )
    (own / "b.json").write_bytes(array(PLAIN, "body"))
    (own / "c.csv").write_bytes(table(PLAIN, field="body"))
    pq.write_table(pa.table({"body": PLAIN, "text": range(30)}), own / "d.parquet")
    pq.write_table(pa.table({"body": PLAIN * 400}), own / "e.parquet")  # one large row group: converted
    corpus = resolve_corpus(str(own), base, text_field="body")
    assert Counter(both(corpus)) == Counter(PLAIN * 404)
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "e.parquet"):
        assert "--text-field" in refusal(own / name, base) or "int64" in refusal(own / name, base)
    other = own / "other.parquet"
    pq.write_table(pa.table({"text": PLAIN, "body": PLAIN[::-1]}), other)
    prints = {f: resolve_corpus(str(other), base, text_field=f).fingerprint for f in ("text", "body")}
    assert prints["text"] != prints["body"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    tok_train.main([f"--data={other}", "--text-field=body", "--vocab-size=270"])
    with pytest.raises(UserError, match="--text-field"):
        tok_train.main([f"--data={other}", "--text-field=bdoy", "--vocab-size=270"])


# ---------------------------------------------------------------------------------------------------
# Encodings and line ends


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "json", "csv", "parquet", "big.parquet"])
def test_line_ends_nul_and_bom_are_alike_in_every_kind(
    kind: str, own: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(own_files, "MAX_GROUP_ROWS", 1 if kind == "big.parquet" else 8192)
    raw = ["\ufeffone\r\ntwo\rthree\0\nfour\r\n\r\n\r\nfive \x1f end", "other\rtext"]
    expected = ["one\ntwo\nthree\nfour\n\n\nfive \x1f end", "other\ntext"]
    if kind in ("txt", "md"):
        for i, text in enumerate(raw):
            (own / f"{i}.{kind}").write_bytes(text.encode())
    elif kind.endswith("parquet"):
        write_parquet(own / f"a.{kind}", raw)
    elif kind == "csv":
        (own / "a.csv").write_bytes(("\ufefftext\r" + "".join(f'"{text}"\r' for text in raw)).encode())
    else:
        rows = [json.dumps({"text": text}) for text in raw]
        (own / f"a.{kind}").write_bytes(("\ufeff" + "\r".join(rows)).encode())
    assert sorted(both(resolve_corpus(str(own), base))) == sorted(expected)
    assert "NUL" in capsys.readouterr().err


def test_a_line_end_between_two_chunks(own: Path) -> None:
    for end in ("\r\n", "\r", "\n"):
        text = "x" * 65_535 + end + "y" * 65_534 + end + "z" + end  # chunks are of 64 KB
        (own / "a.jsonl").write_bytes(json.dumps({"text": "first"}).encode() + end.encode() + jsonl([text]))
        (own / "a.csv").write_bytes(f"text{end}{text}".encode())
        assert [d.text for d in textfiles.file_documents(own / "a.csv")] == ["x" * 65_535, "y" * 65_534, "z"]
        assert [len(d.text) for d in textfiles.file_documents(own / "a.jsonl")] == [5, 65_535 + 65_534 + 4]


ENCODED = "Ein müder Bär läuft über die Straße.\nUnd schläft.\n" * 30


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "jsonl", "csv", "txt.zst"])
@pytest.mark.parametrize(
    ("encoding", "text", "named"),
    [
        ("utf-16", ENCODED, "UTF-16"),
        ("utf-16-le", ENCODED, "UTF-16LE"),
        ("utf-16-be", ENCODED, "UTF-16BE"),
        ("utf-16-le", "Привет, мир! " * 40, "UTF-16LE"),
        ("utf-32", ENCODED, "UTF-32"),
        ("utf-32-be", ENCODED, "UTF-32BE"),
        ("latin-1", ENCODED, "CP1252"),
        ("cp1252", ENCODED + "„so“", "CP1252"),
    ],
)
def test_other_encodings_come_with_a_command_that_works(
    suffix: str, encoding: str, text: str, named: str, own: Path, base: Path
) -> None:
    content = {"jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n", "csv": f'text\n"{text}"\n'}.get(
        suffix, text
    )
    path = own / f"it's my $file.{suffix}"
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(suffix[-3:].lstrip("."), bytes)
    path.write_bytes(pack(content.encode(encoding)))
    message = refusal(own, base)
    assert str(path) in message and f"-f {named} " in message
    command = message[message.index("f='") :].removesuffix("; or leave out such shards: --skip-bad-shards")
    subprocess.run(["bash", "-c", command], check=True)
    assert "".join(d.text for d in textfiles.file_documents(path)).strip() == text.strip()


def test_a_few_damaged_bytes_are_not_called_another_encoding(own: Path, base: Path) -> None:
    path = own / "a.txt"
    path.write_bytes(ENCODED.encode() + b"\xff\xfe broken \x80\n" + "山 über".encode())
    message = refusal(own, base)
    assert "-c -f UTF-8" in message and "line 61" in message
    subprocess.run(["bash", "-c", message[message.index("f=/") :].split("; or leave")[0]], check=False)
    assert "broken" in next(textfiles.file_documents(path)).text


@pytest.mark.parametrize("text", ["ab\0c", "x" * 5000 + "\0\0\0" + "y" * 5000, "a", "", "\0", "Ünï\0cödé" * 2])
def test_utf8_is_not_taken_for_utf16(text: str, own: Path) -> None:
    (own / "a.txt").write_text(text, encoding="utf-8")
    assert "".join(d.text for d in textfiles.file_documents(own / "a.txt")) == text.replace("\0", "")


# ---------------------------------------------------------------------------------------------------
# Which files


def test_what_is_used_and_what_is_not(own: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "deep").mkdir()
    for name in ("a.txt", "b.TXT", "deep/c.md", "d.docx", "e.pdf", "deep/f.pdf", ".g.txt", "README"):
        (own / name).write_text(name)
    (own / "info.json").write_text('{"license": "MIT"}')
    (own / "empty.txt").write_text("\n")
    os.mkfifo(own / "pipe.txt")  # would be waited for without end
    (own / "link to a pipe.txt").symlink_to(own / "pipe.txt")
    corpus = resolve_corpus(str(own), base)
    used, unused = corpus.files.split("; not used: ")
    assert used == "3 files: 2 .txt, 1 .md"
    assert set(unused.split(", ")) == {
        "2 .pdf",
        "1 .docx",
        "1 hidden",
        "1 without an ending",
        "2 not a regular file",
        '1 without the field "text"',
        "1 without text",
    }
    assert "info.json" in capsys.readouterr().err
    again = resolve_corpus(str(own), base)  # from the import made before
    assert again.files == corpus.files and corpus.describe() == f"{own} ({corpus.files})"


def test_a_folder_without_usable_files_is_not_called_empty(own: Path, base: Path) -> None:
    (own / ".hidden.txt").write_text("x")
    (own / "a.docx").write_text("x")
    message = refusal(own, base)
    assert "empty" not in message and "1 .docx" in message and "1 hidden" in message and ".jsonl" in message


def test_thousands_of_empty_files_are_counted_not_listed(own: Path, base: Path, capsys) -> None:
    for i in range(50):
        (own / f"{i}.txt").write_text("full\n" * (i < 2) + str(i) * (i < 2))
    assert "48 without text" in resolve_corpus(str(own), base).files
    assert len(capsys.readouterr().err.splitlines()) == MAX_WARNINGS + 1


def test_many_files_show_progress(own: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("nanochat.common.output.PLAIN_SECONDS", 0)
    monkeypatch.setattr("nanochat.data.to_parquet.FEW_FILES", 9)
    for i in range(20):
        (own / f"{i}.txt").write_text(f"text {i}")
    resolve_corpus(str(own), base)
    lines = capsys.readouterr().out.splitlines()
    assert [sum(str(n) in line and "files" in line for line in lines) >= 3 for n in (7, 20)] == [True, True]
    assert f"converting 20 files (0 MB) to parquet in {base}" in "\n".join(lines)
    resolve_corpus(str(own), base)
    assert "converting" not in capsys.readouterr().out  # imported once


def test_linked_folders_are_read_once_and_without_cycles(own: Path, base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (own / "z").mkdir()
    for path in (own / "z" / "1.txt", outside / "2.txt", outside / "sub" / "3.txt"):
        path.write_text(path.name)
    (own / "a_link_to_z").symlink_to(own / "z")
    (own / "link").symlink_to(outside)
    (own / "again").symlink_to(outside / "sub")
    (outside / "up").symlink_to(own)
    (own / "self").symlink_to(own)
    corpus = resolve_corpus(str(own), base)
    assert sorted(both(corpus)) == ["1.txt", "2.txt", "3.txt"]
    listing = list_data(str(own), textfiles.KINDS, base)
    assert own / "z" / "1.txt" in listing.files  # by the path without links, where there is one
    assert listing.unused["linked folder read already"] >= 3


def test_several_entries(own: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.jsonl", "b, c.txt", "d.txt", "e[1].txt"]
    (own / names[0]).write_bytes(jsonl(["A1", "A2"]))
    for name in names[1:]:
        (own / name).write_text(name)
    (own / "sub").mkdir()
    (own / "sub" / "f.txt").write_text("F")
    monkeypatch.chdir(own)
    assert sorted(both(resolve_corpus("a.jsonl,sub", base))) == ["A1", "A2", "F"]
    assert sorted(both(resolve_corpus("b, c.txt,sub/*.txt, d.txt", base))) == ["F", "b, c.txt", "d.txt"]
    assert sorted(both(resolve_corpus("d.txt,e[1].txt,d.*", base))) == ["d.txt", "e[1].txt"]  # each file once
    assert "nowhere" in refusal("a.jsonl,nowhere.txt", base)
    for i in range(40):
        (own / "sub" / f"{i}.txt").write_text(str(i))
    many = resolve_corpus(",".join(f"sub/{i}.txt" for i in range(40)), base)
    assert many.name == "sub/0.txt and 39 more" and len(both(many)) == 40
    assert "sub/*.pdf" in refusal("a.jsonl,sub/*.pdf", base)


def test_a_named_set_beside_own_files(own: Path, base: Path, tmp_path: Path) -> None:
    texts = make_texts(300)
    (own / "a.jsonl").write_bytes(jsonl(texts))
    alone, starter = resolve_corpus(str(own), base), resolve_corpus("starter", base)
    mixed = resolve_corpus(f"starter,{own}", base)
    for split in ("train", "val"):
        expected = Counter(texts_of(starter, split)) + Counter(texts_of(alone, split))
        assert Counter(texts_of(mixed, split)) == expected
    assert mixed.fingerprint not in (alone.fingerprint, starter.fingerprint) and "1 .jsonl" in mixed.files
    again = resolve_corpus(f"starter,{own}", base, recorded=mixed.record())
    assert again.fingerprint == mixed.fingerprint
    assert resolve_corpus("starter,starter", base).record()["train"] == starter.record()["train"]
    assert "nowhere" in refusal("starter,nowhere", base)


def test_commas_in_urls(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "a.txt").write_text("x")
    monkeypatch.chdir(own)
    url = "https://host/x.parquet?columns=a,b&c=d"
    assert split_entries(url) == [url]
    assert split_entries(f"a.txt,{url},s3://b/c,a.txt") == ["a.txt", url, "s3://b/c", "a.txt"]


def test_a_list_of_thousands_of_names_is_split_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's *.txt: not every run of names is looked for as a path with commas in it."""
    looked_for = list[str]()
    monkeypatch.setattr(listing, "exists", lambda path: looked_for.append(path) or False)
    for folder in ("", "texts/"):
        many = [f"{folder}{number:06}.txt" for number in range(2_000)]
        assert split_entries(",".join(many)) == many
    assert len(looked_for) < 100_000
    assert split_entries("s3://b/c,starter", ("starter",)) == ["s3://b/c", "starter"]
    assert split_entries("hf://datasets/a/b@main/x,y.parquet") == ["hf://datasets/a/b@main/x,y.parquet"]


def test_urls_and_paths_together(tmp_path: Path, own: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = fill_bucket(tmp_path, monkeypatch)
    (own / "a.jsonl").write_bytes(jsonl(["near 1", "near 2"]))
    corpus = resolve_corpus(f"{own},bucket://data", base)
    far = both(resolve_corpus(str(bucket / "data"), tmp_path / "other"))
    assert sorted(both(corpus)) == sorted([*far, "near 1", "near 2"])
    assert "4 files" in corpus.files and "1 hidden" in corpus.files and "1 .pdf" in corpus.files
    assert Bucket.reads.total() > 0


def test_a_repeated_flag_is_a_list() -> None:
    def data_of(*args: str) -> str:
        return _cli.parse(tok_train.Config, args).data

    assert data_of("--data=a") == data_of("--data", "a") == "a"
    assert data_of("--data=a", "--vocab-size=300", "--data", "b") == "a,b"
    assert data_of("--data", "a", "b", "c", "--vocab-size=300") == "a,b,c"  # the shell's --data *.txt


# ---------------------------------------------------------------------------------------------------
# Corpora from before


def mixed_folder(folder: Path) -> None:
    """Long and short texts of several kinds, from a fixed seed."""
    rng = random.Random(7)

    def words(count: int) -> str:
        return " ".join(rng.choices(["river", "мир", "山", "ocean", "straße", "🙂", "wind"], k=count))

    for i in range(9):
        paragraphs = "\n\n".join(words(rng.randrange(5, 120)) for _ in range(rng.choice([3, 30, 300])))
        (folder / f"t{i}.txt").write_bytes((paragraphs.replace("\n", "\r\n") if i % 2 else paragraphs).encode())
    (folder / "sub").mkdir()
    (folder / "sub" / "a.jsonl").write_bytes(jsonl([words(9) + "\r\n" * (i % 5 == 0) + "x" for i in range(500)]))
    write_parquet(folder / "p.parquet", [words(9) + "\r" * (i % 3 == 0) for i in range(500)], 100)
    (folder / "readme.md").write_text("# Not read then\n")
    (folder / "sub" / "notes.csv").write_text("text\nnot read then\n")


def order_of(corpus: Corpus) -> str:
    texts = "\1".join(d.text + "\0" + d.source for s in ("train", "val") for d in corpus.iter_documents(s))
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


BEFORE = "b757f319f7a3f527"  # order_of(mixed_folder) as computed at commit 8b2efc1


def test_a_run_from_before_reads_the_same_documents_in_the_same_order(own: Path, base: Path) -> None:
    mixed_folder(own)
    old = {"train": [], "val": [], "val_limit": str(2**64 // 100), "fingerprint": ""}  # a record of 2026-11-28
    corpus = resolve_corpus(str(own), base, recorded=old)
    assert order_of(corpus) == BEFORE
    record = corpus.record() | {"listing": 1}
    assert order_of(resolve_corpus(str(own), base, recorded=record)) == BEFORE
    now = resolve_corpus(str(own), base)
    assert order_of(now) != BEFORE and "# Not read then" in both(now) and "not read then" in both(now)
    assert not any("\r" in text for text in both(now)) and any("\r" in text for text in both(corpus))
    assert order_of(resolve_corpus(str(own), base, recorded=now.record())) == order_of(now)
