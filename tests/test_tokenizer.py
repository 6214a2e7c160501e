"""Independent oracles: a byte-pair encoder and trainer written here the slow, plain way, and tiktoken."""

import base64
import hashlib
import json
import random
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import example, given, settings, strategies as st

from nanochat.common import SPECIAL_TOKENS, UserError
from nanochat.tokenizer import (
    GROUP_CHARS,
    MAX_WHITESPACE_RUN,
    MIN_GROUP_CHARS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    get_tokenizer,
)

WORDS = [
    *("the", "cat", "sat", "on", "then", "there", "other", "mother", "banana", "bananas", "aaaa", "aaaaaa"),
    *("1234", "12", "don't", "I'LL", "été", "漢字漢字", "😀😀", "\n\n", "", "x"),
]
VOCAB_SIZE = 310


def corpus(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(corpus(), VOCAB_SIZE)


# ---------------------------------------------------------------------------------------------------
# Oracles


def tokens_of(tokenizer: RustBPETokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([rank]) for rank in range(tokenizer.get_vocab_size() - len(SPECIAL_TOKENS))]


def plain_bpe(text: str, tokens: list[bytes]) -> list[int]:
    """Split, then merge the adjacent pair of lowest rank until there is none."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids = []
    for word in regex.findall(SPLIT_PATTERN, text):
        pieces = [bytes([value]) for value in word.encode("utf-8")]
        while candidates := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ranks]:
            _, i = min(candidates)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        ids += [ranks[piece] for piece in pieces]
    return ids


def merge_all(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    merged: list[bytes] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append(b"".join(word[i : i + step]))
        i += step
    return tuple(merged)


# ---------------------------------------------------------------------------------------------------
# Training


def test_every_merge_is_a_most_frequent_pair(tokenizer: RustBPETokenizer) -> None:
    """Replays the merges over words counted here: each must be of a pair that no other outnumbers."""
    counts = Counter(word.encode("utf-8") for text in corpus() for word in regex.findall(SPLIT_PATTERN, text))
    words = {tuple(bytes([value]) for value in word): count for word, count in counts.items()}
    for token in tokens_of(tokenizer)[256:]:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        most = max(pairs.values())
        best = [pair for pair, count in pairs.items() if count == most and pair[0] + pair[1] == token]
        assert best, f"{token!r} was merged, but another pair occurs {most} times"
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            merged[merge_all(word, best[0])] += count
        words = dict(merged)


def test_vocabulary_is_bytes_then_merges_then_specials(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokens_of(tokenizer)[:256] == [bytes([value]) for value in range(256)]
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert list(tokenizer.special_ids) == list(SPECIAL_TOKENS)
    assert tokenizer.get_bos_token_id() == VOCAB_SIZE - 9
    assert tokenizer.decode([VOCAB_SIZE - 9]) == "<|bos|>"


def test_training_does_not_depend_on_the_order_of_documents(tokenizer: RustBPETokenizer) -> None:
    for seed in range(3):
        shuffled = corpus()
        random.Random(seed).shuffle(shuffled)
        assert RustBPETokenizer.train_from_iterator(shuffled, VOCAB_SIZE).hash == tokenizer.hash
    assert RustBPETokenizer.train_from_iterator(corpus(1)[:3], VOCAB_SIZE).hash != tokenizer.hash


def test_training_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--vocab-size.*265.*264"):
        RustBPETokenizer.train_from_iterator(["text"], 264)
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="--data"):
            RustBPETokenizer.train_from_iterator(nothing, 300)
    assert RustBPETokenizer.train_from_iterator(["text"], 265).get_vocab_size() == 265
    assert capsys.readouterr().err == ""
    small = RustBPETokenizer.train_from_iterator(["text"], 300)
    assert small.get_vocab_size() == 265 + 3  # t-e-x-t has three merges
    assert "268" in capsys.readouterr().err


def test_an_error_in_the_documents_comes_through() -> None:
    def broken():
        yield "text"
        raise UserError("row 7 is bad")

    with pytest.raises(UserError, match="row 7"):
        RustBPETokenizer.train_from_iterator(broken(), 300)


# ---------------------------------------------------------------------------------------------------
# Encoding

familiar_text = st.lists(st.sampled_from([*WORDS, *SPECIAL_TOKENS]), max_size=12).map(" ".join)
any_text = st.one_of(st.text(max_size=40), familiar_text)


@settings(deadline=None, max_examples=150, database=None)
@given(text=any_text)
@example(text="\r\n \t\u2028 x\u0000\x85  ")
def test_encode_against_plain_bpe_and_back(tokenizer: RustBPETokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == plain_bpe(text, tokens_of(tokenizer))
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode("utf-8"))
    assert all(i < tokenizer.get_bos_token_id() for i in ids), "text never yields a special token"


def test_encode_against_tiktoken_from_the_saved_file(tokenizer: RustBPETokenizer, tmp_path: Path) -> None:
    saved = json.loads(tokenizer.save(tmp_path).read_text(encoding="utf-8"))
    ranks = {base64.b64decode(row[0]): rank for rank, row in enumerate(saved["tokens"])}
    reference = tiktoken.Encoding("x", pat_str=saved["pattern"], mergeable_ranks=ranks, special_tokens={})
    for text in [*corpus(2), " ".join(SPECIAL_TOKENS)]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


def test_all_threads_encode_at_the_same_time(tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the text is less than a largest group for each."""
    texts, together = [" ".join(corpus()) * 2 for _ in range(8)], threading.Barrier(4)
    assert min(map(len, texts)) > MIN_GROUP_CHARS and sum(map(len, texts)) < 4 * GROUP_CHARS
    expected, plain = tokenizer.encode(texts, num_threads=1), tokenizer._encode_ordinary

    def encode(text: str) -> list[int]:
        together.wait(timeout=10)
        return plain(text)

    monkeypatch.setattr(tokenizer, "_encode_ordinary", encode)
    assert tokenizer.encode(texts, num_threads=4) == expected


def test_lists_threads_and_added_specials(tokenizer: RustBPETokenizer) -> None:
    texts = ["", "the cat", " ".join(corpus()) * 12, *corpus(3), "<|bos|>", " ".join(corpus(4)) * 12, "last"]
    assert sum(map(len, texts)) > 2 * GROUP_CHARS, "several groups, the last one small"
    single = [tokenizer.encode(text) for text in texts]
    for num_threads in (1, 2, 5):
        assert tokenizer.encode(texts, num_threads=num_threads) == single
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    assert tokenizer("the cat", prepend="<|bos|>", append=end) == [bos, *single[1], end]
    assert tokenizer.encode(texts, prepend=bos) == [[bos, *ids] for ids in single]
    assert tokenizer.encode([]) == [] and tokenizer.encode("") == []
    with pytest.raises(ValueError, match="'the'"):
        tokenizer.encode("x", prepend="the")


@pytest.mark.parametrize("space", [" ", "\t", "\u3000", "\x1c", " \n"])
def test_long_runs_of_white_space(tokenizer: RustBPETokenizer, space: str) -> None:
    """A million blanks would overflow the regex engine's stack, in training and in encoding."""
    text = "a" + space * 1_000_000 + "b" + space * (MAX_WHITESPACE_RUN - 1) + "c"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert RustBPETokenizer.train_from_iterator([text], 266).get_vocab_size() == 266


def test_text_that_is_not_unicode(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert RustBPETokenizer.train_from_iterator(["ab\ud83dab"], 266).get_vocab_size() == 266


def test_token_bytes_are_those_of_the_bytes(tokenizer: RustBPETokenizer) -> None:
    """A token may be part of a character: decoding it to str would count the bytes of a replacement character."""
    lengths = [len(token) for token in tokens_of(tokenizer)]
    assert tokenizer.token_bytes == lengths + [0] * len(SPECIAL_TOKENS)
    through_str = [len(tokenizer.decode([rank]).encode("utf-8")) for rank in range(len(lengths))]
    assert through_str[256:] != lengths[256:], "the corpus must contain such a token, or the test cannot fail"


def test_decoding(tokenizer: RustBPETokenizer) -> None:
    ids = tokenizer.encode("😀x")
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == "😀x".encode()
    assert tokenizer.decode([0xF0, ord("x")]) == "\ufffdx"
    assert tokenizer.decode([tokenizer.get_bos_token_id(), ord("x")]) == "<|bos|>x"
    for unknown in (VOCAB_SIZE, -1, 2**40):
        with pytest.raises(ValueError, match=rf"{unknown}\b.*\b{VOCAB_SIZE - 1}"):
            tokenizer.decode([65, unknown])


# ---------------------------------------------------------------------------------------------------
# The file


def test_save_and_load(tokenizer: RustBPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for loaded in (RustBPETokenizer.from_directory(path.parent), get_tokenizer(), get_tokenizer(path.parent)):
        assert loaded.hash == tokenizer.hash
        assert loaded.token_bytes == tokenizer.token_bytes
        assert loaded.encode(corpus()) == tokenizer.encode(corpus())
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
    before = path.read_bytes()
    assert RustBPETokenizer.from_directory(path.parent).save(tmp_path / "again").read_bytes() == before


def test_the_file_is_readable(tokenizer: RustBPETokenizer, tmp_path: Path) -> None:
    text = tokenizer.save(tmp_path).read_text(encoding="utf-8")
    content = json.loads(text)
    assert (content["format"], content["version"], content["hash"]) == ("nanochat-tokenizer", 1, tokenizer.hash)
    assert content["special_tokens"] == list(SPECIAL_TOKENS)
    lines = [line for line in text.splitlines() if line.startswith('  ["')]
    assert len(lines) == VOCAB_SIZE - len(SPECIAL_TOKENS), "one token a line"
    assert any('" the"' in line for line in lines) and any('"漢' in line for line in lines)


def test_hash_is_of_the_content_alone() -> None:
    """Written out here: old checkpoints record the hash, so it must not change."""
    tokens = [bytes([value]) for value in range(256)] + [b"ab"]
    content = json.dumps(
        [SPLIT_PATTERN, [base64.b64encode(token).decode() for token in tokens], list(SPECIAL_TOKENS)],
        separators=(",", ":"),
    )
    tokenizer = RustBPETokenizer(SPLIT_PATTERN, tokens)
    assert tokenizer.hash == hashlib.sha256(content.encode()).hexdigest()
    others = [
        RustBPETokenizer(SPLIT_PATTERN + "|x", tokens),
        RustBPETokenizer(SPLIT_PATTERN, [*tokens[:-1], b"ac"]),
        RustBPETokenizer(SPLIT_PATTERN, [*tokens[1:], tokens[0]]),
        RustBPETokenizer(SPLIT_PATTERN, tokens, [*SPECIAL_TOKENS[::-1]]),
    ]
    assert len({tokenizer.hash, *(other.hash for other in others)}) == 5


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([bytes([value]) for value in range(255)], "256 single bytes"),
        ([bytes([value]) for value in range(256)] + [b"ab", b"ab"], "twice"),
        ([bytes([value]) for value in range(256)] + [b""], "no empty one"),
    ],
)
def test_invalid_vocabularies_are_refused(tokens: list[bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RustBPETokenizer(SPLIT_PATTERN, tokens)


def test_damaged_files_are_refused(tokenizer: RustBPETokenizer, tmp_path: Path) -> None:
    good = tokenizer.save(tmp_path).read_bytes()
    path, rng = tmp_path / "tokenizer.json", random.Random(0)
    for cut in [0, 1, 100, *rng.sample(range(len(good) - 2), 40)]:
        path.write_bytes(good[:cut])
        assert_refused(path)
    for _ in range(200):
        flipped = bytearray(good)
        flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        if json_or_none(flipped) != json.loads(good):  # \u001F instead of \u001f is the same content
            assert_refused(path)


def json_or_none(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8"))
    except ValueError:
        return None


def assert_refused(path: Path, reason: str = "") -> None:
    with pytest.raises(UserError) as error:
        RustBPETokenizer.from_directory(path.parent)
    message = str(error.value)
    assert str(path) in message and reason in message and "\n" not in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hash": "0" * 64}, "hash"),
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not a nanochat tokenizer"),
        ({"pattern": "("}, "damaged"),
        ({"pattern": 5}, "damaged"),
        ({"pattern": "x+"}, "pattern"),
        ({"pattern": "x*"}, "pattern"),
        ({"pattern": r"\s*\S+|\s+"}, "hash"),
        ({"tokens": None}, "damaged"),
        ({"tokens": [["QQ==", 1, "A"]]}, "damaged"),
        ({"tokens": [[5, 1, "A"]]}, "damaged"),
        ({"tokens": [["?", 1, "A"]]}, "damaged"),
        ({"special_tokens": ["<|bos|>"]}, "damaged"),
        ({"special_tokens": [["<|bos|>"]]}, "damaged"),
        ({"vocab_size": 5}, "hash"),
    ],
)
def test_changed_files_are_refused(tokenizer: RustBPETokenizer, tmp_path: Path, change: dict, reason: str) -> None:
    path = tokenizer.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert_refused(path, reason)


def test_a_wrong_byte_length_is_refused(tokenizer: RustBPETokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(', 4, " the"', ', 3, " the"'), encoding="utf-8")
    assert_refused(path, "hash")
    for text in ("[]", "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        assert_refused(path, "damaged")
    path.unlink()
    assert_refused(path, "scripts.tok_train")
