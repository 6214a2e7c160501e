"""Around every request: keys, limits, security headers, errors in OpenAI's form, counting."""

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.serve.generation import ApiError, Settings

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
OPEN_PATHS = ("/", "/health", "/health/live", "/health/ready")  # need no key
GENERATING_PATHS = ("/v1/chat/completions", "/v1/completions", "/chat/completions")
LINGER_SECONDS = 5.0  # to take in and throw away a body that is refused, so that the client reads why


@dataclass
class Door:
    """Who may come in: how many answers are under way, and whether the server is shutting down."""

    under_way: int = 0
    closing: bool = False


class Guard:
    """ASGI middleware. `count` is told each request's path and status."""

    def __init__(self, app: Any, door: Door, settings: Settings, count: Callable[[str, int], None]) -> None:
        self.app, self.door, self.settings, self.count = app, door, settings, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        exchange = Exchange(scope, receive, send, self.settings.body_bytes, self.count)
        try:
            scope.setdefault("state", {})["client"] = client_of(scope, self.settings.api_keys)
            exchange.check_announced()
            if scope["path"] in GENERATING_PATHS and scope["method"] == "POST":
                await self.admit(scope, exchange)
            else:
                await self.app(scope, exchange.receive, exchange.send)
            if exchange.error:
                raise exchange.error
        except ApiError as error:
            await exchange.refuse(error)

    async def admit(self, scope: Any, exchange: "Exchange") -> None:
        """Let a request for an answer in, if there is room, and count it until its answer is sent."""
        if self.door.closing:
            raise ApiError(
                503, "the server is shutting down", "server_error", code="unavailable", headers={"Retry-After": "5"}
            )
        if self.door.under_way >= self.settings.max_requests:
            raise ApiError(
                429,
                "too many requests are under way",
                "rate_limit_error",
                code="server_busy",
                headers={"Retry-After": "1"},
            )
        self.door.under_way += 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.door.under_way -= 1


class Exchange:
    """One request and its answer: the body is bounded whether its length is announced or not."""

    def __init__(self, scope: Any, receive: Any, send: Any, most: int, count: Callable[[str, int], None]) -> None:
        self.scope, self._receive, self._send, self.most, self.count = scope, receive, send, most, count
        self.seen = 0
        self.whole = self.started = False
        self.error: ApiError | None = None  # goes out whatever the application makes of it

    def too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self.most} bytes", code="request_too_large")

    def check_announced(self) -> None:
        announced = Headers(scope=self.scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self.most:
            raise self.too_large()

    async def receive(self) -> Any:
        if self.error:
            raise self.error
        message = await self._receive()
        self.whole = self.whole or not message.get("more_body", False)
        self.seen += len(message.get("body", b""))
        if self.seen > self.most:
            self.error = self.too_large()
            raise self.error
        return message

    async def send(self, message: Any) -> None:
        if self.error and not self.started:
            return  # `refuse` answers
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            self.count(getattr(self.scope.get("route"), "path", "other"), message["status"])
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, after the rest of the body: a client that is still sending would not read it."""
        if self.started:
            return
        self.error = None
        if "expect" not in Headers(scope=self.scope):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._linger(), LINGER_SECONDS)
        response = error.response()
        if not self.whole:
            response.headers["Connection"] = "close"
        await response(self.scope, self._receive, self.send)

    async def _linger(self) -> None:
        left = 16 * self.most
        while not self.whole and left > 0:
            message = await self._receive()
            left -= len(message.get("body", b""))
            self.whole = not message.get("more_body", False)


def client_of(scope: Any, keys: Sequence[str]) -> str:
    """Who asks: a key's number, or an address where there are no keys. Raises ApiError where the key is wrong.

    The page itself and its health need none.
    """
    address = scope["client"][0] if scope.get("client") else ""
    if not keys or scope["path"] in OPEN_PATHS:
        return address
    scheme, _, given = Headers(scope=scope).get("Authorization", "").partition(" ")
    # Compared in constant time, all of them, as the bytes that were sent: headers are read as Latin-1.
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


def add_middleware(app: FastAPI, door: Door, settings: Settings, count: Callable[[str, int], None]) -> None:
    """Wrap the application."""
    app.add_middleware(Guard, door=door, settings=settings, count=count)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_fields(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where, kind = [str(part) for part in first.get("loc", ()) if part != "body"], first.get("type")
        param, says = ".".join(where) or None, first["msg"].removeprefix("Value error, ")
        if kind == "json_invalid":
            param, says = None, f"the body is not JSON: {first.get('ctx', {}).get('error')} at character {where[-1]}"
        elif param is None and kind == "missing":
            says = "the body is empty; it must be a JSON object"
        elif param is None and kind == "model_attributes_type":
            declared = "json" in request.headers.get("content-type", "")
            says = "the body must be a JSON object" + ("" if declared else " with Content-Type: application/json")
        return ApiError(400, f"{param}: {says}" if param else says, param=param).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        says = "the body cannot be read as JSON in UTF-8" if error.status_code == 400 else str(error.detail)
        return ApiError(error.status_code, says, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def of_nobody(request: Request, error: Exception) -> Response:  # uvicorn logs it
        return ApiError(500, "the server failed on this request", "server_error").response()

    @app.exception_handler(RecursionError)
    async def of_depth(request: Request, error: RecursionError) -> Response:
        return ApiError(400, "the JSON is nested too deeply").response()

    @app.exception_handler(UnicodeDecodeError)
    async def of_bytes(request: Request, error: UnicodeDecodeError) -> Response:
        return ApiError(400, "the body is not UTF-8").response()
