"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, whatever their cause."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Every error, whatever its cause."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "What was wrong, and where"},
    "5XX": {"model": ErrorAnswer, "description": "Not the client's fault"},
}


def encodable(text: str) -> str:
    """The text with halves of surrogate pairs, which a name in JSON may have, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class FieldError(ValueError):
    """What a validator of a whole body finds wrong with one of its fields. Pydantic itself adds where the body is."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class ApiError(Exception):
    """An error to be sent to the client. `kind` is OpenAI's error type; `param` the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        param = param and encodable(param)
        self.body: ErrorAnswer = {"error": {"message": encodable(message), "type": kind, "param": param, "code": code}}

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """This error with another name of the field at fault, where `names` has one."""
        detail = self.body["error"]
        name = detail["param"] or ""
        message = detail["message"].replace(name, names.get(name, name), 1)
        return ApiError(
            self.status, message, detail["type"], names.get(name, name) or None, detail["code"], self.headers
        )

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def describe_validation_error(error: RequestValidationError, content_type: str) -> ApiError:
    """The first field at fault, by its dotted path, and the reason."""
    first = error.errors()[0]
    path, kind = [str(part) for part in first.get("loc", ()) if part != "body"], first.get("type")
    if isinstance(cause := first.get("ctx", {}).get("error"), FieldError):
        path.append(cause.field)
    param, message = ".".join(path) or None, first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        param, message = None, f"the body is not JSON: {first.get('ctx', {}).get('error')} at character {path[-1]}"
    elif param is None and kind == "missing":
        message = "the body is empty; it must be a JSON object"
    elif param is None and kind == "model_attributes_type":
        message = "the body must be a JSON object" + (
            "" if "json" in content_type else " with Content-Type: application/json"
        )
    where = f"{param}{role_of_message(error.body, path)}"
    return ApiError(400, f"{where}: {message}" if param else message, param=param)


def role_of_message(body: Any, path: Sequence[str]) -> str:
    """ " (role 'user')" if the field at `path` is a message's, and it has a role."""
    try:
        role = body[path[0]][int(path[1])]["role"]
    except (KeyError, IndexError, TypeError, ValueError):
        return ""
    return f" (role {str(role)[:40]!r})"


def describe_http_error(request: Request, error: HTTPException) -> ApiError:
    message = str(error.detail)
    if error.status_code == 400:
        message = "the body cannot be read as JSON in UTF-8, with numbers of at most 4300 digits"
    elif error.status_code == 405 and error.headers:
        message = f"{request.method} is not possible here; use {error.headers.get('Allow')}"
    return ApiError(error.status_code, message, headers=error.headers)


def wrong_path(request: Request) -> ApiError:
    """404; names the path that is there with /v1 before it, or less before it."""
    path = request.scope["path"]  # not of request.url, which fails on a Host that is no URL's
    for candidate in ("/v1" + path, path[max(0, path.rfind("/v1/")) :], path.removeprefix("/v1")):
        scope = {**request.scope, "path": candidate}
        if candidate != path and any(route.matches(scope)[0] != Match.NONE for route in request.app.router.routes):
            hint = f"{candidate} is meant: an OpenAI client's base URL ends in one /v1"
            return ApiError(404, f"there is no {path[:200]!r}; probably {hint}", code="unknown_path")
    return ApiError(404, f"there is no {path[:200]!r}; OpenAI's API is at /v1", code="unknown_path")


async def handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError | HTTPException | ApiError):
        forget_frames(error)
    if isinstance(error, RequestValidationError):
        error = describe_validation_error(error, request.headers.get("content-type", ""))
    elif isinstance(error, HTTPException):
        error = wrong_path(request) if error.status_code == 404 else describe_http_error(request, error)
    elif not isinstance(error, ApiError):  # uvicorn logs the traceback
        error = ApiError(500, "the server failed on this request", "server_error")
    return error.response()


def forget_frames(error: BaseException | None) -> None:
    """Break the cycle error -> traceback -> frame -> error, which would keep a refused body in memory until the garbage
    collector finds it."""
    while error is not None:
        error.__traceback__, error = None, error.__context__


ERROR_HANDLERS: dict[int | type[Exception], Any] = dict.fromkeys(
    (ApiError, RequestValidationError, HTTPException, Exception), handle_error
)
