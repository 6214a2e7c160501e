"""Waiting clients are served in turn."""

import threading
from collections import Counter
from typing import Any

from engine_helpers import make_model
from hypothesis import given, strategies as st
from live import until
from serve_helpers import Receiver, make_request
from stubs import TOKENIZER

from nanochat.inference.sampling import SamplingParams
from nanochat.serve.fair_queue import FairQueue
from nanochat.serve.service import Finished, Service


def filled(text: str) -> FairQueue[tuple[str, int]]:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for number, client in enumerate(text):
        queue.add(client, (client, number))
    return queue


def drained(queue: FairQueue[tuple[str, int]]) -> list[tuple[str, int]]:
    return [queue.take() for _ in range(len(queue))]


def test_clients_alternate() -> None:
    assert "".join(client for client, _ in drained(filled("aaaaabbc"))) == "abcabaaa"


def test_new_client_waits_for_one_item_of_each() -> None:
    queue = filled("aaaabbbb")
    assert [queue.take()[0] for _ in range(3)] == ["a", "b", "a"]
    queue.add("c", ("c", 99))
    assert [queue.take()[0] for _ in range(4)] == ["b", "a", "c", "b"]


def test_remove() -> None:
    queue = filled("aab")
    queue.remove("a", ("a", 0))
    queue.remove("b", ("b", 2))
    queue.remove("b", ("b", 2))
    queue.remove("z", ("z", 0))
    assert drained(queue) == [("a", 1)] and len(queue) == 0


@given(st.text("abcd", max_size=40))
def test_every_item_is_served_in_order(text: str) -> None:
    """Each client's items keep their order; while all wait, no client is more than one item ahead."""
    taken = drained(filled(text))
    assert sorted(number for _, number in taken) == list(range(len(text)))
    counts, total = Counter[str](), Counter(text)
    for client, _ in taken:
        counts[client] += 1
        assert all(counts[other] >= counts[client] - 1 or counts[other] == total[other] for other in total)
    for client in set(text):
        own = [number for one, number in taken if one == client]
        assert own == sorted(own)


def test_many_requests_of_one_client_do_not_block_another() -> None:
    """With twenty requests of one client waiting, another client's request is the next but one."""
    service = Service(make_model(), TOKENIZER, max_rows=1)  # type: ignore[arg-type]
    ended: list[str] = []
    gate = threading.Event()

    def receiver(client: str) -> Any:
        def receive(what: Any) -> None:
            gate.wait(20)
            if isinstance(what, Finished):
                ended.append(client)

        return receive

    for _ in range(20):
        service.submit(make_request(max_tokens=3, client="flood"), receiver("flood"))
    until(lambda: service.batch.running)
    service.submit(make_request(max_tokens=3, client="other"), receiver("other"))
    gate.set()
    until(lambda: len(ended) == 21)
    assert ended.index("other") <= 2
    service.close()


def test_requests_beyond_the_slots_wait_in_the_queue() -> None:
    """They count as waiting at every step, and can be cancelled there."""
    service = Service(make_model(), TOKENIZER, max_rows=1, max_waiting=4)  # type: ignore[arg-type]
    gate = threading.Event()

    def hold(what: Any) -> None:
        gate.wait(20)

    service.submit(make_request(max_tokens=50, sampling=SamplingParams(0.0)), hold)
    until(lambda: service.batch.running)
    receivers = [Receiver() for _ in range(4)]
    handles = [service.submit(make_request(max_tokens=2), receiver) for receiver in receivers]
    assert service.stats()["requests_waiting"] == 4 and service.load == 5
    handles[1].cancel()
    gate.set()
    for receiver in receivers:
        assert receiver.wait().end == Finished()
    assert not receivers[1].tokens and receivers[0].tokens
    service.close()
