"""Middleware around every request: API keys, limits, security headers, counting."""

import contextlib
import hmac
from collections.abc import Container, Iterator
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from nanochat.serve.api import Api
from nanochat.serve.body import RequestBody, check_structure
from nanochat.serve.errors import ApiError
from nanochat.serve.hosts import check_addressed

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SMALL_BODY = 64 * 2**10  # checked at once; larger ones on another thread


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

        async def send_counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                path = getattr(scope.get("route"), "path", "other")
                self.api.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        body = RequestBody(scope, receive, self.api.settings.body_bytes)
        try:
            scope.setdefault("state", {})["client"] = self.identify(scope)
            with self.admit(scope):
                await body.read()
                await self.check(body)
                await self.app(scope, body.receive, send_counted)
        except ApiError as error:
            response = error.response()
            if not await body.discard():
                response.headers["Connection"] = "close"
            await response(scope, receive, send_counted)
        except ClientDisconnect:
            pass  # before the body was complete

    async def check(self, body: RequestBody) -> None:
        """Raises ApiError if the body's structure is refused."""
        if len(body.content) <= SMALL_BODY:
            check_structure(body.content)
        else:
            await self.api.run_in_thread(lambda: check_structure(body.content))

    def identify(self, scope: Any) -> str:
        """The client's name in the queue: the number of its key, or its address where no key is required.

        Raises ApiError if the key is wrong; without keys, if the request is not addressed to this machine.
        """
        keys = self.api.settings.api_keys
        if not keys:
            check_addressed(scope, self.api.settings)
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

    @contextlib.contextmanager
    def admit(self, scope: Any) -> Iterator[None]:
        """Count a generating request as active. Raises ApiError if it is refused, before its body is read."""
        if scope["path"] not in self.generating_paths or scope["method"] != "POST":
            yield
            return
        if self.api.closing:
            retry = {"Retry-After": "5"}
            raise ApiError(503, "the server is shutting down", "server_error", code="unavailable", headers=retry)
        if self.api.active >= self.api.settings.max_requests:
            retry = {"Retry-After": "1"}
            raise ApiError(429, "too many requests are active", "rate_limit_error", code="server_busy", headers=retry)
        self.api.active += 1
        try:
            yield
        finally:
            self.api.active -= 1
