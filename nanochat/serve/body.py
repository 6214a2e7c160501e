"""A request's body: received whole, and its structure checked before it is parsed.

Python's JSON parser holds the interpreter lock until it is done, whichever thread it runs on: with 4 MiB of `{"a":1},`
it stops all other answers for 0.1 to 0.3 s. The number of strings, objects and values bounds that time; counting them
takes a few passes over the bytes, about 10 ms.
"""

import asyncio
import contextlib
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from nanochat.serve.errors import ApiError

MAX_DEPTH = 100
MAX_CONTAINERS = 10_000  # lists and objects
MAX_STRINGS = 40_000
MAX_VALUES = 500_000  # a batch of prompts is up to 256 lists of token ids

NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))

LINGER_SECONDS = (
    5.0  # to discard the body of a refused request: a client that is still sending does not read the reason
)
LINGER_BODIES = 16  # of the largest size


class RequestBody:
    """Reads a body, up to a limit, before the application gets it."""

    def __init__(self, scope: Any, receive: Any, max_bytes: int) -> None:
        self._receive, self.max_bytes = receive, max_bytes
        self.headers = Headers(scope=scope)
        self.content = bytearray()
        self.complete = self.passed_on = False

    async def _read_piece(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self.complete = not message.get("more_body", False)
        return message.get("body", b"")

    async def read(self) -> None:
        """Raises ApiError if the body is too large, announced or not; ClientDisconnect if it does not come whole."""
        announced = self.headers.get("content-length", "0")
        too_large = announced.isdecimal() and int(announced[:20]) > self.max_bytes
        while not too_large and not self.complete:
            self.content += await self._read_piece()
            too_large = len(self.content) > self.max_bytes
        if too_large:
            raise ApiError(413, f"the request's body is larger than {self.max_bytes} bytes", code="request_too_large")

    async def receive(self) -> Any:
        """For the application: the whole body, then what else the server sends."""
        if self.passed_on:
            return await self._receive()
        self.passed_on = True
        content, self.content = bytes(self.content), bytearray()
        return {"type": "http.request", "body": content, "more_body": False}

    async def discard(self) -> bool:
        """Read the rest, for a limited time and size; returns whether the body is complete."""
        remaining = LINGER_BODIES * self.max_bytes
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete and remaining > 0 and "expect" not in self.headers:
                    remaining -= len(await self._read_piece())
        return self.complete


def check_structure(body: bytes | bytearray) -> None:
    """Raise ApiError if the body is not UTF-8, or is JSON with more levels, objects, strings or values than any request
    needs. Of other faults nothing is said here: up to the first of them, strings are found as the parser finds them."""
    if 0 in body:  # JSON in UTF-16 or UTF-32, which Python would parse
        raise ApiError(400, "the body is not UTF-8")
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * MAX_STRINGS:
        raise ApiError(400, f"the JSON has more than {MAX_STRINGS} strings")
    outside = b"".join(unescaped.split(b'"')[::2])  # of strings
    brackets = outside.translate(None, NOT_BRACKETS)
    depth = deepest = 0
    for bracket in brackets[: 2 * MAX_CONTAINERS]:
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ApiError(400, f"the JSON is nested too deeply: more than {MAX_DEPTH} levels")
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise ApiError(400, f"the JSON has more than {MAX_CONTAINERS} lists and objects")
    if outside.count(b",") > MAX_VALUES:
        raise ApiError(400, f"the JSON has more than {MAX_VALUES} values")
