"""The state that all routes share, given to them as `api: ApiDependency`: settings, metrics, the pool."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nanochat.inference.sampling import SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.serve.request_models import GenerationBody
from nanochat.serve.service import WorkerPool
from nanochat.serve.structured_output import answer_grammar

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
HISTOGRAMS = {  # the names that Service reports to `observe`
    "first_token_seconds": ("From a request to its first token", SECONDS_BUCKETS),
    "between_tokens_seconds": ("From one token of a request to the next", SECONDS_BUCKETS),
    "step_seconds": ("One step of the running batch", SECONDS_BUCKETS),
    "batch_rows": ("Sequences decoded together", (0, 1, 2, 4, 8, 16, 32, 64, 128)),
}
GAUGES = {  # name: (description, key of WorkerPool.stats)
    "rows_running": ("Sequences in the running batches", "rows_running"),
    "requests_waiting": ("Requests in the queues", "requests_waiting"),
    "prefix_cache_bytes": ("Memory of cached prompt prefixes", "prefix_bytes"),
    "prefix_cache_hit_tokens": ("Prompt tokens taken from the prefix cache", "prefix_hit_tokens"),
    "replicas_replaced": ("Replicas that died and were replaced", "replaced"),
}
SLICE_SECONDS = 0.003  # for all answers together, in each iteration of the event loop


@dataclass
class Settings:
    """The operator's choices. Times in seconds."""

    model_name: str = "nanochat"
    api_keys: Sequence[str] = ()  # each is valid; empty: no key is required
    cors_origins: Sequence[str] = ()
    allow_hosts: Sequence[str] = ("*",)  # names in Host besides this machine's, where no key is required; "*": any
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(0.8, 50))  # unless a request has its own
    max_tokens: int | None = None  # of any answer; None: what the prompt leaves of the context
    request_seconds: float = 300.0
    body_bytes: int = 4 * 2**20
    max_requests: int = 256  # being answered at once, including streams that wait for their reader
    drain_seconds: float = 30.0
    chat_model: bool = True  # finetuned to answer; a base model continues the last message instead
    card: Mapping[str, str | int | float | None] = field(default_factory=dict)  # where the model comes from: Model.card


@dataclass
class ServerMetrics:
    """Counters and histograms by name; gauges once `watch` has been called."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "nanochat_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Prompt tokens", registry=registry)
        self.completion_tokens = Counter("nanochat_completion_tokens", "Tokens generated", registry=registry)
        self.histograms = {
            name: Histogram(f"nanochat_{name}", description, registry=registry, buckets=buckets)
            for name, (description, buckets) in HISTOGRAMS.items()
        }

    def observe(self, name: str, value: float) -> None:
        """Record a value of Service(observe=...). Thread-safe."""
        self.histograms[name].observe(value)

    def watch(self, pool: WorkerPool) -> None:
        """Add gauges that read the pool at each scrape."""
        self.registry.register(PoolGauges(pool))


@dataclass(eq=False)
class PoolGauges(Collector):
    """GAUGES of a pool, whose workers are asked once for all of them."""

    pool: WorkerPool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self.pool.stats()
        for name, (description, key) in GAUGES.items():
            yield GaugeMetricFamily(f"nanochat_{name}", description, stats[key])


class LoopBudget:
    """Limits how long all answers together keep the event loop busy in one iteration of it.

    A step of the model gives every answer a token at once, and with log probabilities each takes a millisecond to
    format. A health check takes several iterations of the loop and would wait for all answers in each.
    """

    def __init__(self) -> None:
        self._until: float | None = None  # of this iteration

    async def wait(self) -> None:
        """Return when the caller may work, in this iteration or a later one."""
        while self._until is not None and time.monotonic() > self._until:
            await asyncio.sleep(0)
        if self._until is None:
            self._until = time.monotonic() + SLICE_SECONDS
            asyncio.get_running_loop().call_soon(self._next_iteration)

    def _next_iteration(self) -> None:
        self._until = None


@dataclass
class Api:
    """The pool, the tokenizer, the settings, and what belongs to all requests together."""

    pool: WorkerPool
    tokenizer: Any
    settings: Settings
    metrics: ServerMetrics
    active: int = 0  # requests that are being answered
    closing: bool = False  # shutting down: new requests are refused
    budget: LoopBudget = field(default_factory=LoopBudget)
    recent_answers: dict[str, str] = field(default_factory=dict)  # of /v1/responses: texts by their items' ids
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, "nanochat-api")  # more would only wait for each other

    async def run_in_thread(self, work: Callable[[], Any]) -> Any:
        """Run tokenizing or formatting off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @property
    def max_context(self) -> int:
        return self.pool.replicas[0].max_context

    def check_model(self, name: str | None) -> None:
        if name not in (None, "", self.settings.model_name):
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def limit_tokens(self, *limits: int | None) -> int:
        """The smallest of a request's limits on its answer, the operator's, and the context."""
        return min(limit for limit in (*limits, self.settings.max_tokens, self.max_context) if limit is not None)

    def check_token_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.tokenizer.get_vocab_size()
        if any(not 0 <= i < size for i in ids):
            raise ApiError(400, f"token ids must be from 0 to {size - 1}", param=param)

    def sampling(self, body: GenerationBody) -> SamplingParams:
        """How to draw an answer; with a random seed where the body has none."""
        return replace(self.settings.sampling, seed=uuid.uuid4().int >> 65).override(body)

    def decoding_fields(self, body: GenerationBody) -> dict[str, Any]:
        """The fields of a GenerationRequest that say how to draw, within which grammar and where to end. Where the body
        has none: the server's, and a random seed. Raises ApiError. Compiles a grammar: not for the event loop."""
        self.check_token_ids([int(token) for token in body.logit_bias or ()], "logit_bias")
        self.check_token_ids(body.stop_token_ids, "stop_token_ids")
        grammar = answer_grammar(self.tokenizer, body)
        for name in ("min_tokens", "ignore_eos"):
            if grammar is not None and getattr(body, name):
                raise ApiError(400, f"{name}: a grammar says where the answer ends; leave it out", param=name)
        return {
            "sampling": self.sampling(body),
            "num_samples": body.n,
            "grammar": grammar,
            "stop_token_ids": body.stop_token_ids,
            "min_tokens": body.min_tokens,
            "ignore_eos": body.ignore_eos,
        }


async def get_api(request: Request) -> Api:
    return request.app.state.api


ApiDependency = Annotated[Api, Depends(get_api)]
