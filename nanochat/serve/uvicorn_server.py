"""The HTTP server under the application: uvicorn, hardened against slow clients, with a two-step shutdown.

A connection without progress is dropped: a request that does not arrive in time, an answer that is not read. On Ctrl-C,
SIGTERM or SIGHUP no new answers are begun and active ones are finished before the process exits.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.common import UserError

REQUEST_SECONDS = 30.0  # for a whole request to arrive, from the connection's or the request's first byte
UNREAD_SECONDS = 30.0  # that a client may leave its answer unread
CHECK_SECONDS = 1.0  # between two checks of a connection
READ_BYTES = 4 * 2**10  # at a time, of one connection
HEAD_BYTES = 32 * 2**10  # of a request's line and headers
FRAMING_BYTES = 32 * 2**10  # of a body sent in chunks: their lengths, six bytes or more each
DEFAULT_PORTS = range(8000, 8020)
BACKLOG = 2048

FLUSH_SECONDS = 0.2  # for the last errors to be sent, before connections are closed


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's connection, with time limits. It reads READ_BYTES at a time: h11 takes 10 us for a chunk of a body,
    also for one of a single byte, and other clients wait meanwhile."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._buffer = bytearray(READ_BYTES)
        self._framing_bytes = 0  # of the arriving body: what came beside its content
        self._arriving_since: float | None = time.monotonic()  # None: no request is arriving
        self._read_since = time.monotonic()
        self._unread_bytes = 0
        self._check()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        cycle = self.cycle
        before = len(cycle.body) if cycle else 0
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))
        if cycle is None or cycle is not self.cycle or not cycle.more_body:
            self._framing_bytes = 0
            return
        self._framing_bytes += nbytes - (len(cycle.body) - before)
        if self._framing_bytes > FRAMING_BYTES and not cycle.response_started and not self.transport.is_closing():
            self.send_400_response("The body's chunks are too small.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers. They would keep this connection alive for seconds: long enough, under load, to move it to
        the oldest generation of the garbage collector, which is rarely collected."""
        super().connection_lost(exc)
        self._next_check.cancel()
        self._unset_keepalive_if_required()

    def _check(self) -> None:
        """Drop the connection if it is stuck, else schedule the next check."""
        now = time.monotonic()
        if self.cycle is not None and self.cycle.response_complete:  # has the next request begun?
            self._arriving_since = (self._arriving_since or now) if self.conn.trailing_data[0] else None
        elif self.cycle is not None and not self.cycle.more_body:
            self._arriving_since = None
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes == 0 or unread_bytes < self._unread_bytes:
            self._read_since = now
        self._unread_bytes = unread_bytes
        arriving = now - self._arriving_since if self._arriving_since is not None else 0.0
        if arriving > REQUEST_SECONDS or now - self._read_since > UNREAD_SECONDS:
            self.transport.abort()  # close() would wait for the client to read
        else:
            self._next_check = self.loop.call_later(CHECK_SECONDS, self._check)


class Server(uvicorn.Server):
    """uvicorn's server. While active answers are finished it still answers new requests with 503, so that a load
    balancer sees it leave. A second signal ends the active answers."""

    def __init__(self, app: FastAPI, *, log_requests: bool = False, **config: Any) -> None:
        logging.getLogger("sse_starlette").setLevel(logging.INFO)  # its debug lines contain the answers
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_level="info" if log_requests else "warning",
                access_log=log_requests,
                server_header=False,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=HEAD_BYTES,
                **config,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.api = app.state.api
        self.drain_until: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGHUP as well as uvicorn's signals: a closed terminal sends it. Under nohup it stays ignored."""
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        main = threading.current_thread() is threading.main_thread()
        caught = [hangup] if main and signal.getsignal(hangup) is not signal.SIG_IGN else []
        with super().capture_signals():
            before = {number: signal.signal(number, self.handle_exit) for number in caught}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        drain_seconds = self.api.settings.drain_seconds if self.drain_until is None else 0.0
        self.api.closing = True
        self.drain_until = time.monotonic() + drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self.drain_until is not None:
            if time.monotonic() > self.drain_until:  # the remaining answers end with an error
                await asyncio.to_thread(self.api.pool.close, 0.0)
                await asyncio.sleep(FLUSH_SECONDS)
                self.should_exit = True
            self.should_exit = self.should_exit or self.api.active == 0
        return await super().on_tick(counter)


def limit_pauses() -> None:
    """Keep one thread from delaying the others' tokens: all share one interpreter."""
    gc.collect()
    gc.freeze()  # loaded objects are not scanned again: a full collection would stop all threads for 0.2 s
    gc.set_threshold(2_000, 10, 50)  # a collection of 20,000 objects takes some ten milliseconds
    sys.setswitchinterval(0.001)  # seconds


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, all at one port. A requested port must be free; -1 takes the first free one of DEFAULT_PORTS.

    "localhost" is both loopbacks, since clients resolve it to either: 127.0.0.1, and ::1 where there is IPv6.
    """
    candidates = [port] if port != -1 else DEFAULT_PORTS
    for candidate in candidates:
        with contextlib.ExitStack() as opened:
            try:
                sockets = [opened.enter_context(listen(host if host != "localhost" else "127.0.0.1", candidate))]
                if host == "localhost" and has_ipv6_loopback():
                    sockets.append(opened.enter_context(listen("::1", sockets[0].getsockname()[1])))
                opened.pop_all()
                return sockets
            except OSError as error:  # its text names the address
                if port != -1:
                    raise UserError(
                        f"cannot listen: {error.strerror}; give another --port, or none for a free one"
                    ) from error
                if not isinstance(error, PermissionError) and error.errno != errno.EADDRINUSE:
                    raise UserError(f"cannot listen: {error.strerror}") from error
    raise UserError(f"no port from {candidates[0]} to {candidates[-1]} is free; give one with --port")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; "::" takes IPv4 as well. Raises OSError."""
    ipv6 = ":" in host
    return socket.create_server(
        (host, port),
        family=socket.AF_INET6 if ipv6 else socket.AF_INET,
        dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        backlog=BACKLOG,
    )


def has_ipv6_loopback() -> bool:
    try:
        listen("::1", 0).close()
    except OSError:
        return False
    return socket.has_ipv6


def url_host(host: str) -> str:
    """An address as it is written in a URL. For "all addresses" a loopback of the same family."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
