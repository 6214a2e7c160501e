"""Hostile requests over a real socket: keys, paths, headers, bodies, slow clients, disconnects."""

import gc
import json
import logging
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import Live, post, rest, until
from pydantic import ValidationError
from serve_helpers import CHAT, app_of, chat, slow

from nanochat.serve import generation, guard, uvicorn_server
from nanochat.serve.api import Settings
from nanochat.serve.routes_chat import ChatRequest
from nanochat.serve.routes_completions import CompletionRequest
from nanochat.serve.routes_info import DetokenizeRequest

SETTINGS = Settings(api_keys=["right"], request_seconds=90, drain_seconds=60, body_bytes=100_000)
KEY = "Authorization: Bearer right"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with Live(app_of(SETTINGS)) as made:
        yield made


@pytest.fixture(autouse=True)
def server_is_idle_afterwards(live: Live) -> Iterator[None]:
    """After every test no request is running, and the next one is answered."""
    yield
    live.settle()
    assert status(live.send(post(CHAT, chat(), KEY))) == 200


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def error_of(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


# ---------------------------------------------------------------------------------------------------
# Keys, paths, headers


@pytest.mark.parametrize(
    "key",
    [
        "",
        "Bearer wrong",
        "Bearer",
        "Bearer righ",
        "Bearer rightt",
        "right",
        "Basic right",
        "Bearer right, Bearer wrong",
        "Bearer \xff\xfe",
        "Bearer " + "x" * 9_999,
    ],
)
def test_wrong_keys(live: Live, key: str) -> None:
    request = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {key}\r\n\r\n"
    answer = live.send(request.encode("latin-1"))
    assert status(answer) == 401 and b"www-authenticate: Bearer" in answer and b"right" not in answer


def test_keys_are_compared_in_constant_time(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key is compared as a whole, also after another has matched."""
    compared = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return given == key

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    monkeypatch.setattr(SETTINGS, "api_keys", ["first", "right", "last"])
    assert status(live.send(post(CHAT, chat(), KEY))) == 200
    assert compared == [(b"right", b"first"), (b"right", b"right"), (b"right", b"last")]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/v1/../../etc/passwd",
        "/%00",
        "/%ff%fe",
        "/v1/models/../../x",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/ui.html",
        "/static/ui.html",
        "/" + "a" * 20_000,
    ],
)
def test_no_path_traversal(live: Live, path: str) -> None:
    answer = live.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{KEY}\r\n\r\n".encode())
    assert status(answer) == 404 and b"root:" not in answer and error_of(answer)["message"]


def test_no_header_injection(live: Live) -> None:
    evil = "%0d%0aEvil:%20yes"
    requests = [
        f"GET /{evil} HTTP/1.1\r\nHost: x\r\n{KEY}\r\nConnection: close\r\n\r\n".encode(),
        f"GET /v1/models/{evil}?a={evil} HTTP/1.1\r\nHost: x\r\n{KEY}\r\nConnection: close\r\n\r\n".encode(),
        f"GET /health HTTP/1.1\r\nHost: a\r\nEvil: yes\r\nX-Request-Id: 1\r\n Evil: yes\r\nOrigin: {evil}\r\n"
        "Connection: close\r\n\r\n".encode(),
        post(CHAT, chat(model="\r\nEvil: yes"), KEY, "X-Request-ID: a\tEvil: yes"),
    ]
    for request in requests:
        head = live.send(request).partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 ") and b"evil" not in head.lower(), head


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 200_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\x00b: c\r\n\r\n",
    ],
)
def test_invalid_http(live: Live, request_bytes: bytes) -> None:
    assert b"HTTP/1.1 400" in live.send(request_bytes)


# ---------------------------------------------------------------------------------------------------
# Bodies


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"[" * 100_001, 413),
        (b"[" * 49_000 + b"]" * 49_000, 400),
        (b'{"a":' * 16_000 + b"1" + b"}" * 16_000, 400),
        (b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400),
        (b"\xff\xfe\x00", 400),
        (b"", 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "stop": ["\\ud800", ""]}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": -0.1}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -2}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e400}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 90_000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 99999999999999999999}', 400),
    ],
)
def test_bad_bodies(live: Live, body: bytes, expected: int) -> None:
    answer = live.send(post(CHAT, body, KEY))
    assert status(answer) == expected and error_of(answer)["message"], answer


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_too_large_bodies(live: Live) -> None:
    announced = live.send(post(CHAT, b"x" * 1_000_000, KEY))
    assert status(announced) == 413 and error_of(announced)["code"] == "request_too_large"
    head = post(CHAT, b"", KEY).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunked = live.send(head + chunk(b"x" * 50_000) * 20 + b"0\r\n\r\n")
    assert status(chunked) == 413
    lied = live.send(
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{KEY}\r\nContent-Length: {10**18}\r\nExpect: 100-continue\r\n\r\n".encode()
    )
    assert status(lied) == 413  # before the body is sent


def test_endless_body_is_cut_off(live: Live) -> None:
    with live.connect() as connection:
        connection.sendall(post(CHAT, b"", KEY).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        with pytest.raises(OSError):
            for _ in range(10_000):
                connection.sendall(chunk(b"x" * 50_000))


# ---------------------------------------------------------------------------------------------------
# Slow clients


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_server, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(uvicorn_server, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(uvicorn_server, "CHECK_SECONDS", 0.05)


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{KEY}\r\nContent-Length: 9\r\n"
FIRST = f"GET /health HTTP/1.1\r\nHost: x\r\n{KEY}\r\n\r\n"


@pytest.mark.parametrize(
    "sent", ["", "GET / HT", HEAD, HEAD + "\r\n", HEAD + "\r\n{", FIRST + "GET / HT", FIRST + HEAD + "\r\n{"]
)
def test_incomplete_requests_time_out(live: Live, short_timeouts: None, sent: str) -> None:
    before = threading.active_count()
    with live.connect() as connection:
        connection.sendall(sent.encode())
        began = time.monotonic()
        answer = rest(connection)
        assert time.monotonic() - began < 20
        assert (b"200 OK" in answer) == sent.startswith(FIRST)
    until(lambda: not live.server.server_state.connections)
    assert threading.active_count() <= before


def test_request_sent_byte_by_byte(live: Live) -> None:
    with live.connect() as connection:
        for byte in post(CHAT, chat(), KEY):
            connection.sendall(bytes([byte]))
        assert status(rest(connection)) == 200


def test_long_answer_is_not_a_stuck_connection(
    live: Live, short_timeouts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(live, monkeypatch, 0.1)
    answer = live.send(post(CHAT, chat(max_tokens=10, stream=True), KEY))
    assert b"data: [DONE]" in answer
    assert status(live.send(post(CHAT, chat(max_tokens=10), KEY))) == 200


BIG = {"n": 32, "max_tokens": 55, "logprobs": True, "top_logprobs": 20, "stream": True, "temperature": 10, "top_k": 0}


def test_client_that_does_not_read_is_dropped(short_timeouts: None) -> None:
    """Its connection is closed, its unsent data discarded, its place among the active requests freed."""
    with Live(app_of(SETTINGS), send_bytes=4096) as live, live.connect(receive_bytes=4096) as connection:
        connection.sendall(post(CHAT, chat(**BIG), KEY))
        until(lambda: live.api.active == 1)
        until(lambda: live.api.active == 0)
        live.settle()
        assert b"[DONE]" not in rest(connection)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 5000}]}),
        (ChatRequest, {"messages": [{"a": 1}] * 5000}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * 999}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 9}] * 900}),
        (CompletionRequest, {"prompt": ["", *[None] * 200]}),
        (CompletionRequest, {"prompt": [[]] * 5000}),
        (CompletionRequest, {"prompt": [[1], [None] * 5000]}),
        (CompletionRequest, {"prompt": [1, *[{}] * 5000]}),
        (DetokenizeRequest, {"tokens": [-1] * 5000}),
    ],
)
def test_many_faults_give_one_error(kind: Any, body: dict[str, Any]) -> None:
    """An error for each of a million would block the event loop for half a minute."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.error_count() == 1


def test_unread_tokens_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that falls too far behind is cancelled; the rest of its stream ends with the reason."""
    monkeypatch.setattr(generation, "MAX_UNREAD_TOKENS", 100)
    monkeypatch.setattr(generation, "UNREAD_SECONDS", 0.1)
    with Live(app_of(SETTINGS), send_bytes=4096) as live, live.connect(receive_bytes=4096) as connection:
        slow(live, monkeypatch, 0.02)
        connection.sendall(post(CHAT, chat(**BIG), KEY))
        until(lambda: live.api.pool.stats()["rows_running"])
        until(lambda: live.api.pool.stats()["rows_running"] == live.api.pool.stats()["requests_waiting"] == 0)
        assert live.api.pool.stats()["tokens"] < 700  # of about 1300
        answer = rest(connection)
        assert b"client_too_slow" in answer and b"[DONE]" not in answer


# ---------------------------------------------------------------------------------------------------
# Disconnects


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_slot_within_a_step(live: Live, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    service = slow(live, monkeypatch, 0.3)
    with live.connect() as connection:
        connection.sendall(post(CHAT, chat(max_tokens=50, stream=stream, temperature=10, top_k=0), KEY))
        until(lambda: service.batch.running)
        if stream:
            assert b"data: " in connection.recv(4096)
    left = service.steps
    until(lambda: not service.batch.running)
    assert service.steps - left <= 2
    live.settle()


def test_disconnect_removes_from_the_queue(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    service = slow(live, monkeypatch, 0.05)
    connections = [live.connect() for _ in range(50)]
    for connection in connections:
        connection.sendall(post(CHAT, chat(max_tokens=50, n=2, temperature=10, top_k=0), KEY))
    until(lambda: service.stats()["requests_waiting"] > 5)
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # with a reset
        connection.close()
    left = service.steps
    live.settle()
    assert service.steps - left <= 4


@pytest.mark.parametrize("changes", [{}, {"stream": True}, {"stream": True, "stop": ["a", "b", "c"]}, {"leave": True}])
def test_request_memory_is_freed_without_gc(
    live: Live, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Reference counting frees it at once: an answer's tokens are many."""
    pool, held = live.api.pool, []
    submit = pool.submit

    def watched(*args: Any, **kwargs: Any) -> Any:
        handle = submit(*args, **kwargs)
        held.append(weakref.ref(handle))
        held.extend(weakref.ref(sequence) for sequence in handle.sequences)
        return handle

    monkeypatch.setattr(pool, "submit", watched)
    service = slow(live, monkeypatch, 0.01)
    disconnect = changes.pop("leave", False)
    gc.disable()
    try:
        with live.connect() as connection:
            connection.sendall(post(CHAT, chat(max_tokens=30, n=2, logprobs=True, **changes), KEY))
            until(lambda: service.batch.running)
            if not disconnect:
                assert status(rest(connection)) == 200
        live.settle()
        until(lambda: not any(ref() for ref in held))
    finally:
        gc.enable()
    assert len(held) == 3


# ---------------------------------------------------------------------------------------------------
# Logs and shutdown


def test_messages_are_not_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    word = "cormorant"
    bodies: list[Any] = [
        chat(messages=[{"role": "user", "content": word}]),
        {"messages": word},
        word.encode(),
        chat(messages=[{"role": "user", "content": word * 99}]),
        {"prompt": word, "stream": True},
        chat(messages=[{"role": "user", "content": word}], stream=True, temperature=word),
    ]
    with Live(app_of(Settings(max_tokens=8)), log_requests=True) as live:
        for body in bodies:
            for path in (CHAT, "/v1/completions", "/chat/completions", "/tokenize"):
                live.send(post(path, body))
        service = live.api.pool.replicas[0]
        service.batch.step = lambda **settings: 1 / 0
        assert status(live.send(post(CHAT, bodies[0]))) in (200, 500)
    said = capsys.readouterr()
    assert f"POST {CHAT} HTTP/1.1" in caplog.text + said.out + said.err  # with log_requests
    for text in (caplog.text, said.out, said.err):
        assert word not in text


def test_signal_finishes_answers_and_refuses_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with Live(app_of(SETTINGS)) as live, live.connect() as connection:
        slow(live, monkeypatch, 0.02)
        whole = live.send(post(CHAT, chat(max_tokens=50, seed=1), KEY))
        connection.sendall(post(CHAT, chat(max_tokens=50, seed=1, stream=True), KEY))
        first = connection.recv(100)
        live.server.handle_exit(signal.SIGTERM, None)
        refused = live.send(post(CHAT, chat(), KEY))
        assert status(refused) == 503 and b"retry-after" in refused and error_of(refused)["code"] == "unavailable"
        assert httpx.get(f"{live.url}/health", timeout=90).status_code == 503
        assert httpx.get(f"{live.url}/health/live", timeout=90).status_code == 200
        answer = first + rest(connection)
        assert answer.count(b"[DONE]") == 1 and answer.count(b'finish_reason": "') == 1
        pieces = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
        text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
        assert text == json.loads(whole.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]
        live.thread.join(90)
        assert not live.thread.is_alive() and not live.api.pool.alive


def test_answer_longer_than_the_drain_time_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Live(app_of(Settings(drain_seconds=0.2))) as live, live.connect() as connection:
        slow(live, monkeypatch, 0.1)
        connection.sendall(post(CHAT, chat(max_tokens=50, stream=True)))
        connection.recv(100)
        live.server.handle_exit(signal.SIGTERM, None)
        answer = rest(connection)
        assert b'"server_error"' in answer and b"[DONE]" not in answer
        live.thread.join(90)
        assert not live.thread.is_alive()
