"""For tests of the chat service: a tiny model behind the application, requests to it, and what comes back."""

import json
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from engine_helpers import make_model
from live import Live
from stubs import SPECIAL

from nanochat.inference.request import GenerationRequest, Token
from nanochat.inference.sampling import SamplingParams
from nanochat.serve.api import ServerMetrics, Settings
from nanochat.serve.replica import Finished
from nanochat.serve.server import create_app
from nanochat.serve.service import Service, WorkerPool
from nanochat.tokenizer import RustBPETokenizer

CHAT = "/v1/chat/completions"
MODEL = make_model(vocab_size=265)
TOKENIZER = RustBPETokenizer(".+?|\n", [bytes([i]) for i in range(256)])  # a token per byte
assert TOKENIZER.encode_special("<|bos|>") == SPECIAL["<|bos|>"]
SETTINGS = Settings(request_seconds=20, drain_seconds=2)


def app_of(settings: Settings = SETTINGS, **service: Any) -> Any:
    """The application over one replica with MODEL; `service` as for Service."""
    metrics = ServerMetrics()
    pool = WorkerPool(lambda index: Service(MODEL, TOKENIZER, observe=metrics.observe, **service))
    return create_app(pool, TOKENIZER, settings, metrics)


def chat(**changes: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": "hi"}], "seed": 7, "temperature": 1.0, "max_tokens": 8, **changes}


def events(response: Any) -> list[Any]:
    """The data of a stream's events; checks the format to the byte."""
    assert response.headers["content-type"].startswith("text/event-stream")
    body = response.content.decode()
    assert body.endswith("\n\n")
    found = []
    for block in body[:-2].split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block, block
        found.append(json.loads(block[6:]) if block != "data: [DONE]" else "[DONE]")
    return found


def slow(live: Live, monkeypatch: pytest.MonkeyPatch, seconds: float) -> Any:
    """Delay every step of the live server's replica, which is returned."""
    service = live.api.pool.replicas[0]
    step = service.batch.step

    def wait(**settings: Any) -> Any:
        time.sleep(seconds)
        return step(**settings)

    monkeypatch.setattr(service.batch, "step", wait)
    return service


def make_request(text: str = "abc", max_tokens: int = 8, seed: int = 5, **more: Any) -> GenerationRequest:
    """For a model with a token per byte; `more` as the fields of GenerationRequest."""
    sampling = replace(more.pop("sampling", SamplingParams()), seed=seed)
    return GenerationRequest([256, *text.encode()], max_tokens, sampling, **more)


class Receiver:
    """A request's callback that collects its messages."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.end: Finished | None = None
        self.done = threading.Event()

    def __call__(self, message: list[Token] | Finished) -> None:
        assert self.end is None, "a message after Finished"
        if isinstance(message, Finished):
            self.end = message
            self.done.set()
        else:
            self.tokens += message

    def wait(self) -> "Receiver":
        assert self.done.wait(20), "Finished was not delivered"
        return self
