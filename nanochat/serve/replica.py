"""A replica in a process of its own, so that it can die alone: a Service at the other end of a socket.

    RemoteService   in the server: looks like a Service, so a WorkerPool takes it
    serve_replica   in the child: a real Service that does what it is told

They speak JSON, a message a line. To the child: an order with a number, or that number to be cancelled, or a question
for figures, or to close. From it: tokens and ends by number, figures. A child that dies is an end of the socket: what
it had under way ends with an error, and the pool makes another one.
"""

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from nanochat.common import warn
from nanochat.inference.request import GenerationRequest, Token, TokenLogprobs
from nanochat.inference.sampling import SamplingParams
from nanochat.serve.service import (
    Busy,
    Closed,
    Deliver,
    Finished,
    RequestHandle,
    Service,
    count_requests,
)

STATS = (
    "rows_running",
    "max_rows",
    "requests_waiting",
    "tokens",
    "steps",
    "cache_bytes",
    "prefix_bytes",
    "prefix_hit_tokens",
    "prompt_tokens",
)
STATS_SECONDS = 2.0  # to wait for a replica's figures, which it may have its reasons not to give

Message = dict[str, Any]
Observe = Callable[[str, float], None]


def told_as_list(told: TokenLogprobs | None) -> list[Any] | None:
    return None if told is None else [told.logprob, told.top]


def told_of_list(found: list[Any]) -> TokenLogprobs:
    return TokenLogprobs(found[0], [(i, logprob) for i, logprob in found[1]])


# ---------------------------------------------------------------------------------------------------
# In the server


class RemoteService:
    """A Service in a child process. It takes orders at once; they wait until the child has loaded its model."""

    def __init__(
        self, command: Sequence[str], max_context: int, max_requests: int, observe: Observe = lambda name, value: None
    ) -> None:
        """`command` starts the child, which is given its socket's number as the last argument."""
        self.max_context, self.max_requests, self.observe = max_context, max_requests, observe
        self.error: Exception | None = None
        self.tokens_made = self.orders_lost = 0
        self._closing = False
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._tickets: dict[int, RequestHandle] = {}
        self.load = 0  # rows running and waiting
        self._stats: Message = dict.fromkeys(STATS, 0)  # until the child tells
        self._told = threading.Event()  # figures came
        self.ready = threading.Event()  # the child has its model
        self._socket, other = socket.socketpair()
        self.process = subprocess.Popen(
            [*command, str(other.fileno())], pass_fds=[other.fileno()], start_new_session=True
        )
        other.close()
        self._out: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name="nanochat-replica", daemon=True) for work in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    # -- what a Service offers ------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.error is None

    def submit(self, order: GenerationRequest, deliver: Deliver, more: bool = False) -> RequestHandle:
        """As Service.submit."""
        ticket = RequestHandle(order.fit(self.max_context), deliver, self)
        with self._lock:
            if self._closing or self.error:
                raise Closed("the service is shutting down" if self._closing else f"the service died: {self.error!r}")
            if not more and count_requests(self._tickets.values()) >= self.max_requests:
                raise Busy(len(self._tickets) * 0.2)
            number = next(self._numbers)
            self._tickets[number] = ticket
            self.load += order.num_samples
        self._out.put({"order": number, **asdict(ticket.order)})
        return ticket

    def _cancel(self, ticket: RequestHandle, index: int | None) -> None:
        number = next((n for n, other in list(self._tickets.items()) if other is ticket), None)
        if number is not None:
            self._out.put({"cancel": number, "index": index})

    def stats(self) -> dict[str, Any]:
        """The replica's figures, or its last ones if it does not answer."""
        if self.alive and self.ready.is_set():
            self._told.clear()
            self._out.put({"stats": True})
            self._told.wait(STATS_SECONDS)
        return {**self._stats, "alive": self.alive}

    def close(self, drain_seconds: float = 0.0) -> None:
        """As Service.close."""
        with self._lock:
            self._closing = True
        self._out.put({"close": drain_seconds})
        try:
            self.process.wait(drain_seconds + 5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for thread in self._threads:
            thread.join(5)

    # -- the threads ----------------------------------------------------------------------------------

    def _write(self) -> None:
        while (message := self._out.get()) is not None:
            with contextlib.suppress(OSError):  # the reader notices that the child is gone
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        try:
            # A child that was killed may leave half a line, which is no JSON.
            with self._socket.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
                for line in lines:
                    self._take(json.loads(line))
        finally:
            self._end()

    def _end(self) -> None:
        """The child is gone: so are its requests."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:  # it lives, but cannot be heard any more
            self.process.kill()
            code = self.process.wait()
        self.error = (
            Closed("the service was shut down") if self._closing else RuntimeError(f"its process ended with {code}")
        )
        with self._lock:
            left, self._tickets, self.load = list(self._tickets.values()), {}, 0
            self.orders_lost = len(left)
        for ticket in left:
            ticket.deliver(Finished(self.error))
        self._told.set()
        self.ready.set()
        self._out.put(None)
        self._socket.close()

    def _take(self, message: Message) -> None:
        for name, value in message.get("observed", ()):
            self.observe(name, value)
        if "stats" in message:
            self._stats = message["stats"]
            self._told.set()
            self.ready.set()
        ticket = self._tickets.get(message.get("order", -1))
        if ticket is None:
            return
        for row, end in zip(ticket.sequences, message["ends"]):
            row.end = end
        if "told" in message:
            ticket.sequences[0].prompt_logprobs = list(map(told_of_list, message["told"]))
        if "tokens" in message:
            self.tokens_made += len(message["tokens"])
            ticket.deliver(
                [
                    Token(ticket.sequences[index], i, mask, told and told_of_list(told))
                    for index, i, mask, told in message["tokens"]
                ]
            )
        else:
            with self._lock:
                del self._tickets[message["order"]]
                self.load -= ticket.order.num_samples
            ticket.deliver(Finished(Closed("the service was shut down") if message["closed"] else None))


# ---------------------------------------------------------------------------------------------------
# In the child


def serve_replica(make: Callable[[Observe], Service], number: int) -> None:
    """Do what comes through socket `number` until it ends. `make` builds the service, given whom to tell of times."""
    with socket.socket(fileno=number) as connection:
        lock = threading.Lock()
        observed: deque[tuple[str, float]] = deque()

        def send(message: Message) -> None:
            with lock, contextlib.suppress(OSError):  # the server is gone: the reading below ends
                message["observed"] = [observed.popleft() for _ in range(len(observed))]
                connection.sendall(json.dumps(message).encode() + b"\n")

        service = make(lambda name, value: observed.append((name, value)))
        send({"stats": service.stats()})
        tickets: dict[int, RequestHandle] = {}
        drain = 0.0
        with connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "order" in message:
                    accept(service, message, tickets, send)
                elif "cancel" in message:
                    if ticket := tickets.get(message["cancel"]):
                        ticket.cancel(message["index"])
                elif "stats" in message:
                    send({"stats": service.stats()})
                else:
                    drain = message["close"]
                    break
        service.close(drain)


def accept(
    service: Service, message: Message, tickets: dict[int, RequestHandle], send: Callable[[Message], None]
) -> None:
    """Hand an order to the service, and what comes of it back."""
    number = message.pop("order")
    made, told_of_prompt = threading.Event(), threading.Event()

    def deliver(what: list[Token] | Finished) -> None:
        made.wait()
        ticket = tickets[number]
        answer: Message = {"order": number, "ends": [row.end for row in ticket.sequences]}
        if not told_of_prompt.is_set():  # what is known of the prompt goes with what comes first
            told_of_prompt.set()
            answer["told"] = [told_as_list(told) for told in ticket.sequences[0].prompt_logprobs]
        if isinstance(what, list):
            send({**answer, "tokens": [[t.sequence.index, t.id, t.mask, told_as_list(t.logprobs)] for t in what]})
            return
        closed = isinstance(what.error, Closed)
        if what.error is not None and not closed:
            warn(f"a replica failed: {what.error!r}")
            os._exit(1)  # the server sees that and makes another one
        del tickets[number]
        send({**answer, "closed": closed})

    order = GenerationRequest(**{**message, "sampling": SamplingParams(**message["sampling"])})
    tickets[number] = service.submit(order, deliver, more=True)
    made.set()
