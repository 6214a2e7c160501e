"""The HTTP API against a tiny model: shapes, streams, errors, limits."""

import asyncio
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from live import until
from serve_helpers import MODEL, SETTINGS, TOKENIZER, app_of, chat, events
from stubs import SPECIAL

from nanochat.engine import Engine
from nanochat.inference.sampling import SamplingParams
from nanochat.serve import api, routes_completions
from nanochat.serve.answers import json_pieces
from nanochat.serve.api import GAUGES, LoopBudget, Settings
from nanochat.serve.routes_completions import TextOffsets
from nanochat.serve.server import create_app
from nanochat.serve.service import Service, WorkerPool
from scripts import chat_web


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(app_of()) as made:
        yield made


# ---------------------------------------------------------------------------------------------------
# Chat


def test_chat_answers_as_the_engine(client: TestClient) -> None:
    body = client.post("/v1/chat/completions", json=chat()).json()
    prompt = TOKENIZER.render_for_completion(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}
    )
    expected, _ = Engine(MODEL, TOKENIZER).generate_batch(prompt, 1, max_tokens=8, temperature=1.0, top_k=50, seed=7)
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    own = [i for i in expected[0][len(prompt) :] if i < 256]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["content"] == bytes(own).decode(errors="replace") or choice["message"].get("tools")
    made = len(expected[0]) - len(prompt)
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": made,
        "total_tokens": len(prompt) + made,
        "prompt_tokens_details": {"cached_tokens": 0},
        "dropped_messages": 0,
    }


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["a", "e"]}])
def test_streamed_chat_equals_whole(client: TestClient, extra: dict[str, Any]) -> None:
    request = chat(max_tokens=30, **extra)
    whole = client.post("/v1/chat/completions", json=request).json()
    stream = events(
        client.post("/v1/chat/completions", json={**request, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert 0 <= stream[-2]["timings"]["answer_seconds"] < 60
    assert stream[-1] == "[DONE]" and stream[-2]["choices"] == [] and stream[-2]["usage"] == whole["usage"]
    chunks = stream[:-2]
    assert all(c["usage"] is None and c["object"] == "chat.completion.chunk" for c in chunks)
    assert len({c["id"] for c in chunks}) == 1
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own][-1] == choice["finish_reason"]
        assert all(c["finish_reason"] is None for c in own[:-1])
        logprobs = [t for c in own if c["logprobs"] for t in c["logprobs"]["content"]]
        assert logprobs == (choice["logprobs"]["content"] if choice["logprobs"] else [])
    if "stop" in extra:
        assert not set("ae") & set(whole["choices"][0]["message"]["content"])
    if "n" in extra:
        assert len({c["message"]["content"] for c in whole["choices"]}) == 3
    if "logprobs" in extra:
        content = whole["choices"][0]["logprobs"]["content"]
        assert content and all(t["logprob"] <= 0 and len(t["top_logprobs"]) == 2 for t in content)
        assert bytes(b for t in content for b in t["bytes"]).decode(errors="replace")


def test_seed_determines_the_answer(client: TestClient) -> None:
    def said(**changes: Any) -> str:
        body = client.post("/v1/chat/completions", json=chat(max_tokens=40, **changes)).json()
        return body["choices"][0]["message"]["content"]

    assert said() == said() != said(seed=8)
    assert said(temperature=0) == said(temperature=0, seed=99)


def test_oldest_turns_are_dropped(client: TestClient) -> None:
    turns = [{"role": role, "content": "x" * 9} for _ in range(30) for role in ("user", "assistant")]
    body = client.post("/v1/chat/completions", json=chat(messages=[*turns, {"role": "user", "content": "and?"}])).json()
    assert body["choices"][0]["message"] and body["usage"]["prompt_tokens"] < 64
    error = client.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "x" * 99}]))
    assert error.status_code == 400 and error.json()["error"]["param"] == "messages"


def test_published_form(client: TestClient) -> None:
    stream = events(
        client.post(
            "/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0, "top_k": 5},
        )
    )
    assert stream[-1] == {"done": True} and all(set(e) == {"token", "gpu"} for e in stream[:-1])


# ---------------------------------------------------------------------------------------------------
# Completions, as evaluation harnesses send them


def test_echoed_prompts_with_log_probabilities(client: TestClient) -> None:
    """Compared with a plain forward pass; evaluation harnesses sum these up."""
    text = "hello"
    body = client.post("/v1/completions", json={"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}).json()
    logprobs = body["choices"][0]["logprobs"]
    ids = [256, *text.encode()]
    table = MODEL(torch.tensor([ids]))[0].detach().log_softmax(-1)
    expected = [float(table[i, ids[i + 1]]) for i in range(len(text))]
    assert body["choices"][0]["text"] == text and logprobs["tokens"] == list(text)
    assert logprobs["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4] and body["usage"]["completion_tokens"] == 0
    for i, best in enumerate(logprobs["top_logprobs"]):
        assert max(best.values()) == pytest.approx(float(table[i].max()), abs=1e-4)
    longer = client.post(
        "/v1/completions", json={"prompt": text, "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0}
    ).json()["choices"][0]
    assert longer["text"].startswith(text) and len(longer["logprobs"]["tokens"]) in (6, 7, 8)
    assert longer["logprobs"]["token_logprobs"][:5] == pytest.approx(expected, abs=1e-4)


def test_text_offsets_of_multi_token_characters() -> None:
    ids = [*"é日x".encode()]  # a token a byte
    offsets = TextOffsets(TOKENIZER)
    offsets.of(b"before\xc3")  # a text that ends within a character
    offsets.end_character()
    assert offsets.of(ids[:4]) + offsets.of(ids[4:]) == [7, 7, 8, 8, 8, 9]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens": 0},
        {"n": 2, "prompt": ["héllo", "x" * 40]},
        {"logprobs": None},
        {"prompt": [[97, 0xC3], [98]]},
    ],
)
def test_streamed_completions_equal_whole(
    client: TestClient, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_completions, "ECHO_TOKENS", 3)
    request = {"prompt": "héllo", "max_tokens": 12, "echo": True, "logprobs": 2, "seed": 3, **changes}
    whole = client.post("/v1/completions", json=request).json()
    stream = events(client.post("/v1/completions", json={**request, "stream": True}))
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in stream[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [c["logprobs"] for c in own if c["logprobs"]]
        if choice["logprobs"] is None:
            assert not logprobs
        else:
            assert {key: [one for part in logprobs for one in part[key]] for key in logprobs[0]} == choice["logprobs"]
            places = choice["logprobs"]["text_offset"]
            assert places == sorted(places) and all(
                choice["text"][place] == token
                for place, token in zip(places, choice["logprobs"]["tokens"])
                if token.isascii() and len(token) == 1
            )


@pytest.mark.parametrize("prompt", ["abc", ["abc", "b"], [97, 98, 99], [[97, 98, 99], [98]], [256, 97, 98, 99]])
def test_every_form_of_prompt(client: TestClient, prompt: Any) -> None:
    request = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "n": 2}
    body = client.post("/v1/completions", json=request).json()
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [c["index"] for c in body["choices"]] == list(range(2 * count))
    first, _ = Engine(MODEL, TOKENIZER).generate_batch([256, 97, 98, 99], 1, max_tokens=5, temperature=0.0)
    assert body["choices"][0]["text"] == TOKENIZER.decode(first[0][4:]) == body["choices"][1]["text"]
    stream = events(client.post("/v1/completions", json={**request, "stream": True}))
    for choice in body["choices"]:
        own = [e["choices"][0] for e in stream[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


# ---------------------------------------------------------------------------------------------------
# The other routes


def test_models_tokenizer_health_stats_metrics(client: TestClient) -> None:
    assert client.post("/v1/chat/completions", json=chat()).status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "nanochat" and model["max_context"] == 64
    tokens = client.post("/tokenize", json={"text": "héllo <|bos|>"}).json()
    assert (
        tokens["count"] == len(tokens["tokens"]) == 14 and 256 not in tokens["tokens"]
    )  # text that spells <|bos|> is not the token
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["text"] == "héllo <|bos|>"
    rendered = client.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()["tokens"]
    assert rendered == [256, SPECIAL["<|user_start|>"], 97, SPECIAL["<|user_end|>"], SPECIAL["<|assistant_start|>"]]
    assert [client.get(p).status_code for p in ("/health", "/health/live", "/health/ready")] == [200] * 3
    assert [client.head(p).status_code for p in ("/", "/health", "/v1/models", "/nowhere")] == [200, 200, 200, 404]
    stats = client.get("/stats").json()
    assert stats["replicas"][0]["alive"] and stats["tokens"] > 0 and stats["requests_under_way"] == 0
    text = client.get("/metrics").text
    assert 'nanochat_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "nanochat_first_token_seconds_bucket" in text
    for name, (_, key) in GAUGES.items():
        assert f"nanochat_{name} {float(stats[key])}\n" in text


def test_files_of_the_page(client: TestClient) -> None:
    """All that the page loads is there, with a type that browsers accept, allowed by its policy, and can be cached."""
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert "<script>" not in page.text and "<style" not in page.text and " style=" not in page.text
    loaded = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    seen = set()
    while loaded:
        if (name := loaded.pop()) in seen:
            continue
        seen.add(name)
        file = client.get(f"/{name}")
        assert file.status_code == 200 and file.headers["content-security-policy"] == policy
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert file.headers["content-type"] == f"{kind}; charset=utf-8"
        if "/vendor/" not in name:
            loaded += [f"page/{other}" for other in re.findall(r'from "\./([^"]+)"', file.text)]
        known = client.get(f"/{name}", headers={"If-None-Match": f"W/{file.headers['etag']}"})
        assert known.status_code == 304 and not known.content and known.headers["etag"] == file.headers["etag"]
        assert client.get(f"/{name}", headers={"If-None-Match": '"other"'}).status_code == 200
        assert client.head(f"/{name}").headers["content-length"] == str(len(file.content))
    assert "page/main.js" in seen and "page/storage.js" in seen
    for path in ("/page/", "/page/nothing.js", "/page/../ui.html", "/page/%2e%2e/common.py", "/page/vendor"):
        assert client.get(path).status_code == 404


def test_models_have_a_card_and_defaults() -> None:
    meta = {"step": 7, "progress": {"tokens": 4096, "val_bpb": 0.5}}
    card = chat_web.model_card("sft", MODEL, TOKENIZER, meta)
    assert card["step"] == 7 and card["tokens"] == 4096 and card["val_bpb"] == 0.5 and card["stage"] == "sft"
    assert card["layers"] == MODEL.config.n_layer and card["vocab_size"] == TOKENIZER.get_vocab_size()
    assert card["parameters"] == sum(p.numel() for p in MODEL.parameters())
    settings = Settings(sampling=SamplingParams(0.3, 9), max_tokens=4, chat_model=False, card=card)
    with TestClient(app_of(settings)) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert client.get(f"/v1/models/{model['id']}").json() == model
    assert model["card"] == card and model["answers"] is False
    defaults = {"temperature": 0.3, "top_k": 9, "top_p": None, "min_p": 0.0, "max_tokens": 4}
    assert model["defaults"] == defaults


def test_security_headers(client: TestClient) -> None:
    for path in ("/v1/models", "/nowhere"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in headers


# ---------------------------------------------------------------------------------------------------
# Errors and limits


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("chat/completions", chat(temperature=-1), "temperature"),
        ("chat/completions", chat(temperature="hot"), "temperature"),
        ("chat/completions", chat(top_p=-0.1), "top_p"),
        ("chat/completions", chat(top_p=1.5), "top_p"),
        ("chat/completions", chat(n=0), "n"),
        ("chat/completions", chat(n=1000), "n"),
        ("chat/completions", chat(max_tokens=0), "max_tokens"),
        ("chat/completions", chat(max_tokens=-2), "max_tokens"),
        ("chat/completions", chat(continue_final_message=True, add_generation_prompt=True), None),
        ("chat/completions", chat(stop=[""]), "stop.0"),
        ("chat/completions", chat(stop=list("abcdefghi")), "stop"),
        ("chat/completions", chat(top_logprobs=21), "top_logprobs"),
        ("chat/completions", chat(presence_penalty=3), "presence_penalty"),
        ("chat/completions", chat(seed=2**70), "seed"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [999]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": "x" * 64}, "prompt"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "x", "n": 2, "best_of": 3}, "best_of"),
        ("chat/completions", chat(max_completion_tokens=0), "max_completion_tokens"),
        ("completions", {"prompt": "x", "max_tokens": -2}, "max_tokens"),
    ],
)
def test_errors_name_the_field(client: TestClient, path: str, body: dict[str, Any], param: str | None) -> None:
    response = client.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param or error["param"].startswith(f"{param}."), error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff\xfe", 400),
        (b'{"messages": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', 400),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"messages": "' + b"x" * 5_000_000 + b'"}', 413),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 300_000 + b'"}]}', 400),
    ],
)
def test_invalid_bodies(client: TestClient, body: bytes, status: int) -> None:
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status and response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_total_length_of_messages_is_limited(client: TestClient, path: str) -> None:
    turns = [{"role": role, "content": "x" * 150_000} for role in ("user", "assistant")]
    response = client.post(path, json={"messages": [*turns, {"role": "user", "content": "?"}]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("body", "content_type", "part"),
    [
        (b'{"messages": []}', "", "Content-Type: application/json"),
        (b'{"messages": []}', "text/plain", "Content-Type: application/json"),
        (b"", "application/json", "empty"),
        (b"[1]", "application/json", "a JSON object"),
        (b'{"messages": [}', "application/json", "at character 14"),
        (b'{"messages": "\xff"}', "application/json", "UTF-8"),
    ],
)
def test_error_says_what_is_wrong_with_the_body(client: TestClient, body: bytes, content_type: str, part: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400 and part in response.json()["error"]["message"]


def test_chunked_body_is_limited(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"messages": "'
        for _ in range(10_000):
            yield b"x" * 10_000

    response = client.post("/v1/chat/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_unknown_models_and_paths(client: TestClient) -> None:
    error = client.post("/v1/chat/completions", json=chat(model="gpt-9"))
    assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
    for path in ("/nowhere", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../x"):
        response = client.get(path)
        assert response.status_code == 404 and "root:" not in response.text and "error" in response.json()
    response = client.get("/v1/chat/completions")
    assert response.status_code == 405 and "POST" in response.json()["error"]["message"]


def test_api_key_is_required() -> None:
    with TestClient(app_of(Settings(api_keys=["other", "sécret"], max_tokens=4))) as client:
        good = {"Authorization": "Bearer sécret".encode()}
        for wrong in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sécret".encode()},
            {"Authorization": "Basic sécret".encode()},
            {"Authorization": b"Bearer \xff\xfe"},
        ):
            for path in ("/v1/models", "/stats", "/metrics", "/openapi.json"):
                response = client.get(path, headers=wrong)  # type: ignore[arg-type]
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers=good).status_code == 200
        for path in ("/health", "/", "/page/main.js", "/page/vendor/purify.min.js"):  # the page asks for the key itself
            assert client.get(path).status_code == 200
        assert client.post("/v1/chat/completions", json=chat(), headers=good).status_code == 200


def test_cors_only_where_configured() -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with TestClient(app_of(Settings(cors_origins=["https://a.example"]))) as client:
        allowed = client.options("/v1/chat/completions", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == ask["Origin"]
        other = client.options("/v1/chat/completions", headers={**ask, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_busy_server_sends_retry_after() -> None:
    with TestClient(app_of(Settings(max_requests=0))) as client:
        response = client.post("/v1/chat/completions", json=chat())
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1


def test_request_timeout_frees_the_batch_slot() -> None:
    app = app_of(Settings(request_seconds=0.0))
    with TestClient(app) as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 504
        stream = events(client.post("/v1/chat/completions", json=chat(stream=True)))
        assert stream[-1]["error"]["code"] == "timeout"  # the error is the last event
        pool = app.state.api.pool
        until(lambda: pool.stats()["rows_running"] == pool.stats()["requests_waiting"] == 0)


def test_health_after_repeated_crashes(capsys: pytest.CaptureFixture[str]) -> None:
    broken = [True]

    def make(index: int) -> Service:
        service = Service(MODEL, TOKENIZER)
        step = service.batch.step

        def explode(**settings: Any) -> Any:
            if broken[0]:
                raise RuntimeError("boom")
            return step(**settings)

        service.batch.step = explode  # type: ignore[method-assign]
        return service

    with TestClient(create_app(WorkerPool(make), TOKENIZER, SETTINGS)) as client:

        def health() -> list[int]:
            return [client.get(f"/health/{kind}").status_code for kind in ("ready", "live")]

        assert client.post("/v1/chat/completions", json=chat()).status_code == 500 and health() == [200, 200]
        assert client.post("/v1/chat/completions", json=chat()).status_code == 500 and health() == [503, 503]
        broken[0] = False
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200 and health() == [200, 200]
        broken[0] = True  # a replica has answered: further crashes do not count
        assert client.post("/v1/chat/completions", json=chat()).status_code == 500 and health() == [200, 200]
        broken[0] = False
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        broken[0] = True
        assert client.post("/v1/chat/completions", json=chat()).status_code == 500 and health() == [200, 200]
    assert "boom" in capsys.readouterr().err


def test_many_prompts_in_one_request_do_not_block_others() -> None:
    app = app_of(max_rows=1, max_waiting=2)
    with TestClient(app) as client:
        many = threading.Thread(
            target=client.post, args=("/v1/completions",), kwargs={"json": {"prompt": ["ab"] * 60, "max_tokens": 30}}
        )
        many.start()
        until(lambda: app.state.api.pool.stats()["requests_waiting"] > 40)
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
        many.join()


@pytest.mark.parametrize("good_steps", [0, 3])
def test_request_without_output_survives_a_dead_replica(good_steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A request of which the client has nothing is retried on the new replica; others end with an error."""
    app = app_of()
    with TestClient(app) as client:
        service = app.state.api.pool.replicas[0]
        step, left = service.batch.step, [good_steps]

        def explode(**settings: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError("boom")
            return step(**settings)

        service.batch.step = explode
        response = client.post("/v1/chat/completions", json=chat(temperature=0))
        if good_steps:
            assert response.status_code == 500 and "boom" not in response.text
        again = client.post("/v1/chat/completions", json=chat(temperature=0)).json()
        assert good_steps or response.json()["choices"] == again["choices"]
        assert client.get("/health").status_code == 200 and app.state.api.pool.replaced == 1


def test_shutdown_finishes_active_answers() -> None:
    app, answers = app_of(Settings(drain_seconds=20)), []
    with TestClient(app) as client:
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=chat())))
        thread.start()
        thread.join()
    assert answers[0].status_code == 200
    assert not app.state.api.pool.alive


@pytest.mark.parametrize("levels", [0, 1, 3, 9])
def test_json_pieces_equal_json(levels):
    value = {"a": [], "b": {}, "c": [1, -2.5e-9, None, True, '\u00fc\n"\U0001f600'], "d": {"e": [[{"x": [1]}]]}}
    assert "".join(json_pieces(value, levels)) == json.dumps(value, ensure_ascii=False)


def test_json_pieces_take_one_element_of_an_iterator_at_a_time():
    made = []
    pieces = json_pieces({"content": (made.append(i) or i for i in range(3)), "none": iter(())}, 5)
    until_the_first = "".join(itertools.takewhile(lambda piece: piece != "0", pieces))
    assert (until_the_first, made) == ('{"content": [', [0])
    assert "".join(pieces) == ', 1, 2], "none": []}'


def test_answers_share_the_event_loop(monkeypatch):
    """Forty answers, each with a millisecond of work: a task that takes five iterations of the event loop is done after
    five slices of the budget, not after forty milliseconds per iteration."""
    now = [0.0]
    monkeypatch.setattr(api.time, "monotonic", lambda: now[0])

    async def measure():
        budget, order = LoopBudget(), []

        async def answer(number):
            await budget.wait()
            now[0] += 0.001
            order.append(number)

        async def other():
            for _ in range(5):
                await asyncio.sleep(0)
            return now[0]

        done = asyncio.create_task(other())
        await asyncio.gather(*(answer(number) for number in range(40)))
        return order, await done

    order, seconds = asyncio.run(measure())
    assert order == list(range(40))
    assert seconds <= 5 * (api.SLICE_SECONDS + 0.001) + 1e-9
