"""Around every request: keys, limits of size, security headers, errors in OpenAI's form, counting."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.api_generation import ApiError, Settings

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class BodyLimit:
    """Refuses bodies over a limit, whether their length is announced or not."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        error = ApiError(413, f"the request's body is larger than {self.most} bytes", code="request_too_large")
        if announced.isdigit() and int(announced) > self.most:
            await error.response()(scope, receive, send)
            return
        seen, refused = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise error
            return message

        async def answered(message: Any) -> None:  # whatever the application makes of the error, ours goes out
            nonlocal refused
            if seen <= self.most:
                await send(message)
            elif not refused:
                refused = True
                await error.response()(scope, receive, send)

        await self.app(scope, counted, answered)


def add_middleware(app: FastAPI, settings: Settings, count: Callable[[str, int], None]) -> None:
    """Wrap the application; `count` is told each request's path and status."""

    @app.middleware("http")
    async def around(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            check_key(request, settings)
            response = await go_on(request)
        except ApiError as error:
            response = error.response()
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        route = request.scope.get("route")
        count(getattr(route, "path", "other"), response.status_code)
        return response

    app.add_middleware(BodyLimit, most=settings.body_bytes)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
                           allow_headers=["Authorization", "Content-Type"])  # fmt: skip


def check_key(request: Request, settings: Settings) -> None:
    """Raises ApiError where a key is asked for and not given. The page itself and its health need none."""
    if not settings.api_key or request.url.path in ("/", "/health", "/health/live", "/health/ready"):
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Compared in constant time, as the bytes that were sent: headers are read as Latin-1.
    right = hmac.compare_digest(given.strip().encode("latin-1"), settings.api_key.encode())
    if scheme.lower() != "bearer" or not right:
        raise ApiError(401, "a wrong or missing API key; send Authorization: Bearer KEY", "authentication_error",
                       code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_fields(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first.get("loc", ()) if part != "body"]
        param = ".".join(where) or None
        if first.get("type") == "json_invalid":
            return ApiError(400, "the body is not JSON").response()
        return ApiError(400, f"{param}: {first['msg']}" if param else first["msg"], param=param).response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @app.exception_handler(RecursionError)
    async def of_depth(request: Request, error: RecursionError) -> Response:
        return ApiError(400, "the JSON is nested too deeply").response()

    @app.exception_handler(UnicodeDecodeError)
    async def of_bytes(request: Request, error: UnicodeDecodeError) -> Response:
        return ApiError(400, "the body is not UTF-8").response()
