"""Answers that begin with given tokens, and log probabilities with token ids: what the page's branches are made of."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serve_helpers import CHAT, MODEL, TOKENIZER, app_of, chat, events

from nanochat.engine import Engine
from nanochat.inference.tools import ToolSession, ToolTable
from nanochat.serve.api import Settings

START, STOP, OUT, OUT_END, END, ASSISTANT = (
    TOKENIZER.encode_special(f"<|{name}|>")
    for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end", "assistant_start")
)
PREFIX = list(b"abc")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app_of()) as made:
        yield made


def prompt_of(*messages: dict[str, str]) -> list[int]:
    own = messages or ({"role": "user", "content": "hi"},)
    return TOKENIZER.render_for_completion({"messages": [*own, {"role": "assistant", "content": ""}]})


def continued(prompt: list[int], max_tokens: int = 8) -> list[int]:
    """What the engine adds to these ids, greedily, without the end token."""
    (found,), _ = Engine(MODEL, TOKENIZER).generate_batch(prompt, 1, max_tokens=max_tokens, temperature=0.0)
    return [token for token in found[len(prompt) :] if token != END]


def text_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def test_the_answer_goes_on_as_the_engine_does(client: TestClient) -> None:
    body = client.post(CHAT, json=chat(temperature=0, answer_prefix=PREFIX)).json()
    prompt = [*prompt_of(), *PREFIX]
    added = continued(prompt)
    assert body["choices"][0]["message"]["content"] == text_of([*PREFIX, *added])
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(added))
    assert usage["total_tokens"] == len(prompt) + len(added)
    plain = client.post(CHAT, json=chat(temperature=0)).json()
    empty = client.post(CHAT, json=chat(temperature=0, answer_prefix=[])).json()
    assert empty["choices"] == plain["choices"]


def test_given_tokens_are_the_first_pieces_of_a_stream(client: TestClient) -> None:
    whole = client.post(CHAT, json=chat(answer_prefix=PREFIX, logprobs=True)).json()["choices"][0]
    streamed = events(client.post(CHAT, json=chat(answer_prefix=PREFIX, logprobs=True, stream=True)))
    choices = [event["choices"][0] for event in streamed[:-1] if event["choices"]]
    texts = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(texts) == whole["message"]["content"]
    assert texts[:2] == ["", "abc"], "in one piece, after the role"
    entries = [entry for choice in choices if choice.get("logprobs") for entry in choice["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"], "given tokens have no log probabilities"


def test_every_choice_begins_so(client: TestClient) -> None:
    body = client.post(CHAT, json=chat(answer_prefix=PREFIX, n=3)).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert len(set(texts)) > 1 and all(text.startswith("abc") for text in texts)


def test_after_a_message_to_be_continued_and_dropped_messages(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    request = chat(messages=messages, temperature=0, answer_prefix=PREFIX, continue_final_message=True)
    body = client.post(CHAT, json=request | {"add_generation_prompt": False}).json()
    assert body["choices"][0]["message"]["content"] == text_of([*PREFIX, *continued([*prompt_of(), *b"yes", *PREFIX])])
    old = [{"role": "user", "content": "x" * (MODEL.config.sequence_len - 25)}, {"role": "assistant", "content": "y"}]
    long = chat(messages=[*old, {"role": "user", "content": "z"}], max_tokens=2)
    assert client.post(CHAT, json=long).json()["usage"]["dropped_messages"] == 0
    body = client.post(CHAT, json={**long, "answer_prefix": [97] * 20}).json()
    assert body["usage"]["dropped_messages"] == 2, "the beginning needs room, too"


def test_a_base_model_continues_from_it() -> None:
    with TestClient(app_of(Settings(chat_model=False))) as client:
        body = client.post(CHAT, json=chat(temperature=0, answer_prefix=PREFIX)).json()
    prompt = [TOKENIZER.get_bos_token_id(), *b"hi", *PREFIX]
    assert body["choices"][0]["message"]["content"].startswith("abc")
    assert body["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    "changes",
    [
        {"answer_prefix": [10_000]},
        {"answer_prefix": [-1]},
        {"answer_prefix": ["a"]},
        {"answer_prefix": "abc"},
        {"answer_prefix": [97] * MODEL.config.sequence_len},
        {"answer_prefix": [97] * 200_000},
        {"answer_prefix": [97], "response_format": {"type": "json_object"}},
        {"logprob_ids": True},
        {"logprob_ids": "perhaps", "logprobs": True},
    ],
    ids=str,
)
def test_what_is_refused(client: TestClient, changes: dict[str, Any]) -> None:
    answer = client.post(CHAT, json=chat(**changes))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].split(".")[0] == next(iter(changes))


def test_a_complete_call_is_answered_by_its_tool(client: TestClient) -> None:
    call = [*b"So ", START, *b"12*3", STOP]
    request = chat(temperature=0, answer_prefix=call, max_tokens=6, logprobs=True, logprob_ids=True)
    choice = client.post(CHAT, json=request).json()["choices"][0]
    assert choice["message"]["tools"][:2] == [
        {"kind": "python", "text": "12*3"},
        {"kind": "python_output", "text": "36"},
    ]
    assert choice["message"]["content"].startswith("So ")
    entries = choice["logprobs"]["content"]
    assert [entry["id"] for entry in entries[:4]] == [OUT, *b"36", OUT_END]
    assert [entry.get("forced") for entry in entries[:5]] == [True] * 4 + [None]
    assert all(entry["top_logprobs"] == [] and entry["logprob"] == 0 for entry in entries[:4])
    # Without logprob_ids: only what the model chose, in OpenAI's fields.
    plain = client.post(CHAT, json=request | {"logprob_ids": False}).json()["choices"][0]["logprobs"]["content"]
    assert [{k: v for k, v in entry.items() if k != "id"} for entry in entries[4:]] == plain


def test_a_call_that_is_being_written_goes_on() -> None:
    session = ToolSession(ToolTable(TOKENIZER))
    session.catch_up([*b"1+1 is ", START, *b"1+1", STOP, OUT, *b"2", OUT_END, *b" and ", START, *b"2+"], 100)
    assert not session.forced, "an earlier call is not answered again"
    for token in (ord("3"), STOP):
        session.observe(token, 100)
    assert list(session.forced) == [OUT, *b"5", OUT_END]
    other = ToolSession(ToolTable(TOKENIZER))
    other.catch_up([START, *b"2+3", STOP, OUT, *b"5", OUT_END], 100)
    assert not other.forced
    cut = ToolSession(ToolTable(TOKENIZER))
    cut.catch_up([START, *b"6*7", STOP, OUT, *b"4"], 100)
    assert list(cut.forced) == [*b"2", OUT_END], "the rest of a result is not the model's to guess"


def test_ids_and_bytes_of_logprobs(client: TestClient) -> None:
    request = chat(logprobs=True, top_logprobs=3, logprob_ids=True, max_tokens=16, seed=3)
    for entry in client.post(CHAT, json=request).json()["choices"][0]["logprobs"]["content"]:
        for one in [entry, *entry["top_logprobs"]]:
            raw = TOKENIZER.decode_bytes([one["id"]])
            assert one["bytes"] == list(raw) and one["token"] == raw.decode(errors="replace")
        assert entry.get("forced") or len(entry["top_logprobs"]) == 3
