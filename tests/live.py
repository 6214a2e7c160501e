"""A server on a real socket, in a thread: application, connections and shutdown as in production."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from nanochat.serve.uvicorn_server import Server


class Live:
    """`with Live(app) as live:` serves the application at live.url."""

    def __init__(self, app: Any, send_bytes: int | None = None, **server: Any) -> None:
        """`send_bytes`: the send buffer of connections, which the system fills while the client does not read."""
        self.app, self.api = app, app.state.api
        self.listening = socket.create_server(("127.0.0.1", 0))
        if send_bytes:
            self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(app, **server)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],), daemon=True)

    def __enter__(self) -> "Live":
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.handle_exit(15, None)
        self.server.handle_exit(15, None)
        self.thread.join(90)
        assert not self.thread.is_alive()

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        made = socket.socket()
        made.settimeout(90)
        if receive_bytes:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.connect(("127.0.0.1", self.port))
        return made

    def send(self, request: bytes) -> bytes:
        """Send these bytes; what comes back until the server closes or is silent."""
        with self.connect() as connection:
            connection.settimeout(60)
            connection.sendall(request)
            return rest(connection)

    def stats(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/stats", timeout=90).json()

    def settle(self) -> None:
        """Wait until no request is running or waiting."""
        until(
            lambda: (
                self.api.pool.stats()["rows_running"] == self.api.pool.stats()["requests_waiting"] == 0
                and self.api.active == 0
            )
        )


def rest(connection: socket.socket) -> bytes:
    """The bytes that come until the other side closes or is silent."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except (TimeoutError, ConnectionResetError):
        pass
    return found


def post(path: str, body: Any, *headers: str) -> bytes:
    """A request's bytes; the server closes the connection after it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        "Connection: close",
        f"Content-Length: {len(content)}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(head).encode() + content


def until(holds: Callable[[], Any], seconds: float = 90.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"still not true after {seconds:g} s"
        time.sleep(0.01)
