"""The state that all routes share, given to them as `api: ApiDependency`; and the server's settings."""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import Depends, Request

from nanochat.inference.sampling import SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.serve.metrics import ServerMetrics
from nanochat.serve.request_models import GenerationBody
from nanochat.serve.service import WorkerPool

SLICE_SECONDS = 0.003  # for all answers together, in each iteration of the event loop


@dataclass
class Settings:
    """The operator's choices. Times in seconds."""

    model_name: str = "nanochat"
    api_keys: Sequence[str] = ()  # each is valid; empty: no key is required
    cors_origins: Sequence[str] = ()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(0.8, 50))  # unless a request has its own
    max_tokens: int = 512  # of a chat's answer, unless the request has its own
    max_tokens_limit: int = 4096  # the largest max_tokens of a request
    request_seconds: float = 300.0
    body_bytes: int = 4 * 2**20
    max_requests: int = 256  # being answered at once, including streams that wait for their reader
    drain_seconds: float = 30.0
    chat_model: bool = True  # finetuned to answer; a base model continues the last message instead


@dataclass
class Admission:
    """Requests for answers: how many are active, and whether new ones are refused since the server shuts down."""

    active: int = 0
    closing: bool = False


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
    admission: Admission = field(default_factory=Admission)
    budget: LoopBudget = field(default_factory=LoopBudget)
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

    def check_max_tokens(self, value: int, param: str) -> None:
        if value > self.settings.max_tokens_limit:
            raise ApiError(400, f"at most {self.settings.max_tokens_limit} tokens can be requested", param=param)

    def check_token_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.tokenizer.get_vocab_size()
        if any(not 0 <= i < size for i in ids):
            raise ApiError(400, f"token ids must be from 0 to {size - 1}", param=param)

    def sampling(self, body: GenerationBody) -> SamplingParams:
        """The body's settings; where it has none, the server's and a random seed."""
        return replace(self.settings.sampling, seed=uuid.uuid4().int >> 65).override(body)


async def get_api(request: Request) -> Api:
    return request.app.state.api


ApiDependency = Annotated[Api, Depends(get_api)]
