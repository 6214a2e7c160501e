"""Rendering is checked against the published implementation's ids and against a spelled-out template."""

import base64
import copy
import json
from pathlib import Path

import pytest
from conversation_helpers import SPELLED, TOOL_ANSWER, spell, talk
from hypothesis import given, settings, strategies as st

from nanochat import conversation as conv
from nanochat.common import SPECIAL_TOKENS
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "conversations.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------
# Rendering


@pytest.fixture(scope="module")
def published_tokenizer() -> RustBPETokenizer:
    """The golden's vocabulary. Tokens that its texts never pass through are bytes that no text contains."""
    known = {rank: base64.b64decode(token) for rank, token in GOLDEN["merges"]}
    known |= {value: bytes([value]) for value in range(256)}
    unreachable = (b"\xff\xfe%d" % rank for rank in range(GOLDEN["num_ranks"]))
    tokens = [known.get(rank, filler) for rank, filler in enumerate(unreachable)]
    return RustBPETokenizer(GOLDEN["pattern"], tokens, list(GOLDEN["special_tokens"]))


@pytest.mark.parametrize("case", GOLDEN["conversations"])
def test_equal_to_the_published_implementation(published_tokenizer: RustBPETokenizer, case: dict) -> None:
    assert GOLDEN["pattern"] == SPLIT_PATTERN
    assert published_tokenizer.special_ids == GOLDEN["special_tokens"]
    before = copy.deepcopy(case)
    assert conv.render(published_tokenizer, case["conversation"]) == (case["ids"], case["mask"])
    assert published_tokenizer.render_conversation(case["conversation"]) == (case["ids"], case["mask"])
    assert published_tokenizer.render_for_completion(case["conversation"]) == case["completion_ids"]
    assert case == before, "rendering must not change its input"


def test_template_and_mask_spelled_out() -> None:
    ids, mask = conv.render(SPELLED, talk("2+2?", TOOL_ANSWER, "Thanks", "Bye", system="Be brief."))
    assert spell(ids) == (
        "<bos><user_start>Be brief.\n\n2+2?<user_end>"
        "<assistant_start>Let me see. <python_start>2+2<python_end><output_start>4<output_end>It is 4.<assistant_end>"
        "<user_start>Thanks<user_end><assistant_start>Bye<assistant_end>"
    )
    supervised = "".join(spell([i]) if m else "·" for i, m in zip(ids, mask))
    assert [run for run in supervised.split("·") if run] == [
        "Let me see. <python_start>2+2<python_end>",
        "It is 4.<assistant_end>",
        "Bye<assistant_end>",
    ]


def test_a_prompt_ends_with_the_assistant_start_token() -> None:
    asked = talk("Hi", "Hello", "Who?", system="S")
    expected = (
        "<bos><user_start>S\n\nHi<user_end><assistant_start>Hello<assistant_end>"
        "<user_start>Who?<user_end><assistant_start>"
    )
    assert spell(conv.render_prompt(SPELLED, asked["messages"])) == expected
    answered = talk("Hi", "Hello", "Who?", "Me.", system="S")
    assert spell(conv.render_prompt(SPELLED, answered["messages"])) == expected, "a trailing answer is left out"
    with pytest.raises(ValueError, match="user"):
        conv.render_prompt(SPELLED, [{"role": "system", "content": "S"}])


def test_max_tokens_cuts_anywhere() -> None:
    whole_ids, whole_mask = conv.render(SPELLED, talk("Hi", "Hello"))
    for length in range(len(whole_ids) + 3):
        assert conv.render(SPELLED, talk("Hi", "Hello"), length) == (whole_ids[:length], whole_mask[:length])


texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIAL_TOKENS)), max_size=3).map("".join)
parts = st.fixed_dictionaries({"type": st.sampled_from(list(conv.PART_TOKENS)), "text": texts})
answers = st.one_of(texts, st.lists(parts, min_size=1, max_size=4))
exchanges = st.lists(st.tuples(texts, answers), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, database=None)
@given(exchanges=exchanges, system=st.one_of(st.none(), texts))
def test_text_cannot_forge_a_turn(tokenizer: RustBPETokenizer, exchanges: list, system: str | None) -> None:
    contents = [content for exchange in exchanges for content in exchange]
    ids, mask = conv.render(tokenizer, talk(*contents, system=system))
    assert len(ids) == len(mask)
    special = [tokenizer.decode([i]) for i in ids if i >= tokenizer.encode_special("<|bos|>")]
    expected = ["<|bos|>"]
    for question_and_answer in exchanges:
        answer = question_and_answer[1]
        tools = [p["type"] for p in answer if p["type"] != "text"] if isinstance(answer, list) else []
        names = [name for kind in tools for name in (conv.PART_TOKENS[kind][0], conv.PART_TOKENS[kind][1])]
        expected += ["<|user_start|>", "<|user_end|>", "<|assistant_start|>", *names, "<|assistant_end|>"]
    assert special == expected, "special tokens come from the structure alone, not from the text"
    spoken = b"".join(tokenizer.decode_bytes([i]) for i, m in zip(ids, mask) if m).decode("utf-8")
    assert spoken == "".join(spoken_text(answer) + "<|assistant_end|>" for _, answer in exchanges)


def spoken_text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    wrap = {"text": "{}", "python": "<|python_start|>{}<|python_end|>", "python_output": ""}
    return "".join(wrap[part["type"]].replace("{}", part["text"]) for part in content)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["user assistant start end python output hello <|bos|>"] * 3, 280)


# ---------------------------------------------------------------------------------------------------
# Parsing an answer


@pytest.mark.parametrize("content", ["", "Hello 😀", TOOL_ANSWER, TOOL_ANSWER[1:3], [{"type": "python", "text": ""}]])
def test_parse_answer_is_the_inverse_of_rendering(content: object) -> None:
    prompt = conv.render_prompt(SPELLED, talk("Q")["messages"])
    ids, _ = conv.render(SPELLED, talk("Q", content))
    assert conv.parse_answer(SPELLED, ids[len(prompt) :]) == content
    assert conv.parse_answer(SPELLED, ids[len(prompt) : -1]) == content, "with or without the end token"


def test_an_answer_of_text_parts_is_a_string() -> None:
    assert conv.parse_answer(SPELLED, SPELLED.encode("ab")) == "ab"
    stray = [SPELLED.encode_special("<|user_start|>"), ord("a"), SPELLED.encode_special("<|python_end|>"), ord("b")]
    assert conv.parse_answer(SPELLED, stray) == "ab"


@settings(deadline=None, max_examples=100, database=None)
@given(st.lists(st.one_of(st.integers(-9, -1), st.integers(97, 99)), max_size=12))
def test_parse_answer_accepts_any_tokens(ids: list[int]) -> None:
    content = conv.parse_answer(SPELLED, ids)
    conv.validate_conversation(talk("Q", content))
    assert spell([-1]) not in str(content)


# ---------------------------------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (None, "not null"),
        ([], "not list"),
        ({}, "needs 'messages'; found nothing"),
        ({"text": "x"}, "found 'text'"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": []}, "is empty"),
        ({"messages": ["hi"]}, "message 1 must be an object"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [{"content": "x"}]}, "message 1 has no 'role'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 1 must have role 'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 must have role 'user', not 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 must have role 'user'"),
        ({"messages": [*talk("x")["messages"], *talk("y")["messages"]]}, "message 2 must have role 'assistant'"),
        ({"messages": [*talk("x", "y")["messages"], {"role": "system", "content": "s"}]}, "message 3 must have"),
        (talk(None), "message 1: the content of a user message must be a string, not null"),
        (talk(TOOL_ANSWER), "message 1: the content of a user message must be a string"),
        (talk("x", 5), "message 2: content must be a string or a list of parts"),
        (talk("x", []), "message 2: the list of parts is empty"),
        (talk("x", ["y"]), "message 2: part 1 must be an object"),
        (talk("x", [{"type": "text"}]), "part 1 must be an object with 'type' and a string 'text'"),
        (talk("x", [TOOL_ANSWER[0], {"type": "image", "text": ""}]), "part 2 has type 'image'; allowed: text, python"),
    ],
)
def test_invalid_conversations_are_refused_with_a_reason(wrong: object, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        conv.validate_conversation(wrong)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_training_needs_an_assistant_message() -> None:
    conv.validate_conversation(talk("x", system="s"))
    conv.validate_conversation(talk("x", "y", "z"), for_training=True)
    for lacking in (talk("x"), talk("x", system="s"), talk(system="s")):
        with pytest.raises(ValueError, match="assistant"):
            conv.validate_conversation(lacking, for_training=True)


# ---------------------------------------------------------------------------------------------------
# Fitting into a length


def rendered_length(conversation: dict) -> int:
    return len(conv.render(SPELLED, conversation)[0])


@pytest.mark.parametrize("system", [None, "system"])
@pytest.mark.parametrize("contents", [("a", "bb"), ("aaaaaa", TOOL_ANSWER, "c"), ("a", "bb", "ccc", "dddd", "e", "f")])
def test_truncate_turns_keeps_all_early_exchanges_that_fit(system: str | None, contents: tuple) -> None:
    whole = {**talk(*contents, system=system), "source": "kept"}
    for limit in range(rendered_length(whole) + 2):
        candidates = [talk(*contents[:n], system=system) for n in range(2, len(contents) + 1, 2)]
        fitting = [candidate for candidate in candidates if rendered_length(candidate) <= limit]
        got = conv.truncate_turns(SPELLED, whole, limit)
        assert got == ({**fitting[-1], "source": "kept"} if fitting else None)


def test_truncate_turns_returns_the_same_object_or_none() -> None:
    whole = talk("a", "b")
    assert conv.truncate_turns(SPELLED, whole, rendered_length(whole)) is whole
    assert conv.truncate_turns(SPELLED, talk("a"), 1000) is None
    assert conv.truncate_turns(SPELLED, talk(system="s"), 1000) is None
    assert conv.truncate_turns(SPELLED, talk("a" * 5000, "b"), 100) is None, "an exchange longer than a row is dropped"
