"""Replicas in processes of their own: same answers as the engine, and they may be killed at any time."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_helpers import make_model
from live import Live, until
from serve_helpers import TOKENIZER as REAL_TOKENIZER, Receiver, chat, events, make_request
from stubs import TOKENIZER

from nanochat.checkpoint.saving import save_checkpoint
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.inference.grammar import regex_grammar
from nanochat.inference.sampling import SamplingParams
from nanochat.runtime import Runtime
from nanochat.serve.api import ServerMetrics, Settings
from nanochat.serve.remote_service import RemoteService
from nanochat.serve.replica import Busy, Closed, Finished
from nanochat.serve.server import create_app
from nanochat.serve.service import WorkerPool
from scripts._replica import ReplicaPlan

TESTS = Path(__file__).parent
CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from stubs import TOKENIZER
from engine_helpers import make_model
from nanochat.serve.remote_service import serve_replica
from nanochat.serve.service import Service

def make(observe):
    service = Service(make_model(vocab_size=265, sequence_len={max_context}), TOKENIZER, max_rows=4, observe=observe)
    step = service.batch.step
    def slow(**settings):
        time.sleep({pause})
        return step(**settings)
    service.batch.step = slow
    return service

serve_replica(make, int(sys.argv[-1]))
"""


def remote(pause: float = 0.0, observe: Any = lambda name, value: None, max_context: int = 64) -> RemoteService:
    code = CHILD.format(root=str(TESTS.parent), tests=str(TESTS), pause=pause, max_context=max_context)
    return RemoteService([sys.executable, "-c", code], max_context, 8, observe)


# Ready at once, as it has no model.
IDLE = """
import socket, sys
pool = socket.socket(fileno=int(sys.argv[-1]))
pool.sendall(b'{"stats": {"rows_running": 0}, "observed": []}\\n')
pool.recv(1)
"""
INCOMPLETE_LINE = IDLE + """pool.sendall(b'{"id": 0, "tokens": [[0, 5')"""


def without_a_model(code: str) -> RemoteService:
    return RemoteService([sys.executable, "-c", code], 64, 8, lambda name, value: None)


def test_child_that_dies_within_a_line() -> None:
    service = without_a_model(INCOMPLETE_LINE)
    until(service.ready.is_set)
    receiver = Receiver()
    service.submit(make_request(), receiver)
    end = receiver.wait().end
    assert end is not None and isinstance(end.error, RuntimeError) and not service.alive
    service.close()


@pytest.fixture(scope="module")
def service() -> Iterator[RemoteService]:
    made = remote()
    yield made
    made.close(5)
    assert made.process.returncode == 0


def test_same_tokens_as_the_engine(service: RemoteService) -> None:
    engine = Engine(make_model(vocab_size=265), TOKENIZER)  # type: ignore[arg-type]
    receivers = [Receiver() for _ in range(7)]
    handles = [service.submit(make_request("x" * i, seed=i, num_samples=1 + i % 2), r) for i, r in enumerate(receivers)]
    for i, (handle, receiver) in enumerate(zip(handles, receivers)):
        assert receiver.wait().end == Finished()
        prompt = [256, *b"x" * i]
        expected, _ = engine.generate_batch(prompt, 1 + i % 2, max_tokens=8, temperature=1.0, seed=i)
        for sequence, whole in zip(handle.sequences, expected):
            ends = [sequence.end] if sequence.end is not None else []
            assert prompt + [t.id for t in receiver.tokens if t.sequence is sequence] == whole + ends
    assert service.load == 0 and service.stats()["rows_running"] == 0 and service.stats()["tokens"] > 20


def test_cached_tokens_are_sent() -> None:
    service = remote(max_context=512)
    for cached in (0, 256):
        receiver = Receiver()
        handle = service.submit(make_request("x" * 300, num_samples=2), receiver)
        receiver.wait()
        assert max(sequence.cached_tokens for sequence in handle.sequences) == cached
    service.close()


def test_settings_and_grammars_are_sent(service: RemoteService) -> None:
    """Every field of a request that changes the answer crosses the socket."""
    sampling = SamplingParams(0.9, 40, 0.95, 3, 0.01, 1.2, 0.5, 0.7, {97: 3, 98: -2.5})  # type: ignore[arg-type]
    assert all(getattr(sampling, f.name) != f.default for f in dataclasses.fields(sampling))
    rules: list[dict[str, Any]] = [
        {},
        {"grammar": regex_grammar("[a-z]{2,8}")},
        {"stop_token_ids": [98, 99], "min_tokens": 3},
        {"ignore_eos": True},
    ]
    requests = [make_request("abc", 10, sampling=sampling, num_samples=2, **more) for more in rules]
    receivers = [Receiver() for _ in rules]
    handles = [service.submit(request, receiver) for request, receiver in zip(requests, receivers)]
    expected = Engine(make_model(vocab_size=265), TOKENIZER).complete(requests)  # type: ignore[arg-type]
    for handle, receiver in zip(handles, receivers):
        assert receiver.wait().end == Finished()
        for sequence in handle.sequences:
            alone = expected.pop(0)
            ends = [] if alone.end is None else [alone.end]
            assert [t.id for t in receiver.tokens if t.sequence is sequence] == alone.tokens + ends
            assert sequence.end == alone.end


def test_log_probabilities_are_sent(service: RemoteService) -> None:
    receiver, known = Receiver(), []

    def deliver(message: Any) -> None:
        known.append(len(message[0].sequence.prompt_logprobs) if isinstance(message, list) else None)
        receiver(message)

    handle = service.submit(make_request("abc", max_tokens=2, top_logprobs=2, prompt_logprobs=True), deliver)
    receiver.wait()
    assert known[0] == 3, "the prompt's log probabilities come with the first token"
    assert len(handle.sequences[0].prompt_logprobs) == 3 and handle.sequences[0].prompt_logprobs[0].logprob < 0
    assert all(len(token.logprobs.top) == 2 for token in receiver.tokens if token.logprobs)


def test_cancel_and_refuse(service: RemoteService) -> None:
    receiver = Receiver()
    handle = service.submit(make_request(max_tokens=50, num_samples=4, sampling=SamplingParams(10.0)), receiver)
    handle.cancel()
    assert receiver.wait().end == Finished()
    with pytest.raises(ValueError, match="prompt"):
        service.submit(replace(make_request(), prompt=[]), Receiver())
    receivers = [Receiver() for _ in range(8)]
    for one in receivers:
        service.submit(make_request(max_tokens=50), one)
    with pytest.raises(Busy):
        service.submit(make_request(), Receiver())
    for one in receivers:
        one.wait()


def test_a_group_takes_one_place_in_the_queue(service: RemoteService) -> None:
    receivers = [Receiver() for _ in range(10 + 7)]
    for number, receiver in enumerate(receivers):
        group = "many" if number < 10 else ""
        service.submit(make_request(max_tokens=50, group=group), receiver, admitted=0 < number < 10)
    with pytest.raises(Busy):
        service.submit(make_request(), Receiver())
    for receiver in receivers:
        receiver.wait()
    assert service.load == 0


def test_idle_crashes_do_not_count_as_failing() -> None:
    starts = itertools.count()
    pool = WorkerPool(lambda index: remote() if next(starts) == 5 else without_a_model(IDLE), 2)  # after four crashes
    for _ in range(4):
        victim = pool.replicas[0]
        until(victim.ready.is_set)
        victim.process.kill()
        until(lambda victim=victim: not victim.alive)  # type: ignore[misc]
        pool._replace_dead()
    assert pool.replaced == 4 and not pool.failing
    receiver = Receiver()
    pool.submit(make_request(), receiver)
    receiver.wait()
    chosen = next(service for service in pool.replicas if service.tokens_made)
    assert chosen.tokens_made == len(receiver.tokens)
    pool._crashes = 99  # even after many crashes
    assert not pool.failing
    chosen.process.kill()
    until(lambda: not chosen.alive)
    assert not pool.failing, "a replica had tokens"
    pool._replace_dead()
    assert not pool.failing
    pool.close()


def test_timings_are_observed(service: RemoteService, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    monkeypatch.setattr(service, "observe", lambda name, value: seen.__setitem__(name, seen.get(name, 0) + 1))
    receiver = Receiver()
    service.submit(make_request(), receiver)
    receiver.wait()
    until(lambda: seen.get("step_seconds", 0) > 1)
    assert seen["first_token_seconds"] == 1


def test_close_drains_for_the_given_time() -> None:
    for drain, ends_well in ((10.0, True), (0.0, False)):
        made, receiver = remote(0.02), Receiver()
        made.submit(make_request(max_tokens=30, sampling=SamplingParams(10.0, top_k=0), seed=3), receiver)
        until(lambda receiver=receiver: receiver.tokens)  # type: ignore[misc]
        made.close(drain)
        end = receiver.wait().end
        assert end is not None and (end.error is None) == ends_well, end
        assert ends_well or isinstance(end.error, Closed)
        with pytest.raises(Closed):
            made.submit(make_request(), Receiver())


@pytest.fixture
def live() -> Iterator[Live]:
    metrics = ServerMetrics()
    pool = WorkerPool(lambda index: remote(0.03, metrics.observe), 2)
    settings = Settings(drain_seconds=60)
    with Live(create_app(pool, REAL_TOKENIZER, settings, metrics)) as it:
        until(lambda: all(service.ready.is_set() for service in pool.replicas))
        yield it


def test_killed_replica_under_a_live_server(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that has begun ends with an error; an answer of which nothing was sent comes from another replica."""
    pool, body = live.api.pool, chat(max_tokens=50, temperature=10, top_k=0)
    whole = httpx.post(f"{live.url}/v1/chat/completions", json={**body, "max_tokens": 3}, timeout=90).json()
    found: dict[str, Any] = {}

    def stream() -> None:
        found["stream"] = httpx.post(f"{live.url}/v1/chat/completions", json={**body, "stream": True}, timeout=90)

    thread = threading.Thread(target=stream)
    thread.start()
    until(lambda: any(s.load for s in pool.replicas))
    (victim,) = [s for s in pool.replicas if s.load]
    until(lambda: victim.stats()["tokens"] > 3)
    os.kill(victim.process.pid, signal.SIGKILL)
    thread.join()
    assert "data: " in found["stream"].text and "[DONE]" not in found["stream"].text
    assert events(found["stream"])[-1]["error"]["type"] == "server_error"
    assert httpx.get(f"{live.url}/health", timeout=90).status_code == 200
    for service in pool.replicas:
        if service.alive:
            os.kill(service.process.pid, signal.SIGSTOP)  # accepts the next request and does nothing
            frozen = service
    thread = threading.Thread(
        target=lambda: found.update(
            whole=httpx.post(f"{live.url}/v1/chat/completions", json={**body, "max_tokens": 3}, timeout=90)
        )
    )
    other = threading.Thread(target=lambda: httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=90))
    thread.start()
    until(lambda: any(replica.load for replica in pool.replicas))
    other.start()
    until(lambda: frozen.load > 0)
    os.kill(frozen.process.pid, signal.SIGKILL)
    thread.join()
    other.join()
    assert found["whole"].status_code == 200 and found["whole"].json()["choices"] == whole["choices"]
    assert pool.replaced == 2 and "-9" in capsys.readouterr().err
    live.settle()


def test_child_exits_with_its_server() -> None:
    """Not even if the server exits without a message: the child exits at the end of the socket."""
    made = remote()
    until(made.ready.is_set)
    made._socket.shutdown(2)
    assert made.process.wait(90) == 0


def test_later_replicas_load_the_same_weights(copied: Path) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float32, "", 1)
    plan = ReplicaPlan(model_tag="tiny", source="base", max_rows=4, max_waiting=8, cache_mib=64, prefix_mib=0)
    model, tokenizer, meta = plan.load(runtime)
    assert plan.step == 1 and plan.load(runtime)[2]["step"] == 1
    child = ReplicaPlan(**json.loads(plan.command()[-1]))
    assert child == plan
    run = copied / "base_checkpoints" / "tiny"
    save_checkpoint(run, 2, model_state=model.state_dict(), meta=meta, tokenizer=tokenizer)
    assert child.load(runtime)[2]["step"] == 1, "a step saved meanwhile is not loaded"
    shutil.rmtree(run)
    save_checkpoint(run, 1, model_state=GPT.create(model.config, seed=9).state_dict(), meta=meta, tokenizer=tokenizer)
    with pytest.raises(UserError, match="restart"):
        child.load(runtime)
