"""/v1/responses with OpenAI's client: whole, streamed, parsed; items of earlier turns; what is refused by name."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import Live
from pydantic import BaseModel
from serve_helpers import CHAT, TOKENIZER, app_of, slow

from nanochat.serve import routes_responses
from nanochat.serve.api import Settings

openai = pytest.importorskip("openai")

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(app_of(Settings(request_seconds=90, drain_seconds=2))) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=90) as made:
        yield made


def ask(client: Any, **changes: Any) -> Any:
    return client.responses.create(
        **{"model": "nanochat", "input": "hi", "max_output_tokens": 20, "extra_body": {"seed": 7}, **changes}
    )


def chat_text(client: Any, messages: Any) -> str:
    answer = client.chat.completions.create(model="nanochat", messages=messages, max_tokens=20, seed=7)
    return answer.choices[0].message.content


def prompt_of(live: Live, path: str, body: Any) -> str:
    """The text of the prompt that a request becomes."""
    seen: list[str] = []
    pool = live.api.pool
    submit = pool.submit

    def watched(request: Any, *args: Any, **more: Any) -> Any:
        seen.append(TOKENIZER.decode(request.prompt))
        return submit(request, *args, **more)

    pool.submit = watched
    try:
        response = httpx.post(live.url + path, json={**body, "seed": 7}, timeout=90)
        assert response.status_code == 200, response.text
    finally:
        del pool.submit
    return seen[0]


def test_a_response_is_the_chat_s_answer(client: Any) -> None:
    whole = ask(client, temperature=0.5)
    assert whole.object == "response" and whole.id.startswith("resp_") and whole.temperature == 0.5
    assert whole.output[0].role == "assistant" and whole.output_text
    assert ask(client).output_text == chat_text(client, HI)
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert whole.usage.input_tokens_details.cached_tokens >= 0
    assert whole.usage.output_tokens_details.reasoning_tokens == 0
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 20)
    assert whole.incomplete_details.reason == "max_output_tokens"


def test_a_complete_response(client: Any) -> None:
    letter = next(c for c in ask(client).output_text[2:] if c.isalnum())
    whole = ask(client, extra_body={"seed": 7, "stop": letter})
    assert whole.status == "completed" and whole.incomplete_details is None and whole.output[0].status == "completed"


def test_the_events_of_a_stream(client: Any, live: Live) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    last = events[-1].response
    assert last.usage == whole.usage and last.output_text == whole.output_text and last.id == events[0].response.id
    assert {getattr(event, "item_id", last.output[0].id) for event in events} == {last.output[0].id}
    body = {"input": "hi", "max_output_tokens": 3, "stream": True}
    for block in httpx.post(f"{live.url}/v1/responses", json=body, timeout=90).text.strip().split("\n\n"):
        name, data = block.split("\n")  # clients read either
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_the_client_s_own_stream(client: Any) -> None:
    with client.responses.stream(model="nanochat", input="hi", max_output_tokens=20, extra_body={"seed": 7}) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == ask(client).output_text


class Answer(BaseModel):
    yes: bool


def test_parsed(client: Any) -> None:
    parsed = client.responses.parse(model="nanochat", input="hi", text_format=Answer, temperature=0)
    assert isinstance(parsed.output_parsed, Answer) and parsed.status == "completed"
    schema = {"type": "json_schema", "name": "n", "schema": {"enum": [17]}, "strict": True}
    assert ask(client, text={"format": schema}).output_text == "17"
    assert json.loads(ask(client, text={"format": {**schema, "schema": {"const": []}}}).output_text) == []
    assert ask(client, text={"format": {"type": "text"}, "verbosity": "low"}).output_text == ask(client).output_text


def test_log_probabilities(client: Any) -> None:
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    content = ask(client, include=include, top_logprobs=2).output[0].content[0].logprobs
    assert len(content) == 20 and all(len(token.top_logprobs) == 2 for token in content)
    streamed = [
        token
        for event in ask(client, include=include, top_logprobs=2, stream=True)
        if event.type == "response.output_text.delta"
        for token in event.logprobs
    ]
    assert [token.logprob for token in streamed] == [token.logprob for token in content]
    assert ask(client).output[0].content[0].logprobs == []


def test_items_are_the_messages_of_a_chat(live: Live, client: Any) -> None:
    first = ask(client)
    items = [
        {"type": "message", "role": "developer", "content": "Brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        json.loads(first.output[0].model_dump_json()),
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}', "status": "completed"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "2", "output": "two"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "one"}]},
        {"role": "user", "content": "c"},
    ]
    calls = [
        {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "2", "function": {"name": "g", "arguments": "{}"}},
    ]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "system", "content": "Brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": first.output_text, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "user", "content": "c"},
    ]
    body = {"input": items, "instructions": "Be kind.", "max_output_tokens": 1}
    assert prompt_of(live, "/v1/responses", body) == prompt_of(live, CHAT, {"messages": messages, "max_tokens": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_s_id_stands_for_its_text(
    live: Live, client: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The AI SDK sends it, except with `store: false`."""

    def answer(**changes: Any) -> Any:
        made = ask(client, stream=stream, **changes)
        return list(made)[-1].response if stream else made

    def then(first: Any) -> Any:
        return {"input": [MESSAGE, first, {"role": "user", "content": "c"}], "max_output_tokens": 1}

    first = answer()
    reference = {"type": "item_reference", "id": first.output[0].id}
    by_text = prompt_of(live, "/v1/responses", then({"role": "assistant", "content": first.output_text}))
    assert prompt_of(live, "/v1/responses", then(reference)) == by_text
    unknown = [{"type": "item_reference", "id": answer(store=False).output[0].id}]
    monkeypatch.setattr(routes_responses, "MAX_RECENT", 1)
    answer()
    for item in (reference, *unknown):
        refused = httpx.post(f"{live.url}/v1/responses", json=then(item), timeout=90)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "input.1"


MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"top_logprobs": 5}, "top_logprobs", "include"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", ""),
        ({"background": True}, "background", ""),
        ({"conversation": "conv_1"}, "conversation", ""),
        ({"prompt": {"id": "p"}}, "prompt", ""),
        ({"tool_choice": "required"}, "tool_choice", ""),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", ""),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"messages": [MESSAGE]}, "messages", "input"),
        ({"input": [{**MESSAGE, "images": ["x"]}]}, "input.0.images", "user"),
        ({"n": 2}, "n", ""),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", ""),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}}, "text.format", ""),
        ({"input": []}, "input", ""),
        ({"input": [{"type": "reasoning", "id": "r"}]}, "input", ""),
        ({"input": [MESSAGE, {"type": "item_reference", "id": "msg_1"}]}, "input.1", "store"),
        ({"input": [MESSAGE, {"role": "user", "content": [{"type": "input_image"}]}]}, "input", "text only"),
        ({"input": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, "input.0", "text"),
        (
            {"input": [MESSAGE, {"type": "function_call_output", "output": [{"type": "python", "text": "1"}]}]},
            "input.1",
            "",
        ),
        ({"input": [{"type": "message", "role": "user"}]}, "input.0", "content"),
        ({"input": [MESSAGE, {"type": "function_call", "call_id": "1"}]}, "input.1", "name"),
        ({"instructions": "x", "input": [MESSAGE, {"role": "assistant", "content": "y"}]}, "input.1", "continue"),
        ({"input": [MESSAGE, {"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input.1", "call"),
        ({"input": "x" * 5000}, "input", "maximum context length"),
    ],
)
def test_what_is_refused(live: Live, changes: Any, param: str, part: str) -> None:
    response = httpx.post(f"{live.url}/v1/responses", json={"input": "hi", **changes}, timeout=90)
    error = response.json()["error"]
    assert response.status_code == 400 and part in error["message"], error
    assert (error["param"] or "").startswith(param), error


def test_what_is_tolerated(client: Any) -> None:
    tolerated = ask(
        client,
        store=True,
        metadata={"a": "b"},
        parallel_tool_calls=False,
        reasoning={"effort": "low"},
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        tool_choice="auto",
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        service_tier="auto",
        user="me",
        truncation="auto",
    )
    assert tolerated.output_text == ask(client).output_text


def test_a_request_of_codex(live: Live) -> None:
    body = {
        "model": "nanochat",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: none."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<env/>"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "tools": [{"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0",
        "text": {"verbosity": "medium"},
        "client_metadata": {"session": "0"},
    }
    with httpx.stream("POST", f"{live.url}/v1/responses", json=body, timeout=90) as response:
        events = [line.removeprefix("event: ") for line in response.iter_lines() if line.startswith("event: ")]
    assert events[0] == "response.created" and events[-1] in ("response.completed", "response.incomplete")


def test_truncation(live: Live) -> None:
    """What has no room is dropped, and said, unless the request forbids it."""
    turns = [{"role": role, "content": "x" * 100} for _ in range(20) for role in ("user", "assistant")]
    body = {"input": [*turns, MESSAGE], "max_output_tokens": 2}
    response = httpx.post(f"{live.url}/v1/responses", json=body, timeout=90)
    assert response.json()["usage"]["dropped_messages"] > 0 and "x-nanochat-dropped-messages" in response.headers
    refused = httpx.post(f"{live.url}/v1/responses", json={**body, "truncation": "disabled"}, timeout=90)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"


def test_nothing_is_stored(client: Any) -> None:
    made = ask(client)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="not stored"):
            list(call(made.id))


def test_a_stream_that_fails(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    service = slow(live, monkeypatch, 0.0)
    step, left = service.batch.step, [4]

    def explode(**settings: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("boom")
        return step(**settings)

    monkeypatch.setattr(service.batch, "step", explode)
    body = {"input": "hi", "stream": True, "seed": 7}
    lines = httpx.post(f"{live.url}/v1/responses", json=body, timeout=90).text.strip().split("\n")
    last = json.loads(lines[-1].removeprefix("data: "))
    assert lines[-2] == "event: response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"] and "boom" not in lines[-1]
    capsys.readouterr()
