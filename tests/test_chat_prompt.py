"""The prompt of a chat: which turns are kept, how much room is left, messages in any order of roles."""

import pytest
from conversation_helpers import SPELLED, TOOL_ANSWER, spell, talk
from hypothesis import given, settings, strategies as st

from nanochat.conversation import merge_messages, render, render_prompt, validate_messages
from nanochat.inference.chat_prompt import ANSWER_RESERVE, answer_reserve, drop_oldest_turns, fit_prompt
from nanochat.inference.request import ContextExceeded

# ---------------------------------------------------------------------------------------------------
# Fitting into the context


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("system", [None, "be so brief"])
def test_drop_oldest_turns_keeps_all_late_exchanges_that_fit(system: str | None, continued: bool) -> None:
    contents = ["first", "answer", "q", TOOL_ANSWER, "third question", "yes", "last", *(["so far"] * continued)]
    messages = talk(*contents, system=system)["messages"]
    candidates = [talk(*contents[start:], system=system)["messages"] for start in range(0, len(contents), 2)]
    lengths = [len(render_prompt(SPELLED, candidate, continued)) for candidate in candidates]
    for limit in range(lengths[-1] - 3, lengths[0] + 3):
        fitting = (candidate for candidate, length in zip(candidates, lengths) if length <= limit)
        assert drop_oldest_turns(SPELLED, messages, limit, continued) == next(fitting, candidates[-1])


def test_a_long_system_message_is_not_encoded_for_every_turn() -> None:
    encoded = []

    class Counting:
        def encode(self, text: str) -> list[int]:
            encoded.append(len(text))
            return SPELLED.encode(text)

        def encode_special(self, name: str) -> int:
            return SPELLED.encode_special(name)

    messages = [{"role": "system", "content": "a" * 5000}, *talk(*["b"] * 301)["messages"]]
    assert len(drop_oldest_turns(Counting(), messages, 1000)) == 2  # type: ignore[arg-type]
    assert sum(length >= 5000 for length in encoded) == 1
    assert len(drop_oldest_turns(Counting(), messages, 5200)) > 40  # type: ignore[arg-type]


def test_the_last_turn_must_be_the_one_to_answer_or_continue() -> None:
    with pytest.raises(ValueError, match="'assistant'"):
        drop_oldest_turns(SPELLED, talk("a", "b")["messages"], 100)
    with pytest.raises(ValueError, match="'user'"):
        drop_oldest_turns(SPELLED, talk("a")["messages"], 100, continue_last=True)
    with pytest.raises(ValueError, match="'user'"):
        render_prompt(SPELLED, talk("a")["messages"], continue_last=True)


@pytest.mark.parametrize("max_context", [64, 100, 512, 2048])
def test_turns_are_dropped_only_for_the_reserve(max_context: int) -> None:
    """The longest conversation that leaves the reserve is kept whole; one token more drops its first exchange."""
    reserve = answer_reserve(max_context)
    assert reserve == (ANSWER_RESERVE if max_context >= 512 else max_context // 8)
    fixed = len(render_prompt(SPELLED, talk("", "a", "q", system="S")["messages"]))
    for extra in (0, 1):
        contents = ["x" * (max_context - reserve - fixed + extra), "a", "q"]
        ids, kept = fit_prompt(SPELLED, talk(*contents, system="S")["messages"], max_context)
        assert kept == talk(*contents[2 * extra :], system="S")["messages"]
        assert ids == render_prompt(SPELLED, kept)
        assert extra or len(ids) == max_context - reserve


@pytest.mark.parametrize("chat_model", [True, False])
def test_the_last_message_may_fill_the_context_but_for_one_token(chat_model: bool) -> None:
    fixed = len(fit_prompt(SPELLED, talk("")["messages"], 100, chat_model)[0])
    ids, kept = fit_prompt(SPELLED, talk("a", "b", "x" * (99 - fixed))["messages"], 100, chat_model)
    assert len(ids) == 99 and kept == talk("x" * (99 - fixed))["messages"]
    with pytest.raises(ContextExceeded, match=r" 100 tokens.*maximum context length is 100 tokens"):
        fit_prompt(SPELLED, talk("x" * (100 - fixed))["messages"], 100, chat_model)


def test_a_base_model_continues_the_last_text() -> None:
    ids, kept = fit_prompt(SPELLED, talk("x", "y", "ab", system="S")["messages"], 100, chat_model=False)
    assert spell(ids) == "<bos>ab" and kept == talk("ab")["messages"]
    ids, _ = fit_prompt(SPELLED, talk("x", TOOL_ANSWER)["messages"], 100, chat_model=False)
    assert spell(ids) == "<bos>Let me see. It is 4."


# ---------------------------------------------------------------------------------------------------
# Continuing an answer


@pytest.mark.parametrize("content", ["", "So far", TOOL_ANSWER, TOOL_ANSWER[:3]])
def test_a_prompt_that_continues_is_the_whole_without_its_end(content: object) -> None:
    asked = talk("a", "b", "q", content, system="S")
    assert render_prompt(SPELLED, asked["messages"], continue_last=True) == render(SPELLED, asked)[0][:-1]
    assert fit_prompt(SPELLED, asked["messages"], 500, continue_last=True)[0] == render(SPELLED, asked)[0][:-1]


# ---------------------------------------------------------------------------------------------------
# Messages in any order


def merged(*messages: tuple[str, object]) -> list[tuple[str, object, int]]:
    found = merge_messages([{"role": role, "content": content} for role, content in messages])
    validate_messages(found)
    return [(message["role"], message["content"], message["merged"]) for message in found]


def test_neighbours_of_one_role_are_joined_by_a_blank_line() -> None:
    assert merged(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"), ("user", "e")) == [
        ("user", "a\n\nb", 2),
        ("assistant", "c\n\nd", 2),
        ("user", "e", 1),
    ]
    call, output = TOOL_ANSWER[1:3]
    assert merged(("user", "a"), ("assistant", [call, output]), ("assistant", "b"), ("assistant", "c"))[1] == (
        "assistant",
        [call, output, {"type": "text", "text": "b"}, {"type": "text", "text": "\n\n"}, {"type": "text", "text": "c"}],
        3,
    )


def test_system_messages_anywhere_join_the_system_text() -> None:
    assert merged(("system", "S"), ("user", "a"), ("system", "T"), ("user", "b"), ("system", "")) == [
        ("system", "S\n\nT", 3),
        ("user", "a\n\nb", 2),
    ]
    assert merged(("system", "S")) == [("system", "S", 1), ("user", "", 0)]


def test_empty_answers_are_left_out_and_greetings_kept() -> None:
    assert merged(("user", "a"), ("assistant", ""), ("user", "b")) == [("user", "a\n\nb", 2)]
    assert merged(("system", "S"), ("assistant", "Hello"), ("user", "a")) == [
        ("system", "S", 1),
        ("user", "", 0),
        ("assistant", "Hello", 1),
        ("user", "a", 1),
    ]


roles = st.sampled_from(["system", "user", "assistant"])


@settings(deadline=None, max_examples=200, database=None)
@given(st.lists(st.tuples(roles, st.sampled_from(["", "w", "x", "y", "z"])), min_size=1, max_size=8))
def test_any_order_becomes_a_conversation_and_no_text_is_lost(messages: list[tuple[str, str]]) -> None:
    found = merged(*messages)
    for role in ("system", "user", "assistant"):
        texts = [text for r, text in messages if r == role and text]
        assert "\n\n".join(text for r, text, _ in found if r == role and text) == "\n\n".join(texts)
    assert found[0][0] == "system" or not any(role == "system" and text for role, text in messages)
    assert merged(*((role, content) for role, content, _ in found)) == [(r, c, 1) for r, c, _ in found]
