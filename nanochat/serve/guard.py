"""Middleware around every request: API keys, limits, security headers, counting."""

import asyncio
import contextlib
import hmac
from collections.abc import Container
from typing import Any

from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders

from nanochat.serve.api import Api
from nanochat.serve.errors import ApiError

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LINGER_SECONDS = 5.0  # to read and discard the body of a refused request, so that the client reads the reason


class Guard:
    """ASGI middleware. `open_paths` need no key; `generating_paths` are limited in number and refused while closing."""

    def __init__(self, app: Any, api: Api, open_paths: Container[str], generating_paths: Container[str]) -> None:
        self.app, self.api, self.open_paths, self.generating_paths = app, api, open_paths, generating_paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn leaves the body out
        exchange = Exchange(self.api, scope, receive, send)
        try:
            scope.setdefault("state", {})["client"] = self.identify(scope)
            exchange.check_content_length()
            if scope["path"] in self.generating_paths and scope["method"] == "POST":
                await self.admit(scope, exchange)
            else:
                await self.app(scope, exchange.receive, exchange.send)
            if exchange.error:
                raise exchange.error
        except ApiError as error:
            await exchange.refuse(error.response())

    def identify(self, scope: Any) -> str:
        """The client's name in the queue: the number of its key, or its address where no key is required.

        Raises ApiError if the key is wrong.
        """
        keys = self.api.settings.api_keys
        if not keys or scope["path"] in self.open_paths:
            return scope["client"][0] if scope.get("client") else ""
        scheme, _, given = Headers(scope=scope).get("Authorization", "").partition(" ")
        # All keys are compared, in constant time, as the bytes that were sent: headers are decoded as Latin-1.
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "a wrong or missing API key; send Authorization: Bearer KEY",
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key {matches.index(True)}"

    async def admit(self, scope: Any, exchange: "Exchange") -> None:
        """Run a generating request, and count it as active until its answer is sent. Raises ApiError if refused."""
        admission = self.api.admission
        if admission.closing:
            retry = {"Retry-After": "5"}
            raise ApiError(503, "the server is shutting down", "server_error", code="unavailable", headers=retry)
        if admission.active >= self.api.settings.max_requests:
            retry = {"Retry-After": "1"}
            raise ApiError(429, "too many requests are active", "rate_limit_error", code="server_busy", headers=retry)
        admission.active += 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            admission.active -= 1


class Exchange:
    """One request and its response. Limits the body, whether its length is announced or not."""

    def __init__(self, api: Api, scope: Any, receive: Any, send: Any) -> None:
        self.api, self.scope, self._receive, self._send = api, scope, receive, send
        self.max_bytes, self.received_bytes = api.settings.body_bytes, 0
        self.received_all = self.responded = False
        self.error: ApiError | None = None  # is sent, whatever response the application makes of it

    def too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self.max_bytes} bytes", code="request_too_large")

    def check_content_length(self) -> None:
        announced = Headers(scope=self.scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self.max_bytes:
            raise self.too_large()

    async def receive(self) -> Any:
        if self.error:
            raise self.error
        message = await self._receive()
        self.received_all = self.received_all or not message.get("more_body", False)
        self.received_bytes += len(message.get("body", b""))
        if self.received_bytes > self.max_bytes:
            self.error = self.too_large()
            raise self.error
        return message

    async def send(self, message: Any) -> None:
        if self.error and not self.responded:
            return  # `refuse` responds
        if message["type"] == "http.response.start":
            self.responded = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            path = getattr(self.scope.get("route"), "path", "other")
            self.api.metrics.requests.labels(path, str(message["status"])).inc()
        await self._send(message)

    async def refuse(self, response: Response) -> None:
        """Respond after the rest of the body has arrived: a client that is still sending would not read it."""
        if self.responded:
            return
        self.error = None
        if "expect" not in Headers(scope=self.scope):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._discard_body(), LINGER_SECONDS)
        if not self.received_all:
            response.headers["Connection"] = "close"
        await response(self.scope, self._receive, self.send)

    async def _discard_body(self) -> None:
        remaining = 16 * self.max_bytes
        while not self.received_all and remaining > 0:
            message = await self._receive()
            remaining -= len(message.get("body", b""))
            self.received_all = not message.get("more_body", False)
