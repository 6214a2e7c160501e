"""Service and WorkerPool: submitting, cancelling, crashes, closing."""

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

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.inference.request import GenerationRequest
from nanochat.inference.sampling import SamplingParams
from nanochat.serve.replica import Busy, Closed, Finished
from nanochat.serve.service import Service, WorkerPool, slot_bytes

MODEL = make_model()


@pytest.fixture
def service() -> Any:
    made = Service(MODEL, TOKENIZER, max_rows=4, max_waiting=8)  # type: ignore[arg-type]
    yield made
    made.close()
    assert not made._thread.is_alive()


def test_same_tokens_as_the_engine(service: Service) -> None:
    """A seed gives the same answer alone, among others, and from Engine.generate_batch."""
    receivers = [Receiver() for _ in range(7)]
    handles = [service.submit(make_request("x" * i, seed=i, num_samples=1 + i % 2), r) for i, r in enumerate(receivers)]
    engine = Engine(MODEL, TOKENIZER)  # type: ignore[arg-type]
    for i, (handle, receiver) in enumerate(zip(handles, receivers)):
        assert receiver.wait().end == Finished()
        prompt = [256, *b"x" * i]
        expected, _ = engine.generate_batch(prompt, 1 + i % 2, max_tokens=8, temperature=1.0, seed=i)
        assert [prompt + sequence.tokens for sequence in handle.sequences] == expected
        for sequence in handle.sequences:
            ends = [sequence.end] if sequence.end is not None else []
            assert [t.id for t in receiver.tokens if t.sequence is sequence] == sequence.tokens + ends
    assert service.stats()["rows_running"] == 0 and service.load == 0


def test_cancelled_samples_stop_within_a_step(service: Service) -> None:
    receivers = [Receiver() for _ in range(6)]
    handles = [
        service.submit(make_request(max_tokens=50, num_samples=2, sampling=SamplingParams(1.0, top_k=0)), r)
        for r in receivers
    ]
    for handle in handles:
        handle.cancel()
        handle.cancel()  # a second time has no effect
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
    """Inside the block, new requests stay in the service's queue."""
    gate, first = threading.Event(), Receiver()

    def hold(message: Any) -> None:
        gate.wait(20)
        first(message)

    service.submit(make_request(), hold)
    until(lambda: service.batch.running)  # it is in the batch, and its callback blocks the thread
    yield
    gate.set()
    first.wait()


def test_full_queue_raises_busy(service: Service) -> None:
    others = [Receiver() for _ in range(8)]
    with held(service):
        for receiver in others:
            service.submit(make_request(), receiver)
        with pytest.raises(Busy) as busy:
            service.submit(make_request(), Receiver())
        assert busy.value.retry_after >= 1
    for receiver in others:
        receiver.wait()


def test_a_group_takes_one_place_in_the_queue(service: Service) -> None:
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
    ("bad", "word"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1] * 99}, "context"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"num_samples": 0}, "num_samples"),
    ],
)
def test_invalid_requests(service: Service, bad: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        service.submit(GenerationRequest(**{"prompt": [256], "max_tokens": 3, **bad}), Receiver())


def test_requests_without_tokens_to_decode(service: Service) -> None:
    for request in (make_request(max_tokens=0), make_request("x" * 63, max_tokens=5)):
        receiver = Receiver()
        service.submit(request, receiver)
        assert receiver.wait().end == Finished() and not receiver.tokens
    request, receiver = make_request(max_tokens=0, top_logprobs=2, prompt_logprobs=True), Receiver()
    handle = service.submit(request, receiver)
    receiver.wait()
    assert len(handle.sequences[0].prompt_logprobs) == 3  # of a, b, c


def test_failing_callback_does_not_affect_others(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(message: Any) -> None:
        raise RuntimeError("no")

    service.submit(make_request(), fail)
    receiver = Receiver()
    service.submit(make_request(), receiver)
    assert receiver.wait().end == Finished() and service.alive
    assert "RuntimeError('no')" in capsys.readouterr().err


def test_close_finishes_active_requests() -> None:
    service, receiver = Service(MODEL, TOKENIZER), Receiver()  # type: ignore[arg-type]
    service.submit(make_request(max_tokens=30, sampling=SamplingParams(0.0)), receiver)
    service.close(drain_seconds=20)
    assert receiver.wait().end == Finished()
    with pytest.raises(Closed):
        service.submit(make_request(), Receiver())


def test_close_without_draining_ends_active_requests() -> None:
    service = Service(MODEL, TOKENIZER, max_rows=1)  # type: ignore[arg-type]
    receivers = [Receiver() for _ in range(20)]
    for receiver in receivers:
        service.submit(make_request(max_tokens=60, sampling=SamplingParams(0.0)), receiver)
    service.close()
    for receiver in receivers:
        receiver.wait()
    assert any(isinstance(r.end.error, Closed) for r in receivers if r.end)


def test_dead_replica_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_replica_that_cannot_start_again_leaves_the_others_to_work(capsys: pytest.CaptureFixture[str]) -> None:
    made = list[Service]()

    def make(index: int) -> Service:
        if len(made) == 2:
            raise UserError("the model's file has changed since this server was started")
        made.append(Service(MODEL, TOKENIZER))  # type: ignore[arg-type]
        return made[-1]

    pool = WorkerPool(make, 2)

    def explode(**settings: Any) -> None:
        raise MemoryError("boom")

    for number, replica in enumerate(list(made)):
        replica.batch.step = explode  # type: ignore[method-assign]
        receiver = Receiver()
        replica.submit(make_request(), receiver)
        assert isinstance(receiver.wait().end.error, MemoryError)  # type: ignore[union-attr]
        if number == 0:
            receiver = Receiver()
            pool.submit(make_request(), receiver)
            assert receiver.wait().end == Finished() and "changed" in capsys.readouterr().err
    with pytest.raises(Closed):
        pool.submit(make_request(), Receiver())
    assert pool.replaced == 0
    pool.close()


def test_least_loaded_replica_is_chosen() -> None:
    pool = WorkerPool(lambda index: Service(MODEL, TOKENIZER), 3)  # type: ignore[arg-type]
    gates = []
    for _ in range(6):
        gate = threading.Event()
        gates.append(gate)
        pool.submit(make_request(max_tokens=2), lambda message, gate=gate: gate.wait(20))  # type: ignore[misc]
    assert sorted(s.load for s in pool.replicas) == [2, 2, 2]
    for gate in gates:
        gate.set()
    pool.close(20)


def test_memory_limits_the_batch_slots() -> None:
    size = slot_bytes(MODEL)
    service = Service(MODEL, TOKENIZER, max_rows=32, memory_bytes=3 * size + 1)  # type: ignore[arg-type]
    assert service.max_rows == 3 and service.batch.cache.num_bytes == 3 * size
    service.close()
    torch.manual_seed(0)
