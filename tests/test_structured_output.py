"""Structured output, sampling fields and unknown names over HTTP."""

import json
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from fastapi.testclient import TestClient
from serve_helpers import CHAT, TOKENIZER, app_of, chat, events

from nanochat.inference import prefill
from nanochat.serve import service
from nanochat.serve.known_fields import HARMLESS, NEUTRAL
from nanochat.serve.routes_chat import ChatRequest
from nanochat.serve.routes_completions import CompletionRequest

COMPLETIONS = "/v1/completions"
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app_of()) as made:
        yield made


def completion(**changes: Any) -> dict[str, Any]:
    return {"prompt": "hi", "seed": 7, "temperature": 1.0, "max_tokens": 40, **changes}


def texts(client: TestClient, path: str, **changes: Any) -> list[str]:
    """The choices' texts, all ended by the model."""
    body = chat(max_tokens=40, **changes) if path == CHAT else completion(**changes)
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert all(choice["finish_reason"] == "stop" for choice in choices), choices
    return [choice["message"]["content"] if path == CHAT else choice["text"] for choice in choices]


def error_of(client: TestClient, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


# ---------------------------------------------------------------------------------------------------
# What an answer matches


def is_point(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"x", "on"} and 0 <= value["x"] <= 99 and type(value["on"]) is bool


def is_word(text: str) -> bool:
    return bool(re.fullmatch("[a-z]{2,5}-[0-9]", text))


def is_choice(text: str) -> bool:
    return text in ("left", "right", "né")


FORMS: list[tuple[dict[str, Any], Any]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": POINT, "strict": True}}},
        is_point,
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": POINT, "strict": False}}}, is_point),
    ({"response_format": {"type": "json_object", "schema": POINT}}, is_point),
    ({"structured_outputs": {"json": POINT}}, is_point),
    ({"guided_json": POINT}, is_point),
    ({"guided_json": json.dumps(POINT)}, is_point),
    ({"regex": "[a-z]{2,5}-[0-9]"}, is_word),
    ({"structured_outputs": {"regex": "[a-z]{2,5}-[0-9]"}}, is_word),
    ({"guided_regex": "[a-z]{2,5}-[0-9]"}, is_word),
    ({"choice": ["left", "right", "né"]}, is_choice),
    ({"structured_outputs": {"choice": ["left", "right", "né"]}}, is_choice),
    ({"guided_choice": ["left", "right", "né"]}, is_choice),
]


@pytest.mark.parametrize(("fields", "matches"), FORMS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_answers_match(client: TestClient, path: str, fields: dict[str, Any], matches: Any) -> None:
    found = texts(client, path, n=4, **fields)
    assert all(matches(text) for text in found) and len(set(found)) > 1


def test_any_json_object(client: TestClient) -> None:
    """Of a model that knows nothing: an object, or what may become one."""
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        body = client.post(CHAT, json=chat(n=8, max_tokens=30, **fields)).json()
        for choice in body["choices"]:
            text = choice["message"]["content"]
            assert text.startswith("{") and (choice["finish_reason"] == "length" or type(json.loads(text)) is dict)


@pytest.mark.parametrize(("fields", "matches"), FORMS[::5])
def test_streamed_equals_whole(client: TestClient, fields: dict[str, Any], matches: Any) -> None:
    whole = texts(client, CHAT, n=3, **fields)
    stream = events(client.post(CHAT, json=chat(max_tokens=40, n=3, stream=True, **fields)))[:-1]
    choices = [chunk["choices"][0] for chunk in stream]
    for index, text in enumerate(whole):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == text and matches(text)
        assert own[-1]["finish_reason"] == "stop"


def test_a_cached_prompt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(service, "PREFILL_CHUNK", 8)
    fields = {"regex": "[a-z]{9}", "frequency_penalty": 1.0, "repetition_penalty": 1.5, "logit_bias": {"97": 5}}
    with TestClient(app_of()) as client:
        first, again = (texts(client, COMPLETIONS, prompt="xyz" * 7, **fields) for _ in range(2))
        assert first == again and client.get("/stats").json()["prefix_hit_tokens"] == 16


def test_max_tokens_end_a_grammar_early(client: TestClient) -> None:
    body = client.post(CHAT, json=chat(max_tokens=3, regex="[a-z]{9}")).json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length" and re.fullmatch("[a-z]{3}", choice["message"]["content"])


def test_text_is_free(client: TestClient) -> None:
    free = client.post(CHAT, json=chat()).json()["choices"]
    for value in ({"type": "text"}, None):
        assert client.post(CHAT, json=chat(response_format=value)).json()["choices"] == free


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
            "response_format.json_schema.shema",
            "schema",
        ),
        ({"guided_json": {"uniqueItems": True}}, "guided_json", "uniqueItems"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
            "not",
        ),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format", "schema"),
        (
            {"response_format": {"type": "json_object", "schema": {}, "json_schema": {"schema": {}}}},
            "response_format",
            "schema",
        ),
        ({"guided_json": "{"}, "guided_json", "JSON"),
        ({"guided_json": "[1]"}, "guided_json", "object"),
        ({"regex": "("}, "regex", "regex"),
        ({"regex": ""}, "regex", ""),
        ({"choice": []}, "choice", ""),
        ({"choice": ["a"], "regex": "b"}, "choice", "regex"),
        ({"regex": "x" * 60_000}, "regex", "10,000"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar", ""),
        ({"guided_grammar": "root ::= x"}, "guided_grammar", ""),
        ({"regex": "a", "min_tokens": 5}, "min_tokens", "grammar"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "grammar"),
    ],
)
def test_what_cannot_be_followed_is_named(client: TestClient, fields: dict[str, Any], param: str, word: str) -> None:
    error = error_of(client, chat(**fields))
    assert error["param"].startswith(param) and word in error["message"]


# ---------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize(
    ("fields", "same_as"),
    [
        ({"top_p": 0}, {"temperature": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 1}, {"temperature": 0}),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}}, {}),
        ({"logit_bias": None, "stop_token_ids": None, "min_tokens": None, "ignore_eos": None, "min_p": None}, {}),
    ],
)
def test_values_that_mean_the_same(client: TestClient, fields: dict[str, Any], same_as: dict[str, Any]) -> None:
    first, second = (client.post(CHAT, json=chat(max_tokens=20, **f)).json()["choices"] for f in (fields, same_as))
    assert first == second


def test_a_bias_decides(client: TestClient) -> None:
    body = chat(max_tokens=5, logit_bias={"97": 100}, presence_penalty=2, frequency_penalty=2)
    assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == "aaaaa"
    body = chat(max_tokens=5, logit_bias={"97": 100, "98": 99.5}, frequency_penalty=2)
    assert set(client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]) == set("ab")


def test_a_seed_of_minus_one_is_a_random_one(client: TestClient) -> None:
    contents = [client.post(CHAT, json=chat(max_tokens=20, seed=-1)).json()["choices"][0] for _ in range(2)]
    assert contents[0] != contents[1]


def test_stop_tokens_and_least_length(client: TestClient) -> None:
    fields = {"logit_bias": {"97": 100}, "stop_token_ids": [97], "max_tokens": 9}
    for path, body in ((CHAT, chat), (COMPLETIONS, completion)):
        (choice,) = client.post(path, json=body(**fields)).json()["choices"]
        assert (
            choice["finish_reason"] == "stop"
            and (choice.get("message") or {"content": choice["text"]})["content"] == ""
        )
        answer = client.post(path, json=body(**fields, min_tokens=4)).json()
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 4
    end = TOKENIZER.encode_special("<|assistant_end|>")
    answer = client.post(CHAT, json=chat(max_tokens=9, ignore_eos=True, logit_bias={f"{end}": 100})).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"265": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": [265]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_values_out_of_range(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert error_of(client, chat(**fields))["param"].startswith(param)


# ---------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("path", "name", "near"),
    [
        (CHAT, "max_tokns", "max_tokens"),
        (CHAT, "temprature", "temperature"),
        (CHAT, "stop_tokens", "stop_token_ids"),
        (CHAT, "response_fromat", "response_format"),
        (COMPLETIONS, "max_completion_tokens", "max_tokens"),
        (COMPLETIONS, "messages", "prompt"),
        (CHAT, "prompt", "messages"),
        (CHAT, "options", ""),
        (CHAT, "input", "messages"),
        ("/tokenize", "contents", ""),
        ("/detokenize", "token", "tokens"),
    ],
)
def test_unknown_names_are_refused(client: TestClient, path: str, name: str, near: str) -> None:
    bodies = {CHAT: chat(), COMPLETIONS: completion(), "/tokenize": {"text": "x"}, "/detokenize": {"tokens": [1]}}
    error = error_of(client, {**bodies[path], name: 1}, path)
    assert error["param"] == name and near in error["message"]
    assert client.post(path, json={**bodies[path], name: None}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"\ud800": 1}, "\\ud800"),
        (CHAT, {"logit_bias": {"\ud800": 1}}, "logit_bias"),
        (CHAT, {"guided_json": {"properties": {"\ud800": {"not": {}}}}}, "guided_json"),
        ("/v1/responses", {"text": {"format": {"type": "text", "name": "\ud800"}}}, "text.format.name"),
    ],
)
def test_half_a_surrogate_pair_in_a_name(client: TestClient, path: str, fields: dict[str, Any], param: str) -> None:
    content = json.dumps({**(chat() if path == CHAT else {"input": "hi"}), **fields})
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"function_call": {"name": "f"}, "functions": [{"name": "f"}]},
        {"suffix": "."},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x", "format": "wav"}},
        {"best_of": 2},
        {"use_beam_search": True},
        {"length_penalty": 1.5},
        {"web_search_options": {}},
        {"include_stop_str_in_output": True},
        {"repeat_penalty": 1.1},
        {"echo": True},
    ],
)
def test_what_is_not_built_is_refused_by_name(client: TestClient, fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    error = error_of(client, chat(**fields))
    assert error["param"] == name and name in error["message"]


def test_harmless_fields_and_values_that_mean_off(client: TestClient) -> None:
    plain = client.post(CHAT, json=chat()).json()["choices"]
    harmless = {name: {"any": 1} for name in HARMLESS} | {"tools": [{"type": "function"}], "user": "me"}
    off = {name: values[0] for name, values in NEUTRAL.items() if values}
    assert client.post(CHAT, json=chat(**harmless, **off)).json()["choices"] == plain
    assert client.post(CHAT, json=chat(**dict.fromkeys([*HARMLESS, *NEUTRAL]))).json()["choices"] == plain


def test_every_field_of_openais_client_is_decided() -> None:
    """None is an unknown name: each is a field, harmless, or refused for what it asks."""
    openai = pytest.importorskip("openai")
    from openai.types import chat as chat_types, completion_create_params

    del openai
    for params, model in (
        (chat_types.completion_create_params.CompletionCreateParamsBase, ChatRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    ):
        names = set(get_type_hints(params))
        assert len(names) > 15
        assert not {name for name in names if name not in {*model.model_fields, *HARMLESS, *NEUTRAL}}
