"""A Generation as an HTTP response: whole as JSON, or streamed as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from fastapi.responses import Response
from sse_starlette.sse import EventSourceResponse
from typing_extensions import TypedDict

from nanochat.serve.errors import ApiError
from nanochat.serve.generation import Generation, Usage

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}
ANSWER_LEVELS = 5  # an answer's choices[i].logprobs.content[j] is one piece of JSON
PING_SECONDS = 15

json_text = json.JSONEncoder(ensure_ascii=False).encode


class Answer(TypedDict):
    """The fields of every whole answer but its choices."""

    id: str
    created: int
    model: str
    usage: Usage


def whole_or_streamed(model: Any) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with `model`, or streams where the request says so."""
    return {200: {"model": model, "content": EVENTS, "description": "The answer; with stream: true, its events"}}


def head(generation: Generation, prefix: str, kind: str) -> dict[str, Any]:
    """The first fields of a whole answer and of every chunk of a stream."""
    model = generation.api.settings.model_name
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


async def whole(generation: Generation, prefix: str, kind: str, choices: Callable[[], Iterable[Any]]) -> Response:
    """Generate everything, then answer with `choices()` as JSON. Raises ApiError."""

    def answer() -> dict[str, Any]:
        return {**head(generation, prefix, kind), "choices": choices(), "usage": generation.usage()}

    return await whole_json(generation, answer)


async def whole_json(generation: Generation, answer: Callable[[], dict[str, Any]]) -> Response:
    """Generate everything, then answer with `answer()` as JSON. Raises ApiError."""

    def encode() -> bytes:
        return b"".join(piece.encode() for piece in json_pieces(answer(), ANSWER_LEVELS))

    await generation.run()
    content = await generation.api.run_in_thread(encode)
    return Response(content, media_type="application/json", headers=generation.headers)


async def chunks(
    generation: Generation,
    prefix: str,
    kind: str,
    choices: AsyncIterator[Any],
    include_usage: bool,
    null_usage: bool = False,
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream, one for each of `choices`; with `include_usage`, a last one with the usage and timings.

    `null_usage`: the others then have the field as well, as null.
    """
    base = head(generation, prefix, kind)
    usage = {"usage": None} if include_usage and null_usage else {}
    async for choice in choices:
        yield {**base, "choices": [choice], **usage}
    if include_usage:
        yield {**base, "choices": [], "usage": generation.usage(), "timings": generation.timings()}


def stream(generation: Generation, events: AsyncIterator[Any], done: bool = True) -> Response:
    """Server-sent events, named by their "type" if they have one; with `done`, [DONE] at the end. An error is the last
    event instead."""

    async def lines() -> AsyncIterator[dict[str, str]]:
        try:
            async for event in events:
                name = {"event": event["type"]} if "type" in event else {}
                yield {**name, "data": json_text(event)}
            if done:
                yield {"data": "[DONE]"}
        except ApiError as error:
            yield {"data": json_text(error.body)}
        finally:
            generation.close()

    headers = {"X-Accel-Buffering": "no", **generation.headers}
    return EventSourceResponse(lines(), ping=PING_SECONDS, sep="\n", headers=headers)


def json_pieces(value: Any, levels: int) -> Iterator[str]:
    """JSON of a value, with iterators as lists, in pieces; values `levels` deep are one piece each.

    With log probabilities an answer has megabytes: encoding it in one call would block all other threads meanwhile, and
    json's own `iterencode` takes eight times as long.
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
