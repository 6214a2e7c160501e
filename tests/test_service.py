"""The running batch as a service: joining, leaving, cancelling, dying, closing."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_helpers import make_model
from live import until
from serve_helpers import Receiver, make_request
from stubs import TOKENIZER

from nanochat.engine import Engine
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.serve.handle import Busy, Closed, Finished
from nanochat.serve.service import Service, WorkerPool, slot_bytes

MODEL = make_model()


@pytest.fixture
def service() -> Any:
    made = Service(MODEL, TOKENIZER, max_rows=4, max_waiting=8)  # type: ignore[arg-type]
    yield made
    made.close()
    assert not made._thread.is_alive()


def test_the_engine_says_the_same(service: Service) -> None:
    """Alone, among others, or through Engine.generate_batch: one seed, one answer."""
    receivers = [Receiver() for _ in range(7)]
    handles = [service.submit(make_request("x" * i, seed=i, num_samples=1 + i % 2), r) for i, r in enumerate(receivers)]
    engine = Engine(MODEL, TOKENIZER)  # type: ignore[arg-type]
    for i, (handle, receiver) in enumerate(zip(handles, receivers)):
        assert receiver.wait().end == Finished()
        prompt = [256, *b"x" * i]
        expected, _ = engine.generate_batch(prompt, 1 + i % 2, max_tokens=8, temperature=1.0, seed=i)
        assert [prompt + row.tokens for row in handle.sequences] == expected
        for row in handle.sequences:
            ends = [row.end] if row.end is not None else []
            assert [t.id for t in receiver.tokens if t.sequence is row] == row.tokens + ends
    assert service.stats()["rows_running"] == 0 and service.load == 0


def test_cancelled_rows_leave_within_a_step(service: Service) -> None:
    receivers = [Receiver() for _ in range(6)]
    handles = [
        service.submit(make_request(max_tokens=50, num_samples=2, sampling=SamplingParams(1.0, top_k=0)), r)
        for r in receivers
    ]
    for handle in handles:
        handle.cancel()
        handle.cancel()  # twice is once
    for receiver in receivers:
        assert receiver.wait().end == Finished()
    assert service.stats()["rows_running"] == service.stats()["requests_waiting"] == 0
    assert service.submit(make_request(), receiver := Receiver()) and receiver.wait().tokens


def test_one_sample_of_several_can_be_cancelled(service: Service) -> None:
    receiver = Receiver()
    handle = service.submit(make_request(max_tokens=20, num_samples=2), receiver)
    handle.cancel(0)
    receiver.wait()
    assert handle.sequences[1].done and (handle.sequences[1].end is not None or len(handle.sequences[1].tokens) == 20)


@contextlib.contextmanager
def held(service: Service) -> Iterator[None]:
    """While open, whatever is asked of the service waits in its queue."""
    gate, first = threading.Event(), Receiver()

    def hold(what: Any) -> None:
        gate.wait(20)
        first(what)

    service.submit(make_request(), hold)
    until(lambda: service.batch.running)  # it is in the batch, and its receiver holds the thread
    yield
    gate.set()
    first.wait()


def test_a_full_queue_says_when_to_come_again(service: Service) -> None:
    others = [Receiver() for _ in range(8)]
    with held(service):
        for receiver in others:
            service.submit(make_request(), receiver)
        with pytest.raises(Busy) as busy:
            service.submit(make_request(), Receiver())
        assert busy.value.retry_after >= 1
    for receiver in others:
        receiver.wait()


def test_the_orders_of_a_request_take_one_place_in_the_queue(service: Service) -> None:
    receivers = [Receiver() for _ in range(10 + 7)]
    with held(service):
        for number, receiver in enumerate(receivers):
            group = "many" if number < 10 else ""
            service.submit(make_request(group=group), receiver, admitted=0 < number < 10)
        with pytest.raises(Busy):
            service.submit(make_request(), Receiver())
    for receiver in receivers:
        receiver.wait()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1] * 99}, "context"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_impossible_orders(service: Service, bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        service.submit(GenerationRequest(**{"prompt": [256], "max_tokens": 3, **bad}), Receiver())


def test_no_room_and_no_tokens(service: Service) -> None:
    for asked in (make_request(max_tokens=0), make_request("x" * 63, max_tokens=5)):
        receiver = Receiver()
        service.submit(asked, receiver)
        assert receiver.wait().end == Finished() and not receiver.tokens
    told, receiver = make_request(max_tokens=0, top_logprobs=2, prompt_logprobs=True), Receiver()
    handle = service.submit(told, receiver)
    receiver.wait()
    assert len(handle.sequences[0].prompt_logprobs) == 3  # of a, b, c


def test_a_receiver_that_fails_harms_nobody(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(what: Any) -> None:
        raise RuntimeError("no")

    service.submit(make_request(), fail)
    receiver = Receiver()
    service.submit(make_request(), receiver)
    assert receiver.wait().end == Finished() and service.alive
    assert "RuntimeError('no')" in capsys.readouterr().err


def test_closing_lets_what_is_under_way_finish() -> None:
    service, receiver = Service(MODEL, TOKENIZER), Receiver()  # type: ignore[arg-type]
    service.submit(make_request(max_tokens=30, sampling=SamplingParams(0.0)), receiver)
    service.close(drain_seconds=20)
    assert receiver.wait().end == Finished()
    with pytest.raises(Closed):
        service.submit(make_request(), Receiver())


def test_closing_at_once_ends_what_is_under_way() -> None:
    service = Service(MODEL, TOKENIZER, max_rows=1)  # type: ignore[arg-type]
    receivers = [Receiver() for _ in range(20)]
    for receiver in receivers:
        service.submit(make_request(max_tokens=60, sampling=SamplingParams(0.0)), receiver)
    service.close()
    for receiver in receivers:
        receiver.wait()
    assert any(isinstance(r.end.error, Closed) for r in receivers if r.end)


def test_a_dead_replica_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    pool = WorkerPool(lambda index: Service(MODEL, TOKENIZER), 2)  # type: ignore[arg-type]
    broken = pool.replicas[0]

    def explode(**settings: Any) -> None:
        raise MemoryError("boom")

    broken.batch.step = explode  # type: ignore[method-assign]
    receiver = Receiver()
    broken.submit(make_request(), receiver)
    assert isinstance(receiver.wait().end.error, MemoryError)  # type: ignore[union-attr]
    assert not broken.alive and pool.alive
    for _ in range(4):
        receiver = Receiver()
        pool.submit(make_request(), receiver)
        assert receiver.wait().end == Finished()
    assert pool.replaced == 1 and pool.replicas[0] is not broken and pool.stats()["replaced"] == 1
    assert "boom" in capsys.readouterr().err
    pool.close()
    assert not pool.alive


def test_the_least_loaded_is_next() -> None:
    pool = WorkerPool(lambda index: Service(MODEL, TOKENIZER), 3)  # type: ignore[arg-type]
    gates = []
    for _ in range(6):
        gate = threading.Event()
        gates.append(gate)
        pool.submit(make_request(max_tokens=2), lambda what, gate=gate: gate.wait(20))  # type: ignore[misc]
    assert sorted(s.load for s in pool.replicas) == [2, 2, 2]
    for gate in gates:
        gate.set()
    pool.close(20)


def test_memory_bounds_the_rows() -> None:
    size = slot_bytes(MODEL)
    service = Service(MODEL, TOKENIZER, max_rows=32, memory_bytes=3 * size + 1)  # type: ignore[arg-type]
    assert service.max_rows == 3 and service.batch.cache.num_bytes == 3 * size
    service.close()
    torch.manual_seed(0)
