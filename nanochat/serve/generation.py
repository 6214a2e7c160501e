"""One request's life: orders to the pool, tokens back, answers in OpenAI's shapes, streamed or whole."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi.responses import JSONResponse

from nanochat.inference.request import GenerationRequest, Token
from nanochat.serve.service import Busy, Closed, Finished, RequestHandle, WorkerPool
from nanochat.serve.text import SampleText, TextOffsets, chat_logprobs, completion_logprobs
from nanochat.serve.types import ChatRequest, CompletionRequest

MOST_UNREAD = 2048  # tokens kept for a client that does not read for so many seconds; then its request ends
UNREAD_SECONDS = 5.0
ECHO_TOKENS = 64  # of a prompt that is sent back with log probabilities, in one event
TURN_SECONDS = 0.003  # of each round of the event loop, for all answers together

Event = dict[str, Any]
Head = Callable[[str, str], Event]  # Api.head: kind and prefix to what every answer begins with


@dataclass
class Settings:
    """What the operator decides. Times in seconds."""

    model_name: str = "nanochat"
    api_keys: Sequence[str] = ()  # any of them opens; empty: none is asked for
    cors_origins: Sequence[str] = ()
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512  # of a chat's answer, unless the request says otherwise
    most_tokens: int = 4096  # that a request may ask for
    request_seconds: float = 300.0
    body_bytes: int = 4 * 2**20
    max_requests: int = 256  # under way at once, streams that wait to be read included
    drain_seconds: float = 30.0
    answers: bool = True  # the model was taught to answer: chats are rendered; a base model continues the last message


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Turns:
    """What all answers together may keep the event loop busy with before it does what else is ready.

    A step of the model gives every answer a token at once, and with log probabilities each takes a millisecond. A
    question after the server's health takes some rounds of the loop, and would wait for all of them in each.
    """

    def __init__(self) -> None:
        self._until: float | None = None  # in this round of the loop

    async def mine(self) -> None:
        """Returns when the caller may go on, in this round or in a later one."""
        while self._until is not None and time.monotonic() > self._until:
            await asyncio.sleep(0)
        if self._until is None:
            self._until = time.monotonic() + TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._next_round)

    def _next_round(self) -> None:
        self._until = None


class Generation:
    """Samples of one or more prompts, from the pool to the client."""

    def __init__(self, pool: WorkerPool, tokenizer: Any, settings: Settings, client: str, turns: Turns) -> None:
        self.client, self.turns = client, turns
        self.pool, self.tokenizer, self.settings = pool, tokenizer, settings
        self.name = uuid.uuid4().hex
        self.queue: asyncio.Queue[tuple[int, list[Token] | Finished]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.tickets: list[RequestHandle] = []
        self.texts: list[list[SampleText]] = []  # by order, then by sample
        self.retried: set[int] = set()
        self.unread = 0  # tokens in the queue
        self._writing_since: float | None = None  # what was taken last, which waits where the client does not read
        self._too_slow = False

    def submit(self, orders: Sequence[GenerationRequest], stop: Sequence[str], chat: bool) -> None:
        """Hand the orders in. Raises ApiError; then none of them goes on."""
        try:
            for number, order in enumerate(orders):
                self.texts.append([SampleText(self.tokenizer, stop, chat) for _ in range(order.num_samples)])
                order = replace(order, client=self.client, group=self.name)
                self.tickets.append(self.pool.submit(order, self._receiver(number), more=number > 0))
        except Busy as error:
            self.cancel()
            retry = {"Retry-After": str(math.ceil(error.retry_after))}
            raise ApiError(429, str(error), "rate_limit_error", code="server_busy", headers=retry) from error
        except Closed as error:
            self.cancel()
            raise ApiError(503, str(error), "server_error", code="unavailable") from error
        except ValueError as error:
            self.cancel()
            raise ApiError(400, str(error)) from error

    def _receiver(self, number: int) -> Callable[[list[Token] | Finished], None]:
        def receive(what: list[Token] | Finished) -> None:  # on the service's thread
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self._arrived, number, what)

        return receive

    def _arrived(self, number: int, what: list[Token] | Finished) -> None:
        if isinstance(what, list):
            self.unread += len(what)
            # Many tokens alone say nothing about the client: the event loop may be behind.
            since = self._writing_since
            if self.unread > MOST_UNREAD and since is not None and time.monotonic() - since > UNREAD_SECONDS:
                self._too_slow = True
                self.cancel()
                return
        self.queue.put_nowait((number, what))

    async def pieces(self) -> AsyncIterator[tuple[int, int, list[tuple[str, str]], list[Token], bool]]:
        """(order, sample, new pieces of text, the tokens behind them, whether the sample ended) as they come.

        Raises ApiError where a replica died, time ran out, or the client does not read.
        """
        async for piece in self._pieces():
            self._writing_since = time.monotonic()
            yield piece
            self._writing_since = None

    async def _pieces(self) -> AsyncIterator[tuple[int, int, list[tuple[str, str]], list[Token], bool]]:
        left = len(self.tickets)
        ended = [[False] * len(samples) for samples in self.texts]
        deadline = time.monotonic() + self.settings.request_seconds
        while left:
            try:
                number, what = await asyncio.wait_for(self.queue.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self.cancel()
                raise ApiError(
                    504,
                    f"the answer took more than {self.settings.request_seconds:g} s",
                    "server_error",
                    code="timeout",
                ) from None
            if self._too_slow:
                raise ApiError(408, "the answer was not read", code="client_too_slow")
            ticket, texts = self.tickets[number], self.texts[number]
            if isinstance(what, list):
                self.unread -= len(what)
            if isinstance(what, Finished):
                if what.error is not None and self._tried_again(number, what.error):
                    continue
                left -= 1
                if what.error is not None:
                    self.cancel()
                    gone = isinstance(what.error, Closed)
                    raise ApiError(
                        503 if gone else 500,
                        "the server is shutting down" if gone else "the model failed on this request; try again",
                        "server_error",
                    )
                for index, text in enumerate(texts):
                    if not ended[number][index]:
                        ended[number][index] = True
                        yield number, index, text.finish(), [], True
                continue
            for token in what:
                await self.turns.mine()
                index = token.sequence.index
                text = texts[index]
                if ended[number][index] or len(text.tokens) >= ticket.order.max_tokens:
                    continue
                if token.mask and token.sequence.end is not None and token.id == token.sequence.end:  # it says nothing
                    if token.logprobs is not None and not text.chat:  # but it was drawn, and harnesses count on it
                        text.tokens.append(token)
                        yield number, index, [], [token], False
                    continue
                pieces = text.feed(token)
                if text.stopped:
                    ended[number][index] = True
                    ticket.cancel(index)
                yield number, index, pieces, [token], text.stopped

    def _tried_again(self, number: int, error: Exception) -> bool:
        """Give an order whose replica died to another one, once, if the client has nothing of it yet."""
        if isinstance(error, Closed) or number in self.retried or any(text.tokens for text in self.texts[number]):
            return False
        self.retried.add(number)
        try:
            self.tickets[number] = self.pool.submit(self.tickets[number].order, self._receiver(number), more=True)
        except (Busy, Closed):
            return False
        return True

    def cancel(self) -> None:
        """Free all rows; safe to call at any time."""
        for ticket in self.tickets:
            ticket.cancel()

    def finish_reason(self, number: int, index: int) -> str:
        stopped = self.texts[number][index].stopped or self.tickets[number].sequences[index].end is not None
        return "stop" if stopped else "length"

    def usage(self) -> dict[str, int]:
        prompt = sum(len(ticket.order.prompt) for ticket in self.tickets)
        made = sum(len(text.tokens) for samples in self.texts for text in samples)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


# ---------------------------------------------------------------------------------------------------
# Answers


def chat_events(head_of: Head, generation: Generation, request: ChatRequest) -> AsyncIterator[Event]:
    """The chunks of a streamed chat completion."""
    head, top = head_of("chat.completion.chunk", "chatcmpl"), request.top_logprobs or 0

    async def events() -> AsyncIterator[dict[str, Any]]:
        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            usage = {"usage": None} if request.stream_options and request.stream_options.include_usage else {}
            return {**head, "choices": [choice], **usage}

        for index in range(request.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for _, index, pieces, tokens, ended in generation.pieces():
            told = {"content": list(chat_logprobs(generation.tokenizer, tokens, top))} if request.logprobs else None
            for kind, text in pieces or ([("text", "")] if told and told["content"] else []):
                # Tool calls are no text of the answer; this system's own page shows them.
                delta: dict[str, Any] = {"content": text} if kind == "text" else {"tool": {"kind": kind, "text": text}}
                yield chunk(index, delta, None, told)
                told = None
            if ended:
                yield chunk(index, {}, generation.finish_reason(0, index))
        if request.stream_options and request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": generation.usage()}

    return events()


def published_events(generation: Generation) -> AsyncIterator[Event]:
    """The published form: {"token": text} for each piece, then {"done": true}."""

    async def events() -> AsyncIterator[dict[str, Any]]:
        async for _, _, pieces, _, _ in generation.pieces():
            for _, text in pieces:
                yield {"token": text, "gpu": 0}
        yield {"done": True}

    return events()


def chat_answer(head_of: Head, generation: Generation, request: ChatRequest) -> Event:
    """The whole chat completion; its log probabilities are iterators (server.json_pieces)."""
    choices, top = [], request.top_logprobs or 0
    for index, text in enumerate(generation.texts[0]):
        tools = [{"kind": kind, "text": part} for kind, part in text.pieces if kind != "text"]
        message = {"role": "assistant", "content": text.text, "refusal": None, **({"tools": tools} if tools else {})}
        told = {"content": chat_logprobs(generation.tokenizer, text.tokens, top)} if request.logprobs else None
        choices.append(
            {"index": index, "message": message, "logprobs": told, "finish_reason": generation.finish_reason(0, index)}
        )
    return {**head_of("chat.completion", "chatcmpl"), "choices": choices, "usage": generation.usage()}


def completion_answer(head_of: Head, generation: Generation, request: CompletionRequest) -> Event:
    choices = []
    for number, (ticket, samples) in enumerate(zip(generation.tickets, generation.texts)):
        for index, text in enumerate(samples):
            ids, told = [token.id for token in text.tokens], [token.logprobs for token in text.tokens]
            before, parts, offsets = "", [], TextOffsets()
            if request.echo:
                before = generation.tokenizer.decode(echoed(ticket))
                if request.logprobs is not None:
                    parts = [
                        completion_logprobs(
                            generation.tokenizer, echoed(ticket), ticket.sequences[0].prompt_logprobs, offsets
                        )
                    ]
                    offsets.break_off()
            logprobs = None
            if request.logprobs is not None:
                parts.append(completion_logprobs(generation.tokenizer, ids, told, offsets))
                logprobs = {key: [one for part in parts for one in part[key]] for key in parts[0]}
            choices.append(
                {
                    "index": number * request.n + index,
                    "text": before + text.text,
                    "logprobs": logprobs,
                    "finish_reason": generation.finish_reason(number, index),
                }
            )
    return {**head_of("text_completion", "cmpl"), "choices": choices, "usage": generation.usage()}


def echoed(ticket: RequestHandle) -> list[int]:
    """The prompt's tokens, without the bos that every prompt starts with."""
    return list(ticket.order.prompt)[1:]


def echo_parts(
    tokenizer: Any, ticket: RequestHandle, offsets: TextOffsets, logprobs: bool
) -> Iterator[tuple[str, Any]]:
    """The prompt as (text, log probabilities), in parts that are quickly made; once the model has read it."""
    ids = echoed(ticket)
    text, told = tokenizer.decode(ids), ticket.sequences[0].prompt_logprobs
    if not logprobs:
        yield text, None
        return
    for first in range(0, len(ids), ECHO_TOKENS):
        cut, start = slice(first, first + ECHO_TOKENS), offsets.end
        part = completion_logprobs(tokenizer, ids[cut], told[cut], offsets)
        if first + ECHO_TOKENS >= len(ids):
            offsets.break_off()
        yield text[start : offsets.end], part


def completion_events(head_of: Head, generation: Generation, request: CompletionRequest) -> AsyncIterator[Event]:
    """The chunks of a streamed completion."""
    head = head_of("text_completion", "cmpl")

    async def events() -> AsyncIterator[dict[str, Any]]:
        def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]}

        offsets: dict[int, TextOffsets] = {}  # by choice
        tokenizer, logprobs = generation.tokenizer, request.logprobs is not None
        async for number, index, pieces, tokens, ended in generation.pieces():
            at = number * request.n + index
            if at not in offsets:
                offsets[at] = TextOffsets()
                if request.echo:
                    for text, told in echo_parts(tokenizer, generation.tickets[number], offsets[at], logprobs):
                        yield chunk(at, text, None, told)
                        await generation.turns.mine()
            told = None
            if logprobs and tokens:
                told = completion_logprobs(tokenizer, [t.id for t in tokens], [t.logprobs for t in tokens], offsets[at])
            for _, text in pieces or ([("text", "")] if told else []):
                yield chunk(at, text, None, told)
                told = None
            if ended:
                yield chunk(at, "", generation.finish_reason(number, index))
        if request.stream_options and request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": generation.usage()}

    return events()
