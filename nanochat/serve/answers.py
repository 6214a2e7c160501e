"""A Generation as an HTTP response: whole as JSON, or streamed as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from fastapi.responses import Response
from sse_starlette.sse import EventSourceResponse

from nanochat.serve.errors import ApiError
from nanochat.serve.generation import Generation

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
ANSWER_LEVELS = 5  # an answer's choices[i].logprobs.content[j] is one piece of JSON
PING_SECONDS = 15

json_text = json.JSONEncoder(ensure_ascii=False).encode


def whole_or_streamed(model: Any) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with `model`, or streams where the request says so."""
    return {200: {"model": model, "content": EVENTS, "description": "The answer; with stream: true, its events"}}


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def head(generation: Generation, prefix: str, kind: str) -> dict[str, Any]:
    """The first fields of every chunk of a stream."""
    return {"id": new_id(prefix), "object": kind, "created": now(), "model": generation.api.settings.model_name}


async def whole(generation: Generation, make_answer: Callable[[], Mapping[str, Any]]) -> Response:
    """Generate everything, then answer as JSON. Raises ApiError."""

    def encode() -> bytes:
        return b"".join(piece.encode() for piece in json_pieces(make_answer(), ANSWER_LEVELS))

    await generation.run()
    return Response(await generation.api.run_in_thread(encode), media_type="application/json")


def stream(generation: Generation, events: AsyncIterator[Any], done: bool = True) -> Response:
    """Server-sent events; with `done`, [DONE] at the end. An error is the last event instead."""

    async def lines() -> AsyncIterator[dict[str, str]]:
        try:
            async for event in events:
                yield {"data": json_text(event)}
            if done:
                yield {"data": "[DONE]"}
        except ApiError as error:
            yield {"data": json_text(error.body)}
        finally:
            generation.close()

    return EventSourceResponse(lines(), ping=PING_SECONDS, sep="\n", headers={"X-Accel-Buffering": "no"})


def json_pieces(value: Any, levels: int) -> Iterator[str]:
    """JSON of a value, with iterators as lists, in pieces; values `levels` deep are one piece each.

    With log probabilities an answer has megabytes: encoding it in one call would block all other threads meanwhile.
    """
    if levels and isinstance(value, dict):
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield f"{', ' if number else ''}{json_text(key)}: "
            yield from json_pieces(item, levels - 1)
        yield "}"
    elif levels and isinstance(value, list | Iterator):
        yield "["
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from json_pieces(item, levels - 1)
        yield "]"
    else:
        yield json_text(value)
