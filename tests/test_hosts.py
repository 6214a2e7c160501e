"""Which addresses chat_web listens to, and whose requests it takes where no key is required."""

import contextlib
import errno
import signal
import socket
import threading
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from live import Live, post, rest, until
from serve_helpers import CHAT, app_of, chat, slow

from nanochat.common import UserError
from nanochat.inference.sampling import SamplingParams
from nanochat.serve import uvicorn_server
from nanochat.serve.api import Settings
from nanochat.serve.hosts import host_name, is_loopback, is_own
from nanochat.serve.uvicorn_server import Server, has_ipv6_loopback, open_sockets, url_host
from scripts import chat_web

needs_ipv6 = pytest.mark.skipif(not has_ipv6_loopback(), reason="no IPv6 on this machine")


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost.:8000", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("a.example:", "a.example"),
        ("*", "*"),
        ("", ""),
        ("[::1", ""),
        ("::1", ""),
        ("localhost:80:80", ""),
        ("localhost:x", ""),
        ("localhost:99999", ""),
        ("me@localhost", ""),
        ("localhost/path", ""),
        ("evil.example?localhost", ""),
    ],
)
def test_names_in_a_host_header(authority: str, name: str) -> None:
    assert host_name(authority) == name


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("localhost", True),
        ("app.localhost", True),
        ("127.0.0.1", True),
        ("127.200.3.4", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        (socket.gethostname().lower(), True),
        ("10.1.2.4", False),
        ("notlocalhost", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.1", False),
        ("", False),
    ],
)
def test_names_of_this_machine(name: str, own: bool) -> None:
    assert is_own(name, ("10.1.2.3", 8000)) == own
    assert is_own(name, ("::ffff:10.1.2.3", 8000)) == own
    if "10.1.2" in name:
        assert not is_own(name, ("127.0.0.1", 8000)) and not is_own(name, None) and not is_loopback(name)


def settings(*arguments: str) -> Settings:
    """The settings of `chat_web` with these flags."""
    config = chat_web._cli.parse(chat_web.Config, arguments)
    return chat_web.settings_of(config, chat_web.read_keys(config.api_key_file), "nanochat", {})


@pytest.mark.parametrize("name", ["http://x.example", "*.example", "", "a b@c", "x.example/y"])
def test_names_that_no_request_can_have(name: str) -> None:
    with pytest.raises(UserError, match="--allow-host"):
        settings(f"--allow-host={name}")


@pytest.mark.parametrize("origin", ["localhost:3000", "http://x.example/", "https://X.example", "://x.example", ""])
def test_origins_that_no_page_can_have(origin: str) -> None:
    with pytest.raises(UserError, match="--cors"):
        settings(f"--cors={origin}")
    assert (
        settings("--cors=https://x.example:8443", "--cors=null", "--cors=*").cors_origins[0] == "https://x.example:8443"
    )


def test_how_to_draw_by_default() -> None:
    assert settings().sampling == SamplingParams(0.8, 50, min_p=0.1)
    assert settings("-t=0.5", "-k=9", "--min-p=0").sampling == SamplingParams(0.5, 9)
    with pytest.raises(UserError, match="min_p"):
        settings("--min-p=1.5")


def test_addresses_are_allowed_by_a_flag() -> None:
    with Live(app_of(settings("--allow-host=FE80::1", "--allow-host=10.1.2.3", "--host="))) as live:
        assert ask(live, "[fe80::1]:80") == ask(live, "10.1.2.3") == 200
        assert ask(live, "[fe80::2]") == ask(live, "a@b") == 403


def ask(live: Live, host: str | None, *headers: str, path: str = "/health") -> int:
    hosts = [] if host is None else [f"Host: {host}"]
    lines = [f"GET {path} HTTP/1.{int(host is not None)}", *hosts, *headers, "Connection: close", "", ""]
    answer = live.send("\r\n".join(lines).encode())
    return int(answer[9:12])


def test_only_names_of_this_machine_are_answered() -> None:
    with Live(app_of(settings())) as live:
        for host in ("localhost", "LOCALHOST.", f"127.0.0.1:{live.port}", "[::1]:8000", "127.9.9.9", None):
            assert ask(live, host) == 200, host
        for host in ("evil.example", f"evil.example:{live.port}", "localhost.evil.example", "[::1", "8.8.8.8", "a@b"):
            for path in ("/", "/health", "/v1/models", "/openapi.json"):
                assert ask(live, host, path=path) == 403, host
        forwarded = ("X-Forwarded-Host: localhost", "Forwarded: host=localhost", "X-Forwarded-For: 127.0.0.1")
        assert ask(live, "evil.example", *forwarded) == 403
        assert ask(live, "localhost", "Host: evil.example") == 400
        assert ask(live, "localhost", path="http://evil.example/v1/models") == 404
        body = post(CHAT, chat()).replace(b"Host: x", b"Host: evil.example:1")
        assert b"--allow-host=evil.example," in live.send(body)


@pytest.mark.parametrize("allowed", ["chat.example", "Chat.Example:443", "*"])
def test_other_names_are_allowed_by_a_flag(allowed: str) -> None:
    with Live(app_of(settings(f"--allow-host={allowed}", "--allow-host=other.example"))) as live:
        assert ask(live, "chat.example") == ask(live, "CHAT.example:8443") == ask(live, "other.example") == 200
        assert ask(live, "evil.example") == (200 if allowed == "*" else 403)


def test_any_name_with_a_key(tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("key")
    with Live(app_of(settings(f"--api-key-file={tmp_path}/keys"))) as live:
        key = "Authorization: Bearer key"
        assert ask(live, "evil.example", "Origin: https://evil.example", path="/v1/models") == 401
        assert ask(live, "evil.example", "Origin: https://a.example", key, path="/v1/models") == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://LOCALHOST", 200),
        ("https://page.example", 200),
        ("http://page.example", 403),
        ("https://evil.example", 403),
        ("https://localhost.evil.example", 403),
        ("null", 403),
        ("file://", 403),
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_pages_of_other_sites(origin: str, status: int, content_type: str) -> None:
    """A browser sends text/plain without asking first."""
    app = app_of(settings("--cors=https://page.example"))
    with TestClient(app, base_url="http://localhost:8000") as client:
        headers = {"Origin": origin, "Content-Type": content_type}
        response = client.post("/tokenize", content=b'{"text": "a"}', headers=headers)
        assert response.status_code == (400 if status == 200 and content_type == "text/plain" else status)
        assert status == 200 or f"--cors={origin}" in response.json()["error"]["message"]


def test_redirects_stay_here() -> None:
    with TestClient(app_of(settings()), base_url="http://localhost:8000") as client:
        response = client.get("/health/", headers={"Host": "evil.example"}, follow_redirects=False)
        assert response.status_code == 403


# ---------------------------------------------------------------------------------------------------
# Sockets


@contextlib.contextmanager
def opened(host: str, port: int = -1) -> Any:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(each) for each in open_sockets(host, port)]


@needs_ipv6
def test_localhost_is_both_loopbacks() -> None:
    with opened("localhost") as sockets:
        (four, port), (six, same, *_) = (each.getsockname() for each in sockets)
        assert (four, six) == ("127.0.0.1", "::1") and port == same
        server = Server(app_of(settings()))
        thread = threading.Thread(target=server.run, args=(sockets,))
        thread.start()
        until(lambda: server.started)
        try:
            for host in ("127.0.0.1", "[::1]", "localhost"):
                assert httpx.get(f"http://{host}:{port}/health", timeout=90).status_code == 200
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(90)


def test_localhost_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def without(address: Any, *, family: int, **more: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return create(address, family=family, **more)

    monkeypatch.setattr(uvicorn_server.socket, "create_server", without)
    with opened("localhost") as sockets:
        assert [each.getsockname()[0] for each in sockets] == ["127.0.0.1"]


@needs_ipv6
@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
def test_a_port_is_free_if_it_is_on_both(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(taken, 0) as (holder,):
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match="--port"):
            open_sockets("localhost", port)
        monkeypatch.setattr(uvicorn_server, "DEFAULT_PORTS", [port, 0])
        with opened("localhost") as sockets:
            assert port not in [each.getsockname()[1] for each in sockets]


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]"),
        ("::", "[::1]"),
        ("fd00::1", "[fd00::1]"),
        ("localhost", "localhost"),
    ],
)
def test_hosts_in_urls(host: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert url_host(host) == written
    chat_web.announce(host, 8000, [])
    said = capsys.readouterr().out
    assert f"http://{written}:8000/v1" in said and httpx.URL(f"http://{written}:8000/v1").port == 8000
    assert ("--api-key-file" in said) == (host not in ("127.0.0.1", "::1", "localhost"))


# ---------------------------------------------------------------------------------------------------
# A closed terminal


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_hangup_is_a_stop_signal_unless_ignored(before: Any) -> None:
    """As by nohup."""
    server = Server(app_of(settings()))
    previous = signal.signal(signal.SIGHUP, before)
    try:
        with server.capture_signals():
            signal.raise_signal(signal.SIGHUP)
            assert server.api.closing == (before is signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, previous)
        server.api.pool.close()


def test_hangup_finishes_active_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with Live(app_of(Settings(max_tokens=30, drain_seconds=60))) as live, live.connect() as connection:
        slow(live, monkeypatch, 0.02)
        connection.sendall(post(CHAT, chat(stream=True)))
        first = connection.recv(100)
        live.server.handle_exit(signal.SIGHUP, None)
        assert (first + rest(connection)).count(b"[DONE]") == 1
        live.thread.join(90)
        assert not live.thread.is_alive()
