"""The HTTP API: create_app() on FastAPI, in OpenAI's shapes, over a WorkerPool.

The event loop only parses, formats and passes on; the model runs on the services' threads. A client that goes away
frees its rows within a step. Every error has OpenAI's form: {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat.api_text import SampleText, chat_logprobs, completion_logprobs
from nanochat.api_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    PublishedChatRequest,
    TokenizeRequest,
)
from nanochat.api_types import Request as GenerateRequest
from nanochat.conversation import drop_oldest_turns, render_prompt
from nanochat.decoding import Token
from nanochat.sampling import Sampling
from nanochat.service import Busy, Closed, End, Order, Ticket, WorkerPool

CONTENT_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass
class Settings:
    """What the operator decides. Times in seconds."""

    model_name: str = "nanochat"
    api_key: str = ""  # empty: none is asked for
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
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


@dataclass
class Metrics:
    """What Prometheus reads."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        def times(name: str, what: str) -> Histogram:
            buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
            return Histogram(f"nanochat_{name}", what, registry=self.registry, buckets=buckets)

        self.requests = Counter("nanochat_requests", "Requests by path and status", ["path", "status"],
                                registry=self.registry)  # fmt: skip
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.made_tokens = Counter("nanochat_completion_tokens", "Tokens generated", registry=self.registry)
        self.times = {
            "first_token_seconds": times("first_token_seconds", "From a request to its first token"),
            "between_tokens_seconds": times("between_tokens_seconds", "From one token of a request to the next"),
            "step_seconds": times("step_seconds", "One step of the running batch"),
        }
        self.rows = Histogram("nanochat_batch_rows", "Rows decoded together", registry=self.registry,
                              buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128))  # fmt: skip

    def observe(self, name: str, value: float) -> None:
        """For Service(observe=...); called on its thread."""
        if name == "batch_rows":
            self.rows.observe(value)
        else:
            self.times[name].observe(value)


# ---------------------------------------------------------------------------------------------------
# One request's life


class Generation:
    """Samples of one or more prompts, from the pool to the client."""

    def __init__(self, pool: WorkerPool, tokenizer: Any, settings: Settings) -> None:
        self.pool, self.tokenizer, self.settings = pool, tokenizer, settings
        self.queue: asyncio.Queue[tuple[int, list[Token] | End]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.tickets: list[Ticket] = []
        self.texts: list[list[SampleText]] = []  # by order, then by sample

    def submit(self, orders: Sequence[Order], stop: Sequence[str], chat: bool) -> None:
        """Hand the orders in. Raises ApiError; then none of them goes on."""
        try:
            for number, order in enumerate(orders):
                self.texts.append([SampleText(self.tokenizer, stop, chat) for _ in range(order.samples)])
                self.tickets.append(self.pool.submit(order, self._receiver(number)))
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

    def _receiver(self, number: int) -> Callable[[list[Token] | End], None]:
        def receive(what: list[Token] | End) -> None:  # on the service's thread
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.queue.put_nowait, (number, what))

        return receive

    async def pieces(self) -> AsyncIterator[tuple[int, int, list[tuple[str, str]], list[Token], bool]]:
        """(order, sample, new pieces of text, the tokens behind them, whether the sample ended) as they come.

        Raises ApiError where a replica died, or time ran out.
        """
        left = len(self.tickets)
        ended = [[False] * len(samples) for samples in self.texts]
        deadline = time.monotonic() + self.settings.request_seconds
        while left:
            try:
                number, what = await asyncio.wait_for(self.queue.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                self.cancel()
                raise ApiError(504, f"the answer took more than {self.settings.request_seconds:g} s", "server_error",
                               code="timeout") from None  # fmt: skip
            ticket, texts = self.tickets[number], self.texts[number]
            if isinstance(what, End):
                left -= 1
                if what.error is not None:
                    self.cancel()
                    gone = isinstance(what.error, Closed)
                    raise ApiError(503 if gone else 500, "the server is shutting down" if gone else
                                   "the model failed on this request; try again", "server_error")  # fmt: skip
                for index, text in enumerate(texts):
                    if not ended[number][index]:
                        ended[number][index] = True
                        yield number, index, text.finish(), [], True
                continue
            for token in what:
                index = token.row.index
                text = texts[index]
                if ended[number][index] or len(text.tokens) >= ticket.order.max_tokens:
                    continue
                if token.mask and token.row.end is not None and token.id == token.row.end:
                    continue  # the token that ended the row says nothing
                pieces = text.feed(token)
                if text.stopped:
                    ended[number][index] = True
                    ticket.cancel(index)
                yield number, index, pieces, [token], text.stopped

    def cancel(self) -> None:
        """Free all rows; safe to call at any time."""
        for ticket in self.tickets:
            ticket.cancel()

    def finish_reason(self, number: int, index: int) -> str:
        stopped = self.texts[number][index].stopped or self.tickets[number].rows[index].end is not None
        return "stop" if stopped else "length"

    def usage(self) -> dict[str, int]:
        prompt = sum(len(ticket.order.prompt) for ticket in self.tickets)
        made = sum(len(text.tokens) for samples in self.texts for text in samples)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


# ---------------------------------------------------------------------------------------------------
# The application


class Api:
    """The routes' state: the pool, the settings, what is under way."""

    def __init__(self, pool: WorkerPool, tokenizer: Any, settings: Settings, metrics: Metrics) -> None:
        self.pool, self.tokenizer, self.settings, self.metrics = pool, tokenizer, settings, metrics
        self.started = time.time()
        self.under_way = 0
        self.closing = False

    # -- requests to orders ---------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        return self.pool.services[0].max_context

    def sampling(self, request: GenerateRequest) -> Sampling:
        settings = self.settings
        return Sampling(settings.temperature if request.temperature is None else request.temperature,
                        settings.top_k if request.top_k is None else request.top_k, request.top_p)  # fmt: skip

    def seed(self, request: GenerateRequest) -> int:
        return uuid.uuid4().int >> 65 if request.seed is None else request.seed

    def check_model(self, name: str | None) -> None:
        if name not in (None, "", self.settings.model_name):
            raise ApiError(404, f"there is no model {name!r}; this server has {self.settings.model_name!r}",
                           param="model", code="model_not_found")  # fmt: skip

    def chat_order(self, request: ChatRequest) -> Order:
        """A conversation as an order. Old turns that do not fit are left out; the last one must."""
        asked = request.max_completion_tokens or request.max_tokens or self.settings.max_tokens
        if asked > self.settings.most_tokens:
            raise ApiError(400, f"at most {self.settings.most_tokens} tokens can be asked for", param="max_tokens")
        room = self.max_context - min(asked, self.max_context // 2)
        messages = [{"role": "system" if m.role == "developer" else m.role, "content": m.text}
                    for m in request.messages]  # fmt: skip
        try:
            if not self.settings.answers:
                ids = self.tokenizer.encode(messages[-1]["content"])
                prompt = [self.tokenizer.encode_special("<|bos|>"), *ids[-(room - 1) :]]
            else:
                prompt = render_prompt(self.tokenizer, drop_oldest_turns(self.tokenizer, messages, room))
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        top = (request.top_logprobs or 0) if request.logprobs else None
        return Order(prompt, asked, self.sampling(request), self.seed(request), request.n, top)

    def completion_orders(self, request: CompletionRequest) -> list[Order]:
        orders = []
        asked = 16 if request.max_tokens is None else request.max_tokens
        if asked > self.settings.most_tokens:
            raise ApiError(400, f"at most {self.settings.most_tokens} tokens can be asked for", param="max_tokens")
        bos, size = self.tokenizer.encode_special("<|bos|>"), self.tokenizer.get_vocab_size()
        for prompt in request.prompts():
            if isinstance(prompt, str):
                ids = [bos, *self.tokenizer.encode(prompt)]
            else:
                if any(not 0 <= i < size for i in prompt):
                    raise ApiError(400, f"token ids must be from 0 to {size - 1}", param="prompt")
                ids = list(prompt) if prompt[:1] == [bos] else [bos, *prompt]
            if len(ids) > self.max_context:
                raise ApiError(400, f"the prompt has {len(ids)} tokens, the model's context is {self.max_context}",
                               param="prompt", code="context_length_exceeded")  # fmt: skip
            orders.append(Order(ids, asked, self.sampling(request), self.seed(request), request.n, request.logprobs,
                                prompt_logprobs=request.echo and request.logprobs is not None))  # fmt: skip
        return orders

    # -- orders to answers ----------------------------------------------------------------------------

    async def run(
        self, request: Request, orders: Sequence[Order], stop: Sequence[str], chat: bool
    ) -> Generation:
        """Everything, not streamed. A client that goes away ends it."""
        generation = Generation(self.pool, self.tokenizer, self.settings)
        generation.submit(orders, stop, chat)
        watch = asyncio.create_task(wait_for_disconnect(request))
        try:
            async for _ in generation.pieces():
                if watch.done():
                    raise ApiError(499, "the client went away")
        finally:
            watch.cancel()
            generation.cancel()
            self.count(generation)
        return generation

    def count(self, generation: Generation) -> None:
        usage = generation.usage()
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.made_tokens.inc(usage["completion_tokens"])

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
                "model": self.settings.model_name}  # fmt: skip

    def stream(self, generation: Generation, events: AsyncIterator[dict[str, Any]], done: bool = True) -> Response:
        """Server-sent events; errors on the way become events, and whatever happens the rows are freed."""

        async def lines() -> AsyncIterator[dict[str, str]]:
            self.under_way += 1
            try:
                async for event in events:
                    yield {"data": json.dumps(event, ensure_ascii=False)}
                if done:
                    yield {"data": "[DONE]"}
            except ApiError as error:
                yield {"data": json.dumps(error.body, ensure_ascii=False)}
            finally:
                self.under_way -= 1
                generation.cancel()
                self.count(generation)

        return EventSourceResponse(lines(), ping=15, sep="\n", headers={"X-Accel-Buffering": "no"})


async def wait_for_disconnect(request: Request) -> None:
    """Returns once the client is gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.05)


def chat_events(api: Api, generation: Generation, request: ChatRequest) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed chat completion."""
    head = api.head("chat.completion.chunk", "chatcmpl")

    async def events() -> AsyncIterator[dict[str, Any]]:
        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            usage = {"usage": None} if request.stream_options and request.stream_options.include_usage else {}
            return {**head, "choices": [choice], **usage}

        for index in range(request.n):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for _, index, pieces, tokens, ended in generation.pieces():
            told = chat_logprobs(api.tokenizer, tokens, request.top_logprobs or 0) if request.logprobs else None
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


def published_events(api: Api, generation: Generation) -> AsyncIterator[dict[str, Any]]:
    """The published form: {"token": text} for each piece, then {"done": true}."""

    async def events() -> AsyncIterator[dict[str, Any]]:
        async for _, _, pieces, _, _ in generation.pieces():
            for _, text in pieces:
                yield {"token": text, "gpu": 0}
        yield {"done": True}

    return events()


def chat_answer(api: Api, generation: Generation, request: ChatRequest) -> dict[str, Any]:
    choices = []
    for index, text in enumerate(generation.texts[0]):
        tools = [{"kind": kind, "text": part} for kind, part in text.pieces if kind != "text"]
        message = {"role": "assistant", "content": text.text, "refusal": None, **({"tools": tools} if tools else {})}
        told = chat_logprobs(api.tokenizer, text.tokens, request.top_logprobs or 0) if request.logprobs else None
        choices.append({"index": index, "message": message, "logprobs": told,
                        "finish_reason": generation.finish_reason(0, index)})  # fmt: skip
    return {**api.head("chat.completion", "chatcmpl"), "choices": choices, "usage": generation.usage()}


def completion_answer(api: Api, generation: Generation, request: CompletionRequest) -> dict[str, Any]:
    choices = []
    for number, (ticket, samples) in enumerate(zip(generation.tickets, generation.texts)):
        for index, text in enumerate(samples):
            ids, told = [token.id for token in text.tokens], [token.told for token in text.tokens]
            before = ""
            if request.echo:
                own = list(ticket.order.prompt)[1:]  # without the bos that every prompt starts with
                before = api.tokenizer.decode(own)
                if request.logprobs is not None:
                    ids, told = own + ids, [*ticket.rows[0].told, *told]
            logprobs = completion_logprobs(api.tokenizer, ids, told) if request.logprobs is not None else None
            choices.append({"index": number * request.n + index, "text": before + text.text, "logprobs": logprobs,
                            "finish_reason": generation.finish_reason(number, index)})  # fmt: skip
    return {**api.head("text_completion", "cmpl"), "choices": choices, "usage": generation.usage()}


def completion_events(api: Api, generation: Generation, request: CompletionRequest) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed completion."""
    head = api.head("text_completion", "cmpl")

    async def events() -> AsyncIterator[dict[str, Any]]:
        def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]}

        if request.echo:
            for number, ticket in enumerate(generation.tickets):
                text = api.tokenizer.decode(list(ticket.order.prompt)[1:])
                for index in range(request.n):
                    yield chunk(number * request.n + index, text)
        async for number, index, pieces, tokens, ended in generation.pieces():
            at = number * request.n + index
            told = None
            if request.logprobs is not None and tokens:
                told = completion_logprobs(api.tokenizer, [t.id for t in tokens], [t.told for t in tokens])
            for _, text in pieces or ([("text", "")] if told else []):
                yield chunk(at, text, None, told)
                told = None
            if ended:
                yield chunk(at, "", generation.finish_reason(number, index))
        if request.stream_options and request.stream_options.include_usage:
            yield {**head, "choices": [], "usage": generation.usage()}

    return events()


def create_app(
    pool: WorkerPool, tokenizer: Any, settings: Settings | None = None, metrics: Metrics | None = None
) -> FastAPI:
    """The application over a pool that is already running; it closes the pool when it is shut down."""
    settings, metrics = settings or Settings(), metrics or Metrics()
    api = Api(pool, tokenizer, settings, metrics)
    gauges(api)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        api.closing = True
        await asyncio.to_thread(pool.close, settings.drain_seconds)

    app = FastAPI(title="nanochat", lifespan=life, docs_url=None, redoc_url=None)
    app.state.api = api
    add_middleware(app, api)
    add_error_handlers(app)
    add_generation_routes(app, api)
    add_other_routes(app, api)
    return app


def gauges(api: Api) -> None:
    """What is asked for anew at each scrape."""
    def gauge(name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(f"nanochat_{name}", what, registry=api.metrics.registry).set_function(value)

    gauge("rows_running", "Rows in the running batches", lambda: api.pool.stats()["rows_running"])
    gauge("requests_waiting", "Requests in the queues", lambda: api.pool.stats()["requests_waiting"])
    gauge("prefix_cache_bytes", "Memory of known beginnings of prompts", lambda: api.pool.stats()["prefix_bytes"])
    gauge("prefix_cache_hit_tokens", "Prompt tokens not computed again", lambda: api.pool.stats()["prefix_hit_tokens"])
    gauge("replicas_replaced", "Replicas that died and were made anew", lambda: api.pool.replaced)


# ---------------------------------------------------------------------------------------------------
# Around every request


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


def add_middleware(app: FastAPI, api: Api) -> None:
    settings = api.settings

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
        api.metrics.requests.labels(getattr(route, "path", "other"), str(response.status_code)).inc()
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


# ---------------------------------------------------------------------------------------------------
# Routes


def add_generation_routes(app: FastAPI, api: Api) -> None:
    async def admitted() -> AsyncIterator[None]:
        if api.closing:
            raise ApiError(503, "the server is shutting down", "server_error", code="unavailable")
        if api.under_way >= api.settings.max_requests:
            raise ApiError(429, "too many requests are under way", "rate_limit_error", code="server_busy",
                           headers={"Retry-After": "1"})  # fmt: skip
        api.under_way += 1
        try:
            yield
        finally:
            api.under_way -= 1

    @app.post("/v1/chat/completions", dependencies=[Depends(admitted)])
    async def chat(body: ChatRequest, request: Request) -> Any:
        api.check_model(body.model)
        order = api.chat_order(body)
        if not body.stream:
            whole = await api.run(request, [order], body.stop, api.settings.answers)
            return JSONResponse(chat_answer(api, whole, body))
        generation = Generation(api.pool, api.tokenizer, api.settings)
        generation.submit([order], body.stop, api.settings.answers)
        return api.stream(generation, chat_events(api, generation, body))

    @app.post("/chat/completions", dependencies=[Depends(admitted)])
    async def published_chat(body: PublishedChatRequest) -> Any:
        order = api.chat_order(body.to_chat())
        generation = Generation(api.pool, api.tokenizer, api.settings)
        generation.submit([order], (), api.settings.answers)
        return api.stream(generation, published_events(api, generation), done=False)

    @app.post("/v1/completions", dependencies=[Depends(admitted)])
    async def complete(body: CompletionRequest, request: Request) -> Any:
        api.check_model(body.model)
        orders = api.completion_orders(body)
        if not body.stream:
            return JSONResponse(completion_answer(api, await api.run(request, orders, body.stop, False), body))
        generation = Generation(api.pool, api.tokenizer, api.settings)
        generation.submit(orders, body.stop, False)
        return api.stream(generation, completion_events(api, generation, body))


def add_other_routes(app: FastAPI, api: Api) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        own = {"id": api.settings.model_name, "object": "model", "created": int(api.started), "owned_by": "nanochat",
               "max_context": api.max_context, "answers": api.settings.answers}  # fmt: skip
        return {"object": "list", "data": [own]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if (body.text is None) == (body.messages is None):
            raise ApiError(400, "give either text or messages", param="text")
        if body.text is not None:
            tokens = api.tokenizer.encode(body.text)
        else:
            messages = [{"role": "system" if m.role == "developer" else m.role, "content": m.text}
                        for m in body.messages or []]  # fmt: skip
            try:
                tokens = render_prompt(api.tokenizer, messages)
            except ValueError as error:
                raise ApiError(400, str(error), param="messages") from error
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        size = api.tokenizer.get_vocab_size()
        if any(token >= size for token in body.tokens):
            raise ApiError(400, f"token ids must be from 0 to {size - 1}", param="tokens")
        return {"text": api.tokenizer.decode(body.tokens)}

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Any:
        fine = api.pool.alive and not api.closing
        return JSONResponse({"status": "ok" if fine else "unavailable"}, 200 if fine else 503)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {**api.pool.stats(), "requests_under_way": api.under_way, "seconds_up": time.time() - api.started}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(api.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    text = resources.files("nanochat").joinpath("ui.html").read_text(encoding="utf-8")
    policy = CONTENT_POLICY.format(script=hash_of(text, "script"), style=hash_of(text, "style"))

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def hash_of(page: str, tag: str) -> str:
    """What a content policy allows: the page's one inline element of that kind, and nothing that is put in later."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
