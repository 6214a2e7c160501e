"""Two servers behind runs/nginx.conf: tokens pass one by one, and either server may be stopped."""

import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import Live, until
from serve_helpers import CHAT, app_of, chat, slow

from nanochat.serve.api import Settings

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin:/opt/homebrew/bin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx: apt-get install nginx-light")
CONF = Path(__file__).parent.parent / "runs" / "nginx.conf"
SETTINGS = Settings(allow_hosts=(), drain_seconds=60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def servers() -> Iterator[list[Live]]:
    with Live(app_of(SETTINGS)) as one, Live(app_of(SETTINGS)) as two:
        yield [one, two]


@pytest.fixture
def url(servers: list[Live], tmp_path: Path) -> Iterator[str]:
    """The URL of nginx with runs/nginx.conf, except for the ports."""
    port = free_port()
    text = CONF.read_text()
    for written, used in (("8000", servers[0].port), ("8001", servers[1].port), ("8080", port)):
        text, found = re.subn(rf"127\.0\.0\.1:{written}(?= max_fails|;)", f"127.0.0.1:{used}", text)
        assert found == 1
    (tmp_path / "nginx.conf").write_text(text)
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf"],  # type: ignore[list-item]
            stdout=errors,
            stderr=errors,
        )
    try:
        until(lambda: reachable(port) or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "errors").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(90)


def reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def served(live: Live) -> int:
    return live.api.pool.replicas[0].tokens_made


def test_tokens_pass_one_by_one(url: str, servers: list[Live], monkeypatch: pytest.MonkeyPatch) -> None:
    for live in servers:
        slow(live, monkeypatch, 0.05)
    times: list[float] = []
    body = chat(max_tokens=20, stream=True, seed=3)
    with httpx.stream("POST", url + CHAT, json=body, timeout=90) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert len(times) > 5 and times[-1] - times[0] > 0.04 * (len(times) - 4)
    assert max(pauses) < 0.5 * (times[-1] - times[0])  # not all at once


def test_both_are_used_and_limits_hold(url: str, servers: list[Live]) -> None:
    body = {"json": chat(max_tokens=40), "timeout": 90}
    threads = [threading.Thread(target=httpx.post, args=(url + CHAT,), kwargs=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(served(live) > 0 for live in servers)
    assert httpx.post(url + CHAT, content=b"x" * 5_000_000, timeout=90).status_code == 413
    assert httpx.post(url + CHAT, json=chat(temperature=-1), timeout=90).json()["error"]["param"] == "temperature"
    assert httpx.get(f"{url}/", timeout=90).text.startswith("<!doctype html")
    assert httpx.get(f"{url}/page/main.js").headers["content-type"].startswith("text/javascript")


def test_requests_succeed_after_a_server_stops(url: str, servers: list[Live]) -> None:
    ask: Any = lambda: httpx.post(url + CHAT, json=chat(max_tokens=5), timeout=90)  # noqa: E731
    assert ask().status_code == 200
    servers[0].server.handle_exit(signal.SIGTERM, None)
    servers[0].thread.join(90)
    assert [ask().status_code for _ in range(20)] == [200] * 20
    stopped = [httpx.get(f"{url}/health", timeout=90).status_code for _ in range(5)]
    assert stopped == [200] * 5


def test_rolling_restart(url: str, servers: list[Live], monkeypatch: pytest.MonkeyPatch) -> None:
    """No request fails, no stream is cut."""
    for live in servers:
        slow(live, monkeypatch, 0.02)
    lines: list[str] = []

    def stream() -> None:
        with httpx.stream("POST", url + CHAT, json=chat(max_tokens=50, stream=True, seed=1), timeout=90) as response:
            lines.extend(response.iter_lines())

    thread = threading.Thread(target=stream)
    thread.start()
    until(lambda: any(live.api.active for live in servers))
    (busy,) = [live for live in servers if live.api.active]
    busy.server.handle_exit(signal.SIGTERM, None)
    answers = [httpx.post(url + CHAT, json=chat(max_tokens=3), timeout=90) for _ in range(10)]
    assert [answer.status_code for answer in answers] == [200] * 10
    thread.join()
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines if line.startswith("data: {")]
    assert reasons[-1] in ("stop", "length")


def test_client_address_cannot_be_forged(url: str, servers: list[Live]) -> None:
    seen: list[str] = []
    for live in servers:
        submit = live.api.pool.submit

        def watched(request: Any, *rest: Any, submit: Any = submit, **more: Any) -> Any:
            seen.append(request.client)
            return submit(request, *rest, **more)

        live.api.pool.submit = watched
    httpx.post(url + CHAT, json=chat(max_tokens=2), timeout=90, headers={"X-Forwarded-For": "9.9.9.9"})
    assert seen == ["127.0.0.1"]
