"""The HTTP server under the application: uvicorn, made for strangers and for being stopped.

A connection that makes no progress is dropped: one that does not get its request across, one that does not read its
answer. On SIGTERM or Ctrl-C no new answers are begun, those under way are finished, and then the process ends.
"""

import asyncio
import logging
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # for a whole request to arrive, from the connection's or the request's first byte
STUCK_SECONDS = 30.0  # that a client may leave its answer unread
LOOK_SECONDS = 1.0  # how often a connection is looked at


class Connection(H11Protocol):
    """uvicorn's connection, watched."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asked_since: float | None = time.monotonic()
        self._read_since = time.monotonic()
        self._unread = 0
        self._look()

    def _look(self) -> None:
        """Drop the connection if it is stuck, else look again later."""
        now = time.monotonic()
        if self.cycle is not None and self.cycle.response_complete:  # has the next request begun?
            self._asked_since = (self._asked_since or now) if self.conn.trailing_data[0] else None
        elif self.cycle is not None and not self.cycle.more_body:
            self._asked_since = None
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread < self._unread:
            self._read_since = now
        self._unread = unread
        waited = now - self._asked_since if self._asked_since is not None else 0.0
        if waited > REQUEST_SECONDS or now - self._read_since > STUCK_SECONDS:
            self.transport.abort()  # close() would wait for the client to read
        elif self in self.connections or unread:
            self.loop.call_later(LOOK_SECONDS, self._look)


class Server(uvicorn.Server):
    """uvicorn's server with a shutdown in two steps: while answers are finished it still says 503 to new requests, so
    that whoever divides the load sees it leave. A second signal ends what is under way."""

    def __init__(self, app: FastAPI, *, log_requests: bool = False, **config: Any) -> None:
        logging.getLogger("sse_starlette").setLevel(logging.INFO)  # its debug lines hold what is said
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_level="info" if log_requests else "warning",
                access_log=log_requests,
                server_header=False,
                timeout_graceful_shutdown=5,
                **config,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.api = app.state.api
        self.drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        patience = self.api.settings.drain_seconds if self.drain_until is None else 0.0
        self.api.door.closing = True
        self.drain_until = time.monotonic() + patience

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self.drain_until is not None:
            if time.monotonic() > self.drain_until:  # the rest is told that it will not be finished
                await asyncio.to_thread(self.api.pool.close, 0.0)
                await asyncio.sleep(0.2)
                self.should_exit = True
            self.should_exit = self.should_exit or self.api.door.under_way == 0
        return await super().on_tick(counter)
