"""Responses: POST /v1/responses, OpenAI's newer form of a chat. Clients send whole conversations.

Nothing is stored, but recent answers are kept in memory by their ids: the AI SDK sends an answer's id in place of its
text, unless the request has `store: false`.
"""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from typing_extensions import TypedDict

from nanochat.inference.request import Token
from nanochat.serve import answers
from nanochat.serve.api import ApiDependency
from nanochat.serve.errors import ApiError
from nanochat.serve.generation import Generation
from nanochat.serve.responses_request import ResponsesRequest, TextFormat, generation_request
from nanochat.serve.routes_chat import ChosenLogprob, logprob_entries

MAX_RECENT = 1000  # answers that can be referred to by their ids

router = APIRouter()

# ---------------------------------------------------------------------------------------------------
# Answers


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenLogprob]


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponseAnswer(TypedDict):
    """The fields that the answer decides; the others repeat the request's."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: None
    incomplete_details: dict[str, str] | None
    output: list[OutputMessage]
    usage: dict[str, Any] | None


class ResponseObject:
    """The response to one request, as it is at the moment."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        self.generation, self.body = generation, body
        (self.sample,) = generation.samples[0]
        self.item_id = f"msg_{uuid.uuid4().hex}"
        sampling = generation.handles[0].request.sampling
        form = (body.text and body.text.format) or TextFormat.model_validate({"type": "text"})
        self.fields = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": generation.api.settings.model_name,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": body.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "truncation": body.truncation or "auto",
        }

    @property
    def status(self) -> Literal["in_progress", "completed", "incomplete"]:
        return {None: "in_progress", "stop": "completed", "length": "incomplete"}[self.sample.finish_reason]  # type: ignore[return-value]

    def logprobs(self, tokens: list[Token]) -> list[ChosenLogprob]:
        return list(logprob_entries(self.generation.api.tokenizer, tokens, self.body.top_logprobs or 0))

    def part(self) -> OutputText:
        logprobs = self.logprobs(self.sample.tokens)
        return {"type": "output_text", "text": self.sample.text, "annotations": [], "logprobs": logprobs}

    def item(self, content: list[OutputText]) -> OutputMessage:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": self.status, "content": content}

    def usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "dropped_messages": usage["dropped_messages"],
        }

    def whole(self, error: Any = None) -> dict[str, Any]:
        """As JSON; with `error`, failed."""
        status, running = "failed" if error else self.status, self.status == "in_progress"
        return {
            **self.fields,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [] if running else [self.item([self.part()])],
            "usage": None if running else self.usage(),
        }

    def remember(self) -> None:
        """Keep the answer's text for requests that refer to it. On the event loop only."""
        recent = self.generation.api.recent_answers
        if self.body.store is not False:
            recent[self.item_id] = self.sample.text
        while len(recent) > MAX_RECENT:
            del recent[next(iter(recent))]

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream without their sequence numbers. A tool call is not part of the text."""
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        yield {"type": "response.created", "response": self.whole()}
        yield {"type": "response.in_progress", "response": self.whole()}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self.item([])}
        yield {"type": "response.content_part.added", **place, "part": self.part()}
        try:
            async for update in self.generation.updates():
                text = "".join(text for kind, text in update.pieces if kind == "text")
                logprobs = self.logprobs(update.tokens)
                if text or logprobs:
                    yield {"type": "response.output_text.delta", **place, "delta": text, "logprobs": logprobs}
        except ApiError as error:
            detail = error.body["error"]
            failed = {"code": detail["code"] or detail["type"], "message": detail["message"]}
            yield {"type": "response.failed", "response": self.whole(failed)}
            return
        part = self.part()
        yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": part["logprobs"]}
        yield {"type": "response.content_part.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": 0, "item": self.item([part])}
        self.remember()
        yield {"type": f"response.{self.status}", "response": self.whole()}

    async def numbered_events(self) -> AsyncIterator[dict[str, Any]]:
        number = 0
        async for event in self.events():
            yield {**event, "sequence_number": number}
            number += 1


# ---------------------------------------------------------------------------------------------------
# Routes


@router.post("/v1/responses", responses=answers.whole_or_streamed(ResponseAnswer))
async def create(body: ResponsesRequest, http: Request, api: ApiDependency) -> Any:
    api.check_model(body.model)
    request = await api.run_in_thread(lambda: generation_request(api, body))
    generation = Generation(api, http, [request], body.stop, api.settings.chat_model)
    response = ResponseObject(generation, body)
    if body.stream:
        return answers.stream(generation, response.numbered_events(), done=False)
    answer = await answers.whole_json(generation, response.whole)
    response.remember()
    return answer


@router.get("/v1/responses/{path:path}", include_in_schema=False)
@router.delete("/v1/responses/{path:path}", include_in_schema=False)
async def stored(path: str) -> None:
    raise ApiError(404, "responses are not stored: keep what POST /v1/responses answers", code="not_stored")
