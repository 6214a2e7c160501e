"""A request's body before it is parsed: its structure is bounded, and a body that was cut off is no body."""

import asyncio
import contextlib
import gc
import json
import weakref
from typing import Any

import pytest
from hypothesis import given, strategies as st
from live import Live, post, rest, until
from serve_helpers import CHAT, app_of

from nanochat.serve import body, uvicorn_server
from nanochat.serve.body import check_structure
from nanochat.serve.errors import ApiError
from nanochat.serve.guard import Guard
from nanochat.serve.uvicorn_server import Connection

TEXT = st.text(st.sampled_from('"\\[]{},:a\u2222\n'), max_size=5)
VALUES = st.recursive(
    TEXT | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def measure(value: Any) -> tuple[int, int, int, int]:
    """(levels, lists and objects, strings, commas) of a JSON value, counted on the value."""
    if isinstance(value, dict):
        parts = [measure(part) for part in value.values()]
        strings = len(value)
    elif isinstance(value, list):
        parts, strings = [measure(part) for part in value], 0
    else:
        return 0, 0, int(isinstance(value, str)), 0
    return (
        1 + max((part[0] for part in parts), default=0),
        1 + sum(part[1] for part in parts),
        strings + sum(part[2] for part in parts),
        max(0, len(value) - 1) + sum(part[3] for part in parts),
    )


def refused(content: bytes, **limits: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(body, name, value)
        try:
            check_structure(content)
        except ApiError as error:
            assert error.status == 400
            return True
    return False


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_limits_are_exact(value: Any, ascii_only: bool, indent: int | None) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    for name, count in zip(("MAX_DEPTH", "MAX_CONTAINERS", "MAX_STRINGS", "MAX_VALUES"), measure(value)):
        assert not refused(content, **{name: count})
        assert count == 0 or refused(content, **{name: count - 1})


@given(VALUES, VALUES, st.integers(0, 200), TEXT)
def test_what_precedes_a_fault_is_counted(value: Any, more: Any, cut: int, junk: str) -> None:
    """The parser builds all of it before it finds the fault."""
    good = json.dumps([value], ensure_ascii=False)
    content = (good[:-1] + "," + junk + json.dumps(more)[:cut]).encode()
    assert refused(content, MAX_CONTAINERS=measure([value])[1] - 1)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"[" * 101 + b"]" * 101, "deep"),
        (b"[" * 2_000_000, "deep"),
        (b'{"a":' * 20_000, "deep"),
        (b"[" + b'{"a":1},' * 400_000, "strings"),
        (b"[" + b"{}," * 1_000_000, "objects"),
        (b'{"prompt": [' + b"1," * 2_000_000, "values"),
        (b"[" + b'"",' * 1_000_000, "strings"),
        (('["\u2222",' + "[]," * 20_000).encode("utf-16"), "UTF-8"),
        (('["\u2222",' + "[]," * 20_000).encode("utf-32-le"), "UTF-8"),
    ],
)
def test_structures_that_are_refused(content: bytes, word: str) -> None:
    with pytest.raises(ApiError, match=word):
        check_structure(content)


def test_ordinary_bodies_pass() -> None:
    parts = [{"type": "text", "text": 'a, [b], {c} \\ "d"'}] * 20
    check_structure(json.dumps({"messages": [{"role": "user", "content": parts}] * 400}).encode())
    check_structure(json.dumps({"prompt": [list(range(1900))] * 256}).encode())
    check_structure(b'{"prompt": "' + b'[{,\\"' * 200_000 + b'"}')
    check_structure(b"[" * 100 + b"]" * 100)


@pytest.fixture(scope="module")
def live() -> Any:
    with Live(app_of()) as made:
        yield made


@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_too_deep_is_called_so(live: Live, size: int) -> None:
    for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
        answer = live.send(post(path, b"[" * size + b"]" * size))
        assert answer.startswith(b"HTTP/1.1 400") and b"nested too deeply" in answer


@pytest.mark.parametrize("whole", [True, False])
def test_a_body_that_was_cut_off_does_not_reach_the_application(live: Live, whole: bool) -> None:
    """What has come may be JSON by itself, as here, where a client leaves in the middle."""
    messages = [
        {"type": "http.request", "body": b"{}", "more_body": not whole},
        {"type": "http.disconnect"},
    ]
    reached: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append((await receive())["body"])

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-length", b"9")]}
    asyncio.run(Guard(app, live.api, (), ())(scope, receive, send))
    assert reached == ([b"{}"] if whole else [])


CUT_OFF = post(CHAT, b"{}")[:-1]


@pytest.mark.parametrize(
    "sent",
    [
        post(CHAT, b"{"),
        post(CHAT, b'{"messages": []}'),
        post(CHAT, b"[" * 10_000),
        post(CHAT, b"9" * 5_000),
        post(CHAT, b"\xff"),
        post(CHAT, b"{}" + b" " * 5_000_000),
        post("/nowhere", b"{}"),
        CUT_OFF,
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_a_refused_request_is_freed_without_gc(live: Live, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Under load the garbage collector is late: the server grew by 4 KiB with each request, and by its body."""
    held: list[weakref.ref[Any]] = []
    made, new = Connection.connection_made, body.RequestBody.__init__

    def connection_made(self: Connection, transport: asyncio.Transport) -> None:
        held.append(weakref.ref(self))
        made(self, transport)

    def init(self: body.RequestBody, *args: Any) -> None:
        held.append(weakref.ref(self))
        new(self, *args)

    monkeypatch.setattr(Connection, "connection_made", connection_made)
    monkeypatch.setattr(body.RequestBody, "__init__", init)
    monkeypatch.setattr(uvicorn_server, "CHECK_SECONDS", 1000.0)
    gc.collect()
    gc.disable()
    try:
        with live.connect() as connection:
            connection.sendall(sent)
            if sent != CUT_OFF:
                assert connection.recv(65536).startswith(b"HTTP/1.1 ")
        until(lambda: held and not any(ref() for ref in held))
    finally:
        gc.enable()


def test_little_is_read_at_a_time(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    received = Connection.data_received

    def data_received(self: Connection, data: bytes) -> None:
        sizes.append(len(data))
        received(self, data)

    monkeypatch.setattr(Connection, "data_received", data_received)
    head = post("/tokenize", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    content = b'{"text": "abc"}'.ljust(uvicorn_server.READ_BYTES)
    answer = live.send(head + b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n")
    assert b'"count":3' in answer
    assert max(sizes) <= uvicorn_server.READ_BYTES < len(content) * 6


@pytest.mark.parametrize(("size", "fine"), [(1, False), (2, False), (256, True)])
def test_many_small_chunks_are_refused(live: Live, size: int, fine: bool) -> None:
    """h11 takes 10 us for each, also while a refused body is discarded."""
    head = post("/tokenize", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    content = b'{"text": "abc"}'.ljust(20 * uvicorn_server.FRAMING_BYTES)
    chunks = [b"%x\r\n%b\r\n" % (size, content[at : at + size]) for at in range(0, len(content), size)]
    with live.connect() as connection:
        with contextlib.suppress(ConnectionError):  # the server closes it
            connection.sendall(head + b"".join(chunks) + b"0\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 200") == fine
    until(lambda: not live.server.server_state.connections)
