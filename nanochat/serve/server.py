"""The HTTP API: create_app() on FastAPI, in OpenAI's shapes, over a WorkerPool.

The event loop only passes on: the model runs on the services' threads, tokenizing and large answers on others. A
client that goes away frees its rows within a step. Every error has OpenAI's form: {"error": {"message", "type",
"param", "code"}}.
"""

import asyncio
import base64
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sse_starlette.sse import EventSourceResponse

from nanochat.common import SPECIAL_TOKENS
from nanochat.conversation import fit_prompt, render_prompt
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.serve import answers as answers
from nanochat.serve.generation import (
    ApiError,
    Generation,
    Settings,
    Turns,
    chat_answer,
    chat_events,
    completion_answer,
    completion_events,
    published_events,
)
from nanochat.serve.guard import Door, add_error_handlers, add_middleware
from nanochat.serve.service import WorkerPool
from nanochat.serve.types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    PublishedChatRequest,
    TokenizeRequest,
)
from nanochat.serve.types import Request as GenerateRequest

CONTENT_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
json_text = json.JSONEncoder(ensure_ascii=False).encode


@dataclass
class ServerMetrics:
    """What Prometheus reads."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        def times(name: str, what: str) -> Histogram:
            buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
            return Histogram(f"nanochat_{name}", what, registry=self.registry, buckets=buckets)

        self.requests = Counter(
            "nanochat_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.made_tokens = Counter("nanochat_completion_tokens", "Tokens generated", registry=self.registry)
        self.times = {
            "first_token_seconds": times("first_token_seconds", "From a request to its first token"),
            "between_tokens_seconds": times("between_tokens_seconds", "From one token of a request to the next"),
            "step_seconds": times("step_seconds", "One step of the running batch"),
        }
        self.rows = Histogram(
            "nanochat_batch_rows",
            "Rows decoded together",
            registry=self.registry,
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128),
        )

    def observe(self, name: str, value: float) -> None:
        """For Service(observe=...); called on its thread."""
        if name == "batch_rows":
            self.rows.observe(value)
        else:
            self.times[name].observe(value)


# ---------------------------------------------------------------------------------------------------
# The application


class Api:
    """The routes' state: the pool, the settings, what is under way."""

    def __init__(self, pool: WorkerPool, tokenizer: Any, settings: Settings, metrics: ServerMetrics) -> None:
        self.pool, self.tokenizer, self.settings, self.metrics = pool, tokenizer, settings, metrics
        self.started = time.time()
        self.door = Door()
        self._aside = ThreadPoolExecutor(2, "nanochat-aside")
        self.turns = Turns()

    async def aside(self, work: Callable[[], Any]) -> Any:
        """Off the event loop, two pieces of work at a time: more would only wait for each other."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    # -- requests to orders ---------------------------------------------------------------------------

    @property
    def max_context(self) -> int:
        return self.pool.services[0].max_context

    def sampling(self, request: GenerateRequest) -> SamplingParams:
        """The server's settings, overridden by the request's fields; without a seed a random one."""
        default = SamplingParams(self.settings.temperature, self.settings.top_k, seed=uuid.uuid4().int >> 65)
        return default.override(request)

    def check_model(self, name: str | None) -> None:
        if name not in (None, "", self.settings.model_name):
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def chat_order(self, request: ChatRequest) -> GenerationRequest:
        """A conversation as an order. Old turns that do not fit are left out; the last one must."""
        asked = request.max_completion_tokens or request.max_tokens or self.settings.max_tokens
        if asked > self.settings.most_tokens:
            raise ApiError(
                400,
                f"at most {self.settings.most_tokens} tokens can be asked for",
                param="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
            )
        messages = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in request.messages
        ]
        try:
            prompt, _ = fit_prompt(self.tokenizer, messages, self.max_context, asked, self.settings.answers)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        top = (request.top_logprobs or 0) if request.logprobs else None
        return GenerationRequest(prompt, asked, self.sampling(request), request.n, top)

    def completion_orders(self, request: CompletionRequest) -> list[GenerationRequest]:
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
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens, the model's context is {self.max_context}",
                    param="prompt",
                    code="context_length_exceeded",
                )
            orders.append(
                GenerationRequest(
                    ids,
                    asked,
                    self.sampling(request),
                    request.n,
                    request.logprobs,
                    prompt_logprobs=request.echo and request.logprobs is not None,
                )
            )
        return orders

    # -- orders to answers ----------------------------------------------------------------------------

    def generation(
        self, request: Request, orders: Sequence[GenerationRequest], stop: Sequence[str], chat: bool
    ) -> Generation:
        """The orders under way. Raises ApiError."""
        made = Generation(self.pool, self.tokenizer, self.settings, request.state.client, self.turns)
        made.submit(orders, stop, chat)
        return made

    async def run(
        self, request: Request, orders: Sequence[GenerationRequest], stop: Sequence[str], chat: bool
    ) -> Generation:
        """Everything, not streamed. A client that goes away ends it."""
        generation = self.generation(request, orders, stop, chat)
        watch = asyncio.create_task(wait_for_disconnect(request))
        watch.add_done_callback(lambda _: generation.cancel())
        try:
            async for _ in generation.pieces():
                pass
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
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.settings.model_name,
        }

    def stream(self, generation: Generation, events: AsyncIterator[dict[str, Any]], done: bool = True) -> Response:
        """Server-sent events; errors on the way become events, and whatever happens the rows are freed."""

        async def lines() -> AsyncIterator[dict[str, str]]:
            try:
                async for event in events:
                    yield {"data": json_text(event)}
                if done:
                    yield {"data": "[DONE]"}
            except ApiError as error:
                yield {"data": json_text(error.body)}
            finally:
                generation.cancel()
                self.count(generation)

        return EventSourceResponse(lines(), ping=15, sep="\n", headers={"X-Accel-Buffering": "no"})


def encoded(answer: dict[str, Any]) -> Response:
    """As JSON. With log probabilities an answer has megabytes."""
    return Response(b"".join(piece.encode() for piece in json_pieces(answer, 5)), media_type="application/json")


def json_pieces(value: Any, levels: int) -> Iterator[str]:
    """JSON of a value with iterators for lists, in pieces: one call for all of a large value would stop the other
    threads for as long. What lies `levels` deep is one piece."""
    if levels and isinstance(value, dict):
        yield "{"
        for number, (key, part) in enumerate(value.items()):
            yield f"{', ' if number else ''}{json_text(key)}: "
            yield from json_pieces(part, levels - 1)
        yield "}"
    elif levels and isinstance(value, (list, Iterator)):
        yield "["
        for number, part in enumerate(value):
            yield ", " if number else ""
            yield from json_pieces(part, levels - 1)
        yield "]"
    else:
        yield json_text(value)


async def wait_for_disconnect(request: Request) -> None:
    """Returns once the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    pool: WorkerPool, tokenizer: Any, settings: Settings | None = None, metrics: ServerMetrics | None = None
) -> FastAPI:
    """The application over a pool that is already running; it closes the pool when it is shut down."""
    settings, metrics = settings or Settings(), metrics or ServerMetrics()
    api = Api(pool, tokenizer, settings, metrics)
    gauges(api)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        api.door.closing = True
        await asyncio.to_thread(pool.close, settings.drain_seconds)

    app = FastAPI(title="nanochat", lifespan=life, docs_url=None, redoc_url=None, responses=answers.ERRORS)
    app.state.api = api
    add_middleware(app, api.door, settings, lambda path, status: metrics.requests.labels(path, str(status)).inc())
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
# Routes


def add_generation_routes(app: FastAPI, api: Api) -> None:
    @app.post("/v1/chat/completions", responses=answers.whole_or_streamed(answers.ChatAnswer))
    async def chat(body: ChatRequest, request: Request) -> Any:
        api.check_model(body.model)
        order = await api.aside(lambda: api.chat_order(body))
        if not body.stream:
            whole = await api.run(request, [order], body.stop, api.settings.answers)
            return await api.aside(lambda: encoded(chat_answer(api.head, whole, body)))
        generation = api.generation(request, [order], body.stop, api.settings.answers)
        return api.stream(generation, chat_events(api.head, generation, body))

    @app.post("/chat/completions", response_class=EventSourceResponse)
    async def published_chat(body: PublishedChatRequest, request: Request) -> Any:
        order = await api.aside(lambda: api.chat_order(body.to_chat()))
        generation = api.generation(request, [order], (), api.settings.answers)
        return api.stream(generation, published_events(generation), done=False)

    @app.post("/v1/completions", responses=answers.whole_or_streamed(answers.CompletionAnswer))
    async def complete(body: CompletionRequest, request: Request) -> Any:
        api.check_model(body.model)
        orders = await api.aside(lambda: api.completion_orders(body))
        if not body.stream:
            whole = await api.run(request, orders, body.stop, False)
            return await api.aside(lambda: encoded(completion_answer(api.head, whole, body)))
        generation = api.generation(request, orders, body.stop, False)
        return api.stream(generation, completion_events(api.head, generation, body))


def add_other_routes(app: FastAPI, api: Api) -> None:
    def own_model() -> dict[str, Any]:
        return {
            "id": api.settings.model_name,
            "object": "model",
            "created": int(api.started),
            "owned_by": "nanochat",
            "max_context": api.max_context,
            "answers": api.settings.answers,
        }

    @app.get("/v1/models", response_model=answers.Models)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [own_model()]}

    @app.get("/v1/models/{name:path}", response_model=answers.Model)
    async def model(name: str) -> dict[str, Any]:
        api.check_model(name)
        return own_model()

    @app.post("/tokenize", response_model=answers.Tokens)
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if [body.text, body.prompt, body.messages].count(None) != 2:
            raise ApiError(400, "give one of text, prompt and messages", param="text")
        if body.prompt in SPECIAL_TOKENS:
            tokens = [api.tokenizer.encode_special(body.prompt)]
        elif body.messages is None:
            tokens = api.tokenizer.encode(body.text or body.prompt or "")
        else:
            messages = [
                {"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in body.messages
            ]
            try:
                tokens = render_prompt(api.tokenizer, messages)
            except ValueError as error:
                raise ApiError(400, str(error), param="messages") from error
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize", response_model=answers.Text)
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        size = api.tokenizer.get_vocab_size()
        if any(token >= size for token in body.tokens):
            raise ApiError(400, f"token ids must be from 0 to {size - 1}", param="tokens")
        text = api.tokenizer.decode(body.tokens)
        return {"text": text, "prompt": text}

    @app.get("/tokenizer_info", response_model=answers.TokenizerInfo)
    async def tokenizer_info() -> dict[str, Any]:
        return {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "vocab_size": api.tokenizer.get_vocab_size()}

    @app.get("/health", response_model=answers.Health, responses={503: {"model": answers.Health}})
    @app.get("/health/ready", response_model=answers.Health, responses={503: {"model": answers.Health}})
    async def ready() -> Any:
        fine = api.pool.alive and not api.pool.failing and not api.door.closing
        return JSONResponse({"status": "ok" if fine else "unavailable"}, 200 if fine else 503)

    @app.get("/health/live", response_model=answers.Health, responses={503: {"model": answers.Health}})
    async def live() -> Any:
        """Not so, where only starting the process anew may help."""
        return JSONResponse({"status": "failing"}, 503) if api.pool.failing else {"status": "ok"}

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        return {**api.pool.stats(), "requests_under_way": api.door.under_way, "seconds_up": time.time() - api.started}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(generate_latest(api.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    text = resources.files("nanochat").joinpath("ui.html").read_text(encoding="utf-8")
    policy = CONTENT_POLICY.format(script=hash_of(text, "script"), style=hash_of(text, "style"))

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def hash_of(page: str, tag: str) -> str:
    """What a content policy allows: the page's one inline element of that kind, and nothing that is put in later."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
