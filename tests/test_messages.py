"""What clients send as a chat: roles, tool messages, prefills, long conversations, limits and errors."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engine_helpers import make_model
from fastapi.testclient import TestClient
from serve_helpers import CHAT, MODEL as SMALL, TOKENIZER, app_of, chat, events
from stubs import OUTPUT_END, PYTHON, PYTHON_END, START, Scripted, chain

from nanochat.engine import Engine
from nanochat.inference.chat_prompt import answer_reserve
from nanochat.serve.api import Settings
from nanochat.serve.server import create_app
from nanochat.serve.service import Service, WorkerPool

CONTEXT = 512
MODEL = make_model(vocab_size=265, sequence_len=CONTEXT)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": None}


def client_of(model: Any = MODEL, **settings: Any) -> TestClient:
    return TestClient(create_app(WorkerPool(lambda index: Service(model, TOKENIZER)), TOKENIZER, Settings(**settings)))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with client_of() as made:
        yield made


def user(content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def prompt_of(client: TestClient, *messages: dict[str, Any], **more: Any) -> str:
    """The prompt's text, short: <user_start> and so on. The answer reports as many tokens."""
    response = client.post("/tokenize", json={"messages": messages, **more})
    assert response.status_code == 200, response.text
    answer = client.post(CHAT, json={"messages": messages, "max_tokens": 1, **more}).json()
    assert answer["usage"]["prompt_tokens"] == response.json()["count"]
    return TOKENIZER.decode(response.json()["tokens"]).replace("<|", "<").replace("|>", ">")


def error_of(client: TestClient, body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


# ---------------------------------------------------------------------------------------------------
# The prompt comes first, the answer gets the rest


@pytest.mark.parametrize("limit", [None, -1, 1, 57, 58, 59, 4096, 32_000, 10**9, 10**30])
def test_max_tokens_is_clamped_to_the_room(limit: int | None) -> None:
    prompt = [256, 257, *b"hi", 258, START]
    room = 64 - len(prompt)
    allowed = room if limit in (None, -1) else min(room, limit)  # type: ignore[type-var]
    (expected,), _ = Engine(SMALL, TOKENIZER).generate_batch(prompt, max_tokens=allowed, temperature=0.0)
    assert len(expected) - len(prompt) == allowed, "if the model ended by itself, this test would show nothing"
    with TestClient(app_of()) as client:
        for field in ("max_tokens", "max_completion_tokens"):
            body = chat(**{**GREEDY, field: limit})
            whole = client.post(CHAT, json=body).json()
            assert whole["choices"][0]["finish_reason"] == "length"
            assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (len(prompt), allowed)
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            *chunks, last, _ = events(client.post(CHAT, json=body))
            assert chunks[-1]["choices"][0]["finish_reason"] == "length" and last["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("limit", "made"), [(None, 32), (-1, 60 + 62), (0, 0), (60, 120), (61, 121), (62, 122), (63, 122), (10**9, 122)]
)
def test_completions_are_clamped_too(limit: int | None, made: int) -> None:
    with TestClient(app_of()) as client:
        body = {"prompt": ["abc", "b"], "max_tokens": limit, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
        assert answer["usage"]["completion_tokens"] == made


def test_the_smaller_of_two_limits_holds(client: TestClient) -> None:
    for first, second in ((3, 5), (5, 3)):
        answer = client.post(CHAT, json=chat(temperature=0, max_tokens=first, max_completion_tokens=second)).json()
        assert answer["usage"]["completion_tokens"] == 3


def test_the_operators_limit_clamps() -> None:
    with client_of(max_tokens=5) as client:
        for limit, made in ((None, 5), (-1, 5), (3, 3), (10**9, 5)):
            choice = client.post(CHAT, json=chat(temperature=0, max_tokens=limit)).json()
            assert choice["usage"]["completion_tokens"] == made and choice["choices"][0]["finish_reason"] == "length"
        answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 100, "temperature": 0}).json()
        assert answer["usage"]["completion_tokens"] == 5


LONG = [user("x" * 200), assistant("y" * 150), user("z" * 48)]  # 406 tokens


def test_a_long_chat_is_kept_whole(client: TestClient) -> None:
    response = client.post(CHAT, json=chat(messages=LONG, **GREEDY))
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["total_tokens"], usage["dropped_messages"]) == (406, CONTEXT, 0)
    assert "x-nanochat-dropped-messages" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
def test_dropped_messages_are_reported(client: TestClient, stream: bool) -> None:
    """The answer is the one to the remaining messages; what counts is the client's messages, not the turns."""
    calls = [{"id": "a", "type": "function", "function": {"name": "python", "arguments": '{"code": "1+1"}'}}]
    tool = [assistant(None, tool_calls=calls), {"role": "tool", "tool_call_id": "a", "content": "2"}, assistant("2")]
    dropped = [user("1+1?"), user("please"), *tool, user("x" * 50), assistant("y" * 80)]
    kept = [user("again"), *LONG[1:], system("S")]
    assert CONTEXT - answer_reserve(CONTEXT) == 448
    body = {"stream": stream, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 5}
    response = client.post(CHAT, json=chat(messages=[*dropped, user("x" * 150), assistant("y"), *kept], **body))
    alone = client.post(CHAT, json=chat(messages=[user("x" * 150), assistant("y"), *kept], **body))
    assert response.headers["x-nanochat-dropped-messages"] == "7"
    found, expected = (
        ([e.get("choices") for e in events(r)[:-1]], events(r)[-2]["usage"])
        if stream
        else (r.json()["choices"], r.json()["usage"])
        for r in (response, alone)
    )
    assert found[0] == expected[0] and found[1]["prompt_tokens"] == expected[1]["prompt_tokens"]
    assert (found[1]["dropped_messages"], expected[1]["dropped_messages"]) == (7, 0)


def test_a_chat_may_have_very_many_messages(client: TestClient) -> None:
    turns = [message for number in range(999) for message in (user(f"{number}?"), assistant("x"))]
    response = client.post(CHAT, json=chat(messages=[*turns, user("last?")]))
    usage = response.json()["usage"]
    assert (
        usage["prompt_tokens"] + answer_reserve(CONTEXT)
        <= CONTEXT
        < usage["prompt_tokens"] + answer_reserve(CONTEXT) + 9
    )
    assert response.headers["x-nanochat-dropped-messages"] == str(usage["dropped_messages"])
    assert error_of(client, chat(messages=[*turns, *turns, user("last?")]))["param"] == "messages"


def test_what_leaves_no_room_is_refused_as_clients_expect(client: TestClient) -> None:
    last = client.post(CHAT, json=chat(messages=[user("x" * (CONTEXT - 5))], **GREEDY)).json()
    assert last["usage"]["completion_tokens"] == 1 and last["choices"][0]["finish_reason"] == "length"
    for path, body in (
        (CHAT, {"messages": [user("x" * (CONTEXT - 4))]}),
        (CHAT, {"messages": [system("x" * CONTEXT), user("a")]}),
        ("/v1/completions", {"prompt": "x" * CONTEXT}),
        ("/v1/completions", {"prompt": [[97], [97] * CONTEXT]}),
    ):
        error = error_of(client, body, path)
        assert error["code"] == "context_length_exceeded" and error["param"] in ("messages", "prompt")
        assert f"this model's maximum context length is {CONTEXT} tokens" in error["message"]  # litellm reads this,
        assert "prompt is too long" in error["message"]  # and LangChain this


def test_a_base_model_reports_the_messages_that_it_does_not_see() -> None:
    with client_of(chat_model=False) as client:
        response = client.post(CHAT, json=chat(messages=[system("S"), user("a"), assistant("b"), user("Once")]))
        assert response.json()["usage"]["prompt_tokens"] == 5
        assert response.headers["x-nanochat-dropped-messages"] == "3"
        error = error_of(client, chat(messages=[user("x" * CONTEXT)]))
        assert error["code"] == "context_length_exceeded"


# ---------------------------------------------------------------------------------------------------
# Usage


def test_usage_is_the_same_whatever_the_other_fields() -> None:
    """A model that answers `ok` and ends: the end token does not count, not even where its log probability is sent."""
    with client_of(Scripted(chain(START, "ok"))) as client:
        found = []
        for extra in ({}, {"logprobs": True, "top_logprobs": 2}, {"seed": 3}, {"max_tokens": 10**6}, {"stop": ["zz"]}):
            found.append(client.post(CHAT, json={"messages": [user()], **extra}).json()["usage"])
        prompt = [256, 257, *b"hi", 258, START]
        for extra in ({}, {"logprobs": 2}, {"echo": True, "logprobs": 0}, {"echo": True}):
            found.append(client.post("/v1/completions", json={"prompt": prompt, **extra}).json()["usage"])
        assert found == [found[0]] * len(found) and found[0]["completion_tokens"] == 2


def test_cached_tokens_are_reported(client: TestClient) -> None:
    body = chat(messages=[user("c" * 300)], max_tokens=2)
    found = [client.post(CHAT, json=body).json() for _ in range(2)]
    assert [f["usage"]["prompt_tokens_details"]["cached_tokens"] for f in found] == [0, 256]
    assert found[0]["choices"] == found[1]["choices"]
    streamed = events(
        client.post(CHAT, json={**body, "n": 2, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert streamed[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 256}
    prompts = {"prompt": ["d" * 300, "d" * 300, "e"], "max_tokens": 1}
    assert client.post("/v1/completions", json=prompts).json()["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 256
    }


# ---------------------------------------------------------------------------------------------------
# Roles


def test_roles_in_any_order(client: TestClient) -> None:
    assert prompt_of(client, user("a"), user("b")) == "<bos><user_start>a\n\nb<user_end><assistant_start>"
    assert (
        prompt_of(client, system("S"), user("a"), assistant("b"), assistant("c"), system("T", "developer"), user("d"))
        == "<bos><user_start>S\n\nT\n\na<user_end><assistant_start>b\n\nc<assistant_end>"
        "<user_start>d<user_end><assistant_start>"
    )
    for nothing in (assistant(""), assistant(None), assistant([]), {"role": "assistant"}):
        assert prompt_of(client, user("a"), nothing, user("b")) == prompt_of(client, user("a"), user("b"))
        assert prompt_of(client, user("a"), nothing) == prompt_of(client, user("a"))
    assert (
        prompt_of(client, assistant("Hello"), user("a"))
        == "<bos><user_start><user_end><assistant_start>Hello<assistant_end><user_start>a<user_end><assistant_start>"
    )
    assert prompt_of(client, system("S")) == "<bos><user_start>S\n\n<user_end><assistant_start>"


def test_text_parts_refusals_and_names(client: TestClient) -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert prompt_of(client, system(parts), user(parts)) == prompt_of(client, system("ab"), user("ab"))
    refused = [assistant(None, refusal="No."), assistant([{"type": "refusal", "refusal": "No."}])]
    for message in refused:
        assert prompt_of(client, user("a"), message, user("b")) == prompt_of(
            client, user("a"), assistant("No."), user("b")
        )
    assert prompt_of(client, user("a", name="Ann")) == prompt_of(client, user("a"))
    two = [user("a", name="Ann"), user("b", name="Bob"), user("c")]
    assert prompt_of(client, *two) == prompt_of(client, user("Ann: a\n\nBob: b\n\nc"))


def call(name: str, arguments: Any, id: str = "x") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def output(content: Any, id: str | None = "x") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


@pytest.mark.parametrize(
    ("name", "arguments", "written"),
    [
        ("calculator", '{"expression": "12*3"}', "12*3"),
        ("python", '{"code": "print(1)"}', "print(1)"),
        ("python", "print(1)", "print(1)"),
        ("get_weather", '{"city": "Paris", "days": 2}', "get_weather(city='Paris', days=2)"),
        ("get_weather", {"city": "Paris"}, "get_weather(city='Paris')"),
        ("now", "{}", "now()"),
        ("now", "", "now()"),
        ("f", "[1]", "f([1])"),
        ("f", "{broken", "f({broken)"),
        ("f", "[" * 100_000, None),
    ],
)
def test_tool_messages_are_the_output_after_the_call(
    client: TestClient, name: str, arguments: Any, written: str
) -> None:
    messages = [user("q"), assistant(None, tool_calls=[call(name, arguments)]), output("36")]
    if written is None:
        assert error_of(client, chat(messages=messages))["code"] == "context_length_exceeded"
        return
    start = (
        f"<bos><user_start>q<user_end><assistant_start><python_start>{written}<python_end><output_start>36<output_end>"
    )
    assert prompt_of(client, *messages) == start, "the answer goes on after the output"
    more = [assistant("So 36."), user("ok")]
    assert (
        prompt_of(client, *messages, *more) == start + "So 36.<assistant_end><user_start>ok<user_end><assistant_start>"
    )


def test_the_models_own_parts_are_taken_as_they_are(client: TestClient) -> None:
    own = [
        {"type": t, "text": x} for t, x in (("text", "So "), ("python", "2+2"), ("python_output", "4"), ("text", "!"))
    ]
    assert prompt_of(client, user("q"), assistant(own), user("ok")) == (
        "<bos><user_start>q<user_end><assistant_start>So <python_start>2+2<python_end><output_start>4<output_end>!"
        "<assistant_end><user_start>ok<user_end><assistant_start>"
    )
    assert prompt_of(client, user("q"), assistant(own[:2], tool_calls=[call("python", "3")]), output("3")) == (
        "<bos><user_start>q<user_end><assistant_start>So <python_start>2+2<python_end>"
        "<python_start>3<python_end><output_start>3<output_end>"
    )
    error = error_of(client, chat(messages=[user(own)]))
    assert error["param"] == "messages.0" and "'user'" in error["message"]


def test_parallel_calls_and_the_old_form(client: TestClient) -> None:
    calls = [call("python", '{"code": "1"}', "a"), call("python", '{"code": "2"}', "b")]
    asked = [user("q"), assistant("Let me see.", tool_calls=calls)]
    expected = (
        "<bos><user_start>q<user_end><assistant_start>Let me see."
        "<python_start>1<python_end><output_start>one<output_end>"
        "<python_start>2<python_end><output_start>two<output_end>"
    )
    assert prompt_of(client, *asked, output("two", "b"), output("one", "a")) == expected
    assert prompt_of(client, *asked, output("one", None), output([{"type": "text", "text": "two"}], None)) == expected
    old = assistant(None, function_call={"name": "python", "arguments": '{"code": "1"}'})
    assert prompt_of(client, user("q"), old, {"role": "function", "name": "python", "content": "one"}) == prompt_of(
        client, user("q"), assistant(None, tool_calls=calls[:1]), output("one", "a")
    )
    assert "<output_start><output_end>" in prompt_of(client, *asked, output(None, "a"), output("", "b"))


def calling() -> Scripted:
    """A model that answers `say 12*3 = 36 fine`, with a call of the calculator."""
    return Scripted(chain(START, "say ", PYTHON, "12*3", PYTHON_END) | chain(OUTPUT_END, "fine"))


def test_tool_output_continues_the_answer() -> None:
    """The same text whether the server's calculator or the client answers the call."""
    model = calling()
    with client_of(model) as client:
        whole = client.post(CHAT, json=chat(temperature=0, max_tokens=None)).json()["choices"][0]["message"]
        assert whole["content"] == "say fine" and [t["text"] for t in whole["tools"]] == ["12*3", "36"]
        messages = [
            user(),
            assistant("say ", tool_calls=[call("calculator", '{"expression": "12*3"}')]),
            output("36"),
        ]
        rest = client.post(CHAT, json=chat(messages=messages, temperature=0)).json()["choices"][0]
        assert rest["message"]["content"] == "fine" and rest["finish_reason"] == "stop"


ASKED: list[dict[str, Any]] = [
    {"prefix": True},
    {"continue_final_message": True},
    {"continue_final_message": True, "add_generation_prompt": False},
    {"add_generation_prompt": False},
]


@pytest.mark.parametrize("asked", ASKED)
def test_a_prefilled_answer_is_continued(client: TestClient, asked: dict[str, Any]) -> None:
    ids = [256, 257, *b"hi", 258, START, *b"So far "]
    (expected,), _ = Engine(MODEL, TOKENIZER).generate_batch(ids, max_tokens=20, temperature=0.0)
    more = dict(asked)
    messages = [user(), assistant("So far ", prefix=more.pop("prefix", None))]
    body = chat(messages=messages, temperature=0, max_tokens=20, **more)
    whole = client.post(CHAT, json=body).json()
    assert whole["choices"][0]["message"]["content"] == TOKENIZER.decode(expected[len(ids) :])
    assert whole["usage"]["prompt_tokens"] == len(ids)
    stream = events(client.post(CHAT, json={**body, "stream": True}))
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in stream[:-1])
    assert text == whole["choices"][0]["message"]["content"]


def test_any_beginning_of_an_answer_is_completed_to_the_same() -> None:
    with client_of(Scripted(chain(START, "quick fox"))) as client:
        for cut in range(10):
            body = chat(messages=[user(), assistant("quick fox"[:cut])], continue_final_message=True, **GREEDY)
            choice = client.post(CHAT, json=body).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("quick fox"[cut:], "stop")


@pytest.mark.parametrize(
    ("messages", "more", "number", "role"),
    [
        ([user(), assistant("x")], {}, 1, "assistant"),
        ([user(), user()], {"continue_final_message": True}, 1, "user"),
        ([user()], {"add_generation_prompt": False}, 0, "user"),
        ([user(), assistant(None, tool_calls=[call("f", "")])], {}, 1, "assistant"),
        ([user(), output("x"), user()], {}, 1, "tool"),
        ([user(), assistant("a"), output("x")], {}, 2, "tool"),
        ([user(), assistant(None, tool_calls=[call("f", "", "a")]), output("x", "b")], {}, 2, "tool"),
        ([user(), assistant(None, tool_calls=[call("f", "")]), output("x"), output("x")], {}, 3, "tool"),
        ([user(), assistant(None, tool_calls=[call("f", "")]), user(), output("x")], {}, 3, "tool"),
        ([user(), {"role": "function", "name": "f", "content": "x"}], {}, 1, "function"),
        ([user(), {"role": "wizard", "content": "x"}], {}, 1, "wizard"),
        ([user(), assistant("a"), user(None)], {}, 2, "user"),
        ([{"role": "system"}, user()], {}, 0, "system"),
        ([user(), user(5)], {}, 1, "user"),
        ([user(), assistant("a", audio={"id": "x"}), user()], {}, 1, "assistant"),
        ([user(), {"role": "assistant", "contents": "a"}, user()], {}, 1, "assistant"),
        ([{**user(), "images": ["x"]}], {}, 0, "user"),
        ([user(), assistant(None, tool_calls=[call("f", "")]), {"role": "tool", "output": "x"}], {}, 2, "tool"),
        ([user(), assistant("a", tool_calls=[{"id": "a", "type": "function"}]), user()], {}, 1, "assistant"),
    ],
)
def test_errors_name_the_message_and_its_role(
    client: TestClient, messages: list[Any], more: dict[str, Any], number: int, role: str
) -> None:
    for path in (CHAT, "/tokenize"):
        error = error_of(client, {"messages": messages, **more}, path)
        assert error["param"].split(".")[:2] == ["messages", str(number)]
        assert error["message"].startswith(error["param"]) and repr(role) in error["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_other_than_text_is_refused_by_name(client: TestClient, kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,"}}]
    error = error_of(client, chat(messages=[system("S"), user(parts)]))
    assert kind in error["message"] and error["param"] == "messages.1.content" and "'user'" in error["message"]


def test_calls_count_against_the_length_of_messages(client: TestClient) -> None:
    messages = [user(), assistant(None, tool_calls=[call("f", "x" * 300_000)]), output("x")]
    assert error_of(client, chat(messages=messages))["param"] == "messages"


def test_answers_are_the_same_alone_together_and_cached(client: TestClient) -> None:
    """Every kind of prompt, asked one after the other, then again at the same time, streamed and whole."""
    calls = [call("python", '{"code": "1"}')]
    kinds: list[list[dict[str, Any]]] = [
        [user("a"), user("b"), system("S")],
        [user("q"), assistant(None, tool_calls=calls), output("1")],
        [user("q"), assistant("So ", prefix=True)],
        [user("x" * 300), assistant("y" * 100), user("z" * 60)],
        [system("c" * 300), user("d")],
    ]

    def ask(number: int) -> tuple[str, int]:
        body = chat(messages=kinds[number % 5], max_tokens=15, seed=number, stream=number % 10 >= 5)
        response = client.post(CHAT, json={**body, "stream_options": {"include_usage": True}})
        if not body["stream"]:
            answer = response.json()
            return answer["choices"][0]["message"]["content"], answer["usage"]["total_tokens"]
        *chunks, last, _ = events(response)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        return text, last["usage"]["total_tokens"]

    alone = [ask(number) for number in range(10)]
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(ask, [*range(10), *range(10)])) == alone * 2


# ---------------------------------------------------------------------------------------------------
# The published form, and clients whose base URL is not quite right


def test_published_form_has_the_answer_without_tool_calls() -> None:
    model = calling()
    with client_of(model) as client:
        body = {"messages": [user()], "temperature": 0, "max_tokens": 100, "top_k": 5}
        *tokens, end = events(client.post("/chat/completions", json=body))
        assert "".join(token["token"] for token in tokens) == "say fine" and end == {"done": True}
        for stream in (True, None):
            same = events(client.post("/chat/completions", json={**body, "stream": stream}))
            assert same == [*tokens, end]
        whole = client.post("/chat/completions", json={**body, "stream": False}).json()
        official = client.post(CHAT, json=body).json()
        assert whole["choices"] == official["choices"] and whole["usage"] == official["usage"]
        assert whole["object"] == "chat.completion" and whole["choices"][0]["message"]["content"] == "say fine"


@pytest.mark.parametrize("extra", [{"model": "nanochat"}, {"model": None}, {"n": 2}, {"stream_options": None}])
def test_openai_clients_without_v1_are_told(client: TestClient, extra: dict[str, Any]) -> None:
    for stream in (False, True):
        error = error_of(client, {"messages": [user()], "stream": stream, **extra}, "/chat/completions")
        assert "/v1/chat/completions" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/completions", "/v1/completions"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/models/nanochat", "/v1/models/nanochat"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("GET", "/v1/v1/models", "/v1/models"),
        ("POST", "/openai/v1/completions", "/v1/completions"),
        ("POST", "/v1/tokenize", "/tokenize"),
    ],
)
def test_wrong_paths_name_the_right_one(client: TestClient, method: str, path: str, meant: str) -> None:
    response = client.request(method, path, json={})
    error = response.json()["error"]
    assert response.status_code == 404 and error["code"] == "unknown_path" and f" {meant} " in error["message"]
    assert path in error["message"]


def test_models_with_a_trailing_slash_are_listed(client: TestClient) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    assert client.get("/v1/models/").json()["object"] == "list"
    assert json.dumps(client.get("/openapi.json").json()).count('"/v1/models/"') == 0
