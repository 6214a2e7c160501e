"""The committed starter corpus: schema, size, cleanliness, splits; and how its builder refuses wrong archives."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dev import build_starter_data
from dev.starter import clean, identity, synthetic, unknown, validation, words, writer
from dev.starter.archives import Archive
from nanochat.common import SPECIAL_TOKENS, UserError

STARTER = Path(str(files("nanochat") / "starter"))
SYNTHETIC = Path(build_starter_data.__file__).parent / "starter" / "synthetic"
VALIDATION_HASH = "42b398e894e2ee8b7c4ec97acb340ccb1b9f4936c0502ebb6c995821c82f16d9"
MARKUP = re.compile(r"\[\[|\]\]|\{\{|\}\}|</?(?:ref|br|p|div|span|i|b|strong|sub|sup)\b|\[\d+\]|https?://|\ufffd|'''")


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict[str, str]]]:
    """Split -> rows of text and source."""
    return {split: pq.read_table(STARTER / f"{split}.parquet").to_pylist() for split in ("train", "val")}


@pytest.fixture(scope="module")
def chats() -> dict[str, list[dict]]:
    """Split -> rows of messages and source."""
    return {split: pq.read_table(STARTER / f"sft_{split}.parquet").to_pylist() for split in ("train", "val")}


def normal(text: str) -> str:
    """Another normalisation than the builder's, on purpose: letters and digits of the lower-cased text."""
    return "".join(c for c in text.lower() if c.isalnum())


def test_committed_size() -> None:
    committed = [p for folder in (STARTER, SYNTHETIC) for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in committed) <= 25e6


@pytest.mark.parametrize("name", ["train", "val"])
def test_corpus_schema(name: str) -> None:
    file = pq.ParquetFile(STARTER / f"{name}.parquet")
    assert file.schema_arrow.names == ["text", "source"]
    assert all(str(t) == "string" for t in file.schema_arrow.types)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    assert all(group.num_rows == 1024 for group in groups[:-1])
    assert groups[0].column(0).compression == "ZSTD"


def test_the_validation_set_never_changes(corpus: dict) -> None:
    """Bits per byte compare across versions of the training text only while this set stays what it is."""
    digest = hashlib.sha256()
    for row in corpus["val"]:
        digest.update(f"{row['source']}\0{row['text']}\0\0".encode())
    assert digest.hexdigest() == VALIDATION_HASH
    assert validation.content_hash(validation.load(STARTER / "val.parquet")) == VALIDATION_HASH


def test_the_validation_set_has_prose_talk_stories_and_answers(corpus: dict) -> None:
    sizes: Counter[str] = Counter()
    for row in corpus["val"]:
        sizes[row["source"]] += len(row["text"].encode())
    assert set(sizes) == {"wikipedia", "chitchat", "help", "own_stories", "own_answers", "own_talks"}
    assert 0.9e6 < sizes.total() < 1.1e6 and max(sizes.values()) < 0.5 * sizes.total()


def hashed_runs(texts: list[str], words: int = 13) -> np.ndarray:
    """A hash of every `words` words in a row, lower-cased, by another way than the builder's."""
    numbers = np.array([hash(w) for w in re.findall(r"\w+", "\n".join(texts).casefold())], dtype=np.int64).astype(
        np.uint64
    )
    found = np.zeros(len(numbers) - words + 1, dtype=np.uint64)
    for at in range(words):
        found = found * np.uint64(0x9E3779B97F4A7C15) + numbers[at : at + len(found)]
    return found


def test_nothing_trained_on_repeats_the_validation_set(corpus: dict, chats: dict) -> None:
    held_out = {run for row in corpus["val"] if len(row["text"]) > 200 for run in hashed_runs([row["text"]]).tolist()}
    talked = ["\n".join(m["content"] for m in row["messages"]) for row in chats["train"]]
    trained_on = hashed_runs([row["text"] for row in corpus["train"]] + talked)
    assert held_out.isdisjoint(trained_on.tolist())
    assert not held_out.isdisjoint(hashed_runs(["a " + corpus["val"][0]["text"]]).tolist())  # what is there is seen


def test_a_text_that_repeats_thirteen_words_is_found() -> None:
    known = validation.HeldOut([("a", "One two, three four five six seven eight nine ten eleven twelve thirteen.")])
    assert known.overlaps("zero ONE two three four five six seven - eight nine ten eleven twelve thirteen fourteen")
    assert not known.overlaps("one two three four five six seven eight nine ten eleven twelve")


def test_corpus_weights(corpus: dict) -> None:
    sizes: Counter[str] = Counter()
    for row in corpus["train"]:
        sizes[row["source"]] += len(row["text"].encode())
    total = sizes.total()
    assert 28e6 < total < 60e6
    assert max(sizes.values()) < 0.36 * total
    assert sizes["speeches"] + sizes["tales"] < 0.1 * total, "of older English"


def test_row_groups_are_a_fair_mix(corpus: dict) -> None:
    rows = corpus["train"]
    share = Counter(row["source"] for row in rows)
    for at in range(0, len(rows) - 1024, 1024):
        group = Counter(row["source"] for row in rows[at : at + 1024])
        assert all(abs(group[s] / 1024 - n / len(rows)) < 0.03 for s, n in share.items())


def test_no_residue(corpus: dict, chats: dict) -> None:
    texts = [row["text"] for split in corpus.values() for row in split]
    texts += [m["content"] for split in chats.values() for row in split for m in row["messages"]]
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)) + r"|<\|")
    for text in texts:
        assert text and text == text.strip() and "\r" not in text
        assert not MARKUP.search(text), text[:200]
        assert not special.search(text), text[:200]
        assert "Project Gutenberg" not in text and "  " not in text, text[:200]


def test_conversations_alternate(chats: dict) -> None:
    for row in chats["train"] + chats["val"]:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    counts = Counter(row["source"] for row in chats["train"])
    assert set(counts) == {"smalltalk", "qa", "identity", "stories", "reading", "unknown"} and counts.total() < 32_000


def test_answers_are_short(chats: dict) -> None:
    words = sorted(len(row["messages"][-1]["content"].split()) for row in chats["train"])
    assert words[len(words) // 2] < 40 and words[-1] <= 150


def test_questions_do_not_straddle_the_split(chats: dict) -> None:
    first = defaultdict(set)
    for split, rows in chats.items():
        for row in rows:
            if row["source"] in ("qa", "stories", "reading"):
                first[normal(row["messages"][0]["content"])].add(split)
    assert all(len(splits) == 1 for splits in first.values())


def test_questions_without_names_are_asked_alone_too(chats: dict) -> None:
    """Once each, they would be outnumbered by the same questions behind a sentence that answers them."""
    asked = Counter(normal(row["messages"][0]["content"]) for row in chats["train"] if row["source"] == "unknown")
    bare = {wording for b in unknown.contents()[1] if b.kind == "unknown" for wording in b.questions[False]}
    bare = {normal(wording) for wording in bare if "{" not in wording}
    assert len(bare) > 30 and not {wording for wording in bare if asked[wording] < 4}


def test_identity_held_out(chats: dict) -> None:
    held_out = [row["messages"] for row in chats["val"] if row["source"] == "identity"]
    asked = {normal(m["content"]) for row in chats["train"] for m in row["messages"] if m["role"] == "user"}
    assert len(held_out) >= 55 and all(len(messages) == 2 for messages in held_out)
    assert all("nanochat" in messages[1]["content"] for messages in held_out)
    assert not {normal(messages[0]["content"]) for messages in held_out} & asked


def test_identity_questions_are_many_and_named() -> None:
    blocks = identity.blocks().values()
    assert len({clean.key(q) for b in blocks if b.tag != "smalltalk" for q in b.questions}) >= 250
    assert all("nanochat" in answer for b in blocks if b.tag == "name" for answer in b.answers)


def test_words() -> None:
    train = (STARTER / "words_train.txt").read_text().split()
    test = (STARTER / "words_test.txt").read_text().split()
    assert not set(train) & set(test) and len(set(train)) == len(train)
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in train + test)
    assert 15_000 < len(train) < 25_000 and 1_000 < len(test) < 2_000


def test_forms_of_tested_words_are_not_trained_on() -> None:
    counts = {"juggle": 9, "juggling": 8, "jugglingly": 7, "jug": 6, "unrelated": 6, "teh": 5, "seldom": 3}
    train, test = words.split(counts, {"juggle", "unrelated", "seldom"})  # the hash of "juggle" says: test
    assert (train, test) == (["jug", "unrelated", "teh"], ["juggle"])


def test_every_source_is_attributed(corpus: dict) -> None:
    attribution = (STARTER / "ATTRIBUTION.md").read_text()
    assert all(f"`{source}`" in attribution for source in {row["source"] for row in corpus["train"]})
    assert {p.name for p in (STARTER / "licenses").glob("CC-*")} == {"CC-BY-SA-4.0.txt", "CC-BY-4.0.txt"}


def test_hash_mismatch_stops_with_both_hashes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "fake-1.0.tar.gz").write_bytes(b"not what was pinned")
    actual, pinned = hashlib.sha256(b"not what was pinned").hexdigest(), "0" * 64
    entry = {"key": "fake", "registry": "pypi-wheel", "name": "fake", "version": "1.0"}
    entry |= {"filename": "fake-1.0.tar.gz", "sha256": pinned}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    arguments = ["--cache", str(tmp_path), "--manifest", str(tmp_path / "manifest.json"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        build_starter_data.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in error and actual in error and pinned in error
    assert not list(tmp_path.glob("*.parquet"))


def test_an_unknown_registry_is_refused() -> None:
    with pytest.raises(UserError, match=r"fake.*pypi-sdist"):
        Archive("fake", "pypi-sdist", "fake", "1.0", "fake-1.0.tar.gz", "0" * 64).command(Path())


def test_near_duplicates_are_found() -> None:
    days = (f"On day {i} the fox of house {i * 7} ran {i + 3} miles to the river and slept there." for i in range(30))
    text = " ".join(days)
    other = "Something else entirely, about the price of tea and the long way that it travels."
    docs = [("a", text), ("b", text.replace("day 4 ", "morning 4 ")), ("c", other), ("d", other.upper() + "!")]
    assert [source for source, _ in clean.deduplicate(docs)] == ["a", "c"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("One.  Two\u00a0three\r\n\r\n\r\n\r\nfour ", "One. Two three\n\nfour"),
        ("e\u0301t\u00e9 \u201cyes\u201d it\u2019s", 'été "yes" it\'s'),
        ("a\u200bb &amp; c", "ab & c"),
    ],
)
def test_normalise(raw: str, expected: str) -> None:
    assert clean.normalise(raw) == expected


def test_unfinished_answers_are_cut_back() -> None:
    assert clean.cut_to_sentence('He went home. "All is well," she said. And then they') == (
        'He went home. "All is well," she said.'
    )
    assert clean.cut_to_sentence("no end at all") == ""


def test_explanations_must_keep_to_their_text() -> None:
    source = "Shen Kuo was a Chinese scientist of the Song dynasty who studied mathematics and optics."
    answer = "Shen Kuo was a scientist of the Song dynasty who studied optics."
    assert synthetic.grounded("Shen Kuo", source, answer)
    assert not synthetic.grounded("Shen Kuo", source, answer.replace("Song", "Ming"))


def test_parquet_is_byte_identical(tmp_path: Path) -> None:
    docs = [(source, f"document {i} of {source}") for source in ("a", "b") for i in range(50)]
    for name, order in (("one", docs), ("two", docs[::-1])):
        writer.write_documents(tmp_path / f"{name}.parquet", order)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
