"""Tokenizers as Hugging Face's files: the same ids, decoding, chats and masks, and back."""

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_files import mutate_json
from random_texts import MARK, random_messages, random_text

from nanochat.common import SPECIAL_TOKENS, UserError
from nanochat.conversation import render_prompt
from nanochat.formats.bpe_merges import derive_merges, last_merge
from nanochat.formats.hf_tokenizer import TOKENIZER_FILE, read_tokenizer, write_tokenizer
from nanochat.serve.messages import Message, to_conversation
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer

transformers = pytest.importorskip("transformers")
jinja2 = pytest.importorskip("jinja2")

WORDS = "The cats' hats and the 2nd 123456 — it'S naïve été 你好 привет 😀 👩‍👩‍👧 \n\n\t <| bos |> _start _end user   "
TOKENIZER = RustBPETokenizer.train_from_iterator([WORDS * 3, "hello the cat and the hat " * 5], 400)
TEXTS = [WORDS, *SPECIAL_TOKENS, "a" * 99, " \t\r\n x ", "", f"x {MARK} <b{MARK}", "a" + " \x1c" * 30_001 + "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(TOKENIZER, folder, chat=True, sequence_len=10**6)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(theirs: Any, texts: Any) -> Any:
    return theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# ---------------------------------------------------------------------------------------------------
# Texts


def test_texts_have_the_same_ids(theirs):
    rng = random.Random(1)
    texts = [*TEXTS, *(text for _ in range(1000) if f"<{MARK}" not in (text := random_text(rng)))]
    assert plain(theirs, texts) == [TOKENIZER.encode(text) for text in texts]


def test_every_letter_and_number_is_split_alike(theirs):
    texts = ["".join(f"{chr(code)}a {chr(code)}1" for code in range(i, i + 100)) for i in range(0xA0, 0x3000, 100)]
    assert plain(theirs, texts) == [TOKENIZER.encode(text) for text in texts]


def test_bos_is_added_unless_declined_and_names_are_found_unless_declined(theirs):
    bos = TOKENIZER.get_bos_token_id()
    assert theirs("the cat")["input_ids"] == [bos, *TOKENIZER.encode("the cat")]
    assert theirs("the cat", add_special_tokens=False)["input_ids"] == TOKENIZER.encode("the cat")
    assert theirs("the", "cat")["input_ids"] == [bos, *TOKENIZER.encode("the"), *TOKENIZER.encode("cat")]
    assert theirs("<|bos|>", add_special_tokens=False)["input_ids"] == [bos]
    assert plain(theirs, f"<{MARK}") == TOKENIZER.encode("<")  # the one text with other ids, as docs/portable.md says


def test_decoding_is_the_same_for_any_ids(theirs):
    rng, special = random.Random(2), set(TOKENIZER.special_ids.values())
    for _ in range(500):
        ids = [rng.randrange(rng.choice([256, TOKENIZER.get_vocab_size()])) for _ in range(rng.randrange(20))]
        assert theirs.decode(ids) == TOKENIZER.decode(ids)
        ordinary = [token for token in ids if token not in special]
        assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ordinary)


def test_roles_and_sizes(theirs, tmp_path):
    assert (theirs.bos_token_id, theirs.eos_token) == (TOKENIZER.get_bos_token_id(), "<|assistant_end|>")
    assert theirs.pad_token == theirs.eos_token and len(theirs) == TOKENIZER.get_vocab_size()
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [TOKENIZER.encode_special(n) for n in SPECIAL_TOKENS]
    write_tokenizer(TOKENIZER, tmp_path, chat=False, sequence_len=64)
    base = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (base.eos_token, base.model_max_length, base.chat_template) == ("<|bos|>", 64, None)


def test_merges_of_any_vocabulary_give_its_ids(tmp_path):
    """Also one in which ranks do not follow from merging, with tokens that merging does not reach."""
    rng = random.Random(3)
    for _ in range(5):
        drawn = {bytes(rng.choices(b"abc", k=rng.randint(2, 6))) for _ in range(60)}
        tokens = [bytes([value]) for value in range(256)] + rng.sample(sorted(drawn), len(drawn))
        tokenizer = RustBPETokenizer(SPLIT_PATTERN, tokens)
        assert None in derive_merges(tokens).values()
        write_tokenizer(tokenizer, tmp_path, chat=False, sequence_len=64)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / TOKENIZER_FILE))
        texts = [" ".join("".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(50)) for _ in range(20)]
        assert plain(theirs, texts) == [tokenizer.encode(text) for text in texts]
        assert read_tokenizer(tmp_path).hash == tokenizer.hash


def test_last_merge():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"cab": 6}
    assert last_merge(b"abc", ranks) == (b"a", b"bc")
    assert last_merge(b"cab", ranks) == (b"c", b"ab")
    assert last_merge(b"cbc", ranks) is None


# ---------------------------------------------------------------------------------------------------
# Chats


def rendered(theirs: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return theirs.apply_chat_template(messages, return_dict=False, **options)


def test_conversations_have_the_same_ids_and_masks(theirs):
    rng = random.Random(4)
    for _ in range(100):
        messages = random_messages(rng)
        ids, mask = TOKENIZER.render_conversation({"messages": messages}, 10**9)
        theirs_too = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert theirs_too["input_ids"] == ids
        assert theirs_too["assistant_masks"] == mask
        if messages[-1]["role"] == "user":
            prompt = rendered(theirs, messages, add_generation_prompt=True)
            assert prompt == TOKENIZER.render_for_completion({"messages": messages})


@pytest.mark.parametrize("ending", ["", " ", "the\n", "<", "<|", "<|assistant_end|", "é"])
def test_a_last_answer_can_be_continued(theirs, ending: str):
    messages = [{"role": "user", "content": "hi <|bos|>"}, {"role": "assistant", "content": f"Well{ending}"}]
    continued = rendered(theirs, messages, continue_final_message=True)
    assert continued == render_prompt(TOKENIZER, messages, continue_last=True)


def test_contents_cannot_forge_a_turn(theirs):
    forged = [*SPECIAL_TOKENS, "<", MARK, "|bos|>", "<|", "|>", f"<{MARK}", f"<{MARK}{MARK}|user_end|>"]
    rng = random.Random(5)
    for _ in range(100):
        texts = ["".join(rng.choices(forged, k=rng.randint(1, 6))) for _ in range(3)]
        answer = [{"type": "text", "text": texts[1]}, {"type": "python", "text": texts[2]}]
        messages = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": answer}]
        assert rendered(theirs, messages) == TOKENIZER.render_conversation({"messages": messages})[0]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


USER = {"role": "user", "content": [{"type": "text", "text": "2+2"}, {"type": "text", "text": "?"}]}
TOOL_CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call("calculator", {"expression": "2+2"}, id="a")]},
        {"role": "tool", "tool_call_id": "a", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Thanks <|bos|>"},
    ],
    [
        USER,
        {
            "role": "assistant",
            "content": "Two: ",
            "tool_calls": [
                call("python", "print(1)", id="a"),
                call("weather", {"city": "Ürümqi's <|bos|>", "days": 2, "exact": True, "at": None}, id="b"),
                call("python", {"code": 5}, id="c"),
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "tool", "tool_call_id": "a", "content": "1<|output_end|>"},
    ],
    [
        USER,
        {"role": "assistant", "content": "", "function_call": {"name": "search", "arguments": "x"}},
        {"role": "function", "name": "search", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [call("python", ""), call("python", "")]},
        {"role": "tool", "content": "a"},
        {"role": "tool", "content": "b"},
    ],
]


@pytest.mark.parametrize("messages", TOOL_CHATS)
def test_tool_calls_become_the_parts_that_the_server_makes_of_them(theirs, messages):
    conversation = to_conversation([Message(**message) for message in messages])
    assert rendered(theirs, messages) == TOKENIZER.render_conversation({"messages": conversation})[0]
    answering = conversation[-1]["role"] == "assistant"
    expected = render_prompt(TOKENIZER, conversation, continue_last=answering)
    assert rendered(theirs, messages, add_generation_prompt=True) == expected


HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([{"role": "system", "content": "x"}], "only a system message"),
        ([HELLO], "message 1"),
        ([HI, HI], "message 2"),
        ([HI, HELLO, HELLO], "message 3"),
        ([HI, {"role": "system", "content": "x"}], "message 2"),
        ([HI, {"role": "critic", "content": "x"}], "message 2"),
        ([HI, {"role": "tool", "content": "x"}], "message 2"),
        ([HI, HELLO, {"role": "tool", "content": "x"}], "message 3"),
        ([{"role": "user"}], "message 1"),
        ([{"role": "user", "content": {"a": 1}}], "message 1"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "message 1"),
        ([HI, {"role": "assistant", "content": []}], "message 2"),
        ([HI, {"role": "assistant"}], "message 2"),
        ([HI, {"role": "assistant", "content": [{"type": "audio", "text": "x"}]}], "message 2"),
        ([HI, {"role": "assistant", "content": [{"type": "text"}]}], "message 2"),
        ([HI, HELLO | {"weight": 2}], "message 2"),
        ([HI, HELLO | {"tool_calls": [call("python", '{"code": "1"}')]}], "message 2"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(theirs, messages, where: str):
    with pytest.raises(jinja2.TemplateError, match=where):
        theirs.apply_chat_template(messages)


def test_a_finished_conversation_needs_no_answer(theirs):
    with pytest.raises(jinja2.TemplateError, match="continue_final_message"):
        theirs.apply_chat_template([HI, HELLO], add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------------
# Reading


def edited(folder: Path, to: Path, edit: Any) -> Path:
    content = json.loads((folder / TOKENIZER_FILE).read_text())
    edit(content)
    (to / TOKENIZER_FILE).write_text(json.dumps(content))
    return to


def test_it_comes_back_the_same_also_after_transformers_saved_it(folder, theirs, tmp_path):
    assert read_tokenizer(folder).hash == TOKENIZER.hash
    theirs.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).hash == TOKENIZER.hash


def test_files_of_other_converters_are_read(folder, tmp_path):
    """Merges as texts and with pairs that never meet, special tokens in the vocabulary, no normalizer."""

    def edit(content: Any) -> None:
        model, vocab = content["model"], content["model"]["vocab"]
        content["normalizer"] = None
        del content["pre_tokenizer"]["pretokenizers"][0]
        pairs = [(name[:i], name[i:]) for name in vocab for i in range(1, len(name))]
        model["merges"] = [f"{left} {right}" for left, right in pairs if left in vocab and right in vocab]
        vocab.update({token["content"]: token["id"] for token in content["added_tokens"]})
        del model["ignore_merges"]

    assert read_tokenizer(edited(folder, tmp_path, edit)).hash == TOKENIZER.hash


def set_in(*path: Any) -> Any:
    *parents, key, value = path

    def edit(content: Any) -> None:
        for parent in parents:
            content = content[parent]
        content[key] = value

    return edit


def swap_first_merges(content: Any) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    "edit",
    [
        set_in("normalizer", {"type": "NFC"}),
        set_in("normalizer", {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
        set_in("pre_tokenizer", None),
        set_in("pre_tokenizer", {"type": "Metaspace", "replacement": "_"}),
        set_in("pre_tokenizer", "pretokenizers", 1, "pattern", {"Regex": r"\w+"}),
        set_in("pre_tokenizer", "pretokenizers", 1, "pattern", "Regex", r"(?:\G|(?<![\s\x1c-\x1f]))"),
        set_in("pre_tokenizer", "pretokenizers", 1, "behavior", "Removed"),
        set_in("pre_tokenizer", "pretokenizers", 2, "add_prefix_space", True),
        set_in("pre_tokenizer", "pretokenizers", 2, "use_regex", True),
        set_in("decoder", {"type": "WordPiece"}),
        set_in("model", "type", "Unigram"),
        set_in("model", "dropout", 0.5),
        set_in("model", "end_of_word_suffix", "</w>"),
        set_in("model", "merges", []),
        set_in("model", "merges", 0, ["a", "zzzzz"]),
        set_in("model", "merges", 0, "nospace"),
        set_in("model", "merges", 0, ["a", "b", "c"]),
        swap_first_merges,
        set_in("model", "vocab", "ひ", 9),
        set_in("model", "vocab", "zzzzzz", 5000),
        set_in("model", "vocab", "!", 10**30),
        set_in("model", "vocab", "!", -1),
        set_in("model", "vocab", {}),
        set_in("model", "vocab", {"a" * 2**15: 0}),
        set_in("added_tokens", []),
        set_in("added_tokens", 0, "id", 3),
        set_in("added_tokens", 0, "special", False),
        set_in("added_tokens", 0, "content", "<|user_end|>"),
    ],
)
def test_what_would_give_other_ids_is_refused(folder, tmp_path, edit):
    with pytest.raises(UserError):
        read_tokenizer(edited(folder, tmp_path, edit))


def test_damaged_files_raise_user_errors_quickly(folder, tmp_path):
    rng, text = random.Random(6), (folder / TOKENIZER_FILE).read_bytes()
    started, same = time.monotonic(), 0
    for _ in range(100):
        (tmp_path / TOKENIZER_FILE).write_bytes(mutate_json(text, rng))
        with contextlib.suppress(UserError):
            same += bool(read_tokenizer(tmp_path))
    assert same < 80 and time.monotonic() - started < 60
    with pytest.raises(UserError):
        read_tokenizer(tmp_path / "none")


def test_long_tokens_take_no_time(folder, tmp_path):
    def add_tokens(content: Any) -> None:
        for size in range(50_000, 50_020):
            content["model"]["vocab"]["a" * size] = content["added_tokens"][0]["id"]
            for token in content["added_tokens"]:
                token["id"] += 1

    started = time.monotonic()
    with pytest.raises(UserError, match="bytes"):
        read_tokenizer(edited(folder, tmp_path, add_tokens))
    assert time.monotonic() - started < 10


def test_another_split_pattern_is_not_exported(tmp_path):
    other = RustBPETokenizer(r"\s+|\S+", [bytes([value]) for value in range(256)])
    with pytest.raises(UserError, match="pattern"):
        write_tokenizer(other, tmp_path, chat=False, sequence_len=64)
    digits = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
    write_tokenizer(RustBPETokenizer(digits, [bytes([value]) for value in range(256)]), tmp_path, False, 64)
    assert read_tokenizer(tmp_path).pattern == digits
