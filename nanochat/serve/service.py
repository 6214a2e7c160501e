"""The engine as a service: one thread turns the running batch, requests from any thread join it and leave it.

    GenerationRequest      what is asked for: a prompt, how many samples, how to draw them
    RequestHandle     an order under way; cancel() frees its rows within a step
    Service    one replica: a model, its running batch, its queue, its thread
    WorkerPool several replicas, the least loaded is given the next order; one that died is replaced

What comes of an order is handed to its `deliver` on the service's thread, in order: lists of tokens as they are
drawn, then exactly one End.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError, warn
from nanochat.conversation import Tokenizer
from nanochat.gpt import GPT
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.prefill import PREFILL_CHUNK
from nanochat.inference.prefix_cache import PrefixCache
from nanochat.inference.request import GenerationRequest, Token
from nanochat.inference.tools import DEFAULT_TOOLS, Tool, ToolTable
from nanochat.serve.fair_queue import FairQueue

PREFILL_CHUNKS_A_STEP = 1  # pieces of waiting prompts between two steps of the running rows
MOST_DEATHS = 3  # of replicas in a row, with orders and without a token: what is wrong, new ones do not mend
MOST_RETRY_SECONDS = 60.0  # whoever waits for hours before trying again has gone
MIB = 2**20


class Busy(Exception):
    """The queue is full; try again after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.retry_after = min(max(1.0, seconds), MOST_RETRY_SECONDS)
        super().__init__(f"too many requests are waiting; try again in {self.retry_after:.0f} s")


class Closed(Exception):
    """The service takes no more orders: it is being shut down, or it died."""


@dataclass(frozen=True)
class Finished:
    """The last that is delivered. `error` is None where all rows came to their end or were cancelled."""

    error: Exception | None = None


Deliver = Callable[[list[Token] | Finished], None]


class RequestHandle:
    """An order under way."""

    def __init__(self, order: GenerationRequest, deliver: Deliver, service: Any) -> None:
        self.order, self.service, self._deliver = order, service, deliver
        self.sequences = order.sequences()
        self.asked = time.monotonic()
        self.first_token: float | None = None
        self.ended = False

    def cancel(self, index: int | None = None) -> None:
        """Stop sample `index`, or all of them. Finished is delivered once none is left."""
        self.service._cancel(self, index)

    def deliver(self, what: list[Token] | Finished) -> None:
        """On the service's thread. A receiver that fails must not stop the others."""
        if self.ended:
            return
        self.ended = isinstance(what, Finished)
        try:
            self._deliver(what)
        except Exception as error:
            warn(f"a request's receiver failed: {error!r}")
            self.ended = True
        if self.ended:
            self._deliver = lambda what: None  # it knows this ticket: in a circle, both would outlive the request


class Service:
    """One replica. Its memory is reserved when it is made: `max_rows` rows of the model's whole context."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 32,
        max_waiting: int = 64,
        memory_bytes: int | None = None,
        prefix_bytes: int = 256 * MIB,
        int8: bool = False,
        tools: Sequence[Tool] = DEFAULT_TOOLS,
        observe: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        """`memory_bytes` bounds the rows' keys and values: as many rows as fit, at most `max_rows`. `observe` is told
        "step_seconds", "batch_rows", "first_token_seconds", "between_tokens_seconds", as they happen."""
        self.tokenizer, self.max_waiting, self.observe = tokenizer, max_waiting, observe
        self.weights = DecodingWeights(model, int8)
        self.max_context = model.config.sequence_len
        if memory_bytes is not None:
            max_rows = max(1, min(max_rows, memory_bytes // row_bytes(model)))
        self.max_rows = max_rows
        self.prefixes = PrefixCache(PREFILL_CHUNK, prefix_bytes)
        ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.encode_special("<|bos|>")}
        self.batch = RunningBatch(
            self.weights.current(),
            ToolTable(tokenizer, tools),
            ends,
            max_rows,
            self.max_context,
            self.prefixes,
            self.weights.packed,
        )
        self._orders: FairQueue[RequestHandle] = FairQueue()  # not yet given to the batch: it has no room
        self._rows_waiting = 0  # of these; counted as they come and go, as a request may be of hundreds
        self._cancelled: deque[tuple[RequestHandle, int | None]] = deque()
        self._tickets: dict[int, RequestHandle] = {}  # by id of a row in the batch
        self._wake = threading.Condition()
        self._closing = False
        self.error: Exception | None = None
        self.tokens_made = self.steps = 0
        self.orders_lost = 0  # when it died
        self.step_seconds = 0.05  # smoothed, for Retry-After
        self._thread = threading.Thread(target=self._work, name="nanochat-service", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    @property
    def load(self) -> int:
        """Rows running and waiting."""
        return self._rows_waiting + len(self._tickets)

    def submit(self, order: GenerationRequest, deliver: Deliver, more: bool = False) -> RequestHandle:
        """Queue an order; `more`: it belongs to others that were let in, and is not refused for want of room.

        Raises Busy, Closed, or ValueError for one that can never be carried out."""
        ticket = RequestHandle(order.fit(self.max_context), deliver, self)
        with self._wake:
            if self._closing or not self.alive:
                raise Closed("the service is shutting down" if self._closing else f"the service died: {self.error!r}")
            if not more and count_requests(self._orders) >= self.max_waiting:
                raise Busy(len(self._orders) * self.step_seconds * 20)
            self._orders.add(order.client, ticket)
            self._rows_waiting += order.num_samples
            self._wake.notify()
        return ticket

    def _cancel(self, ticket: RequestHandle, index: int | None) -> None:
        with self._wake:
            self._cancelled.append((ticket, index))
            self._wake.notify()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more orders; let those under way finish for up to so long, then end them with Closed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(drain_seconds if drain_seconds > 0 else 0.01)
        if self._thread.is_alive():
            self.error = Closed("the service was shut down")
            with self._wake:
                self._wake.notify()
            self._thread.join(30)

    def stats(self) -> dict[str, Any]:
        """How it is doing now."""
        with self._wake:
            waiting = len(self._orders)
        running = len(self.batch.running) + len(self.batch.calling)
        return {
            "alive": self.alive,
            "rows_running": running,
            "max_rows": self.max_rows,
            "requests_waiting": waiting + len(self.batch.waiting),
            "tokens": self.tokens_made,
            "steps": self.steps,
            "cache_bytes": self.batch.cache.num_bytes,
            "prefix_bytes": self.prefixes.num_bytes,
            "prefix_hit_tokens": self.prefixes.hit_tokens,
            "prompt_tokens": self.prefixes.prompt_tokens,
        }

    # -- the thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._next_orders():
                self._step()
        except Exception as error:  # the batch is in an unknown state: end it all, the pool makes a new one
            self.error = self.error or error
        finally:
            self._end_all(self.error or (Closed("the service was shut down") if self._closing else None))

    def _next_orders(self) -> bool:
        """Wait for work and take it in. False once there is none and there will be none."""
        with self._wake:
            while not self._orders and not self._cancelled and self.batch.idle and not self._closing and not self.error:
                self._wake.wait()
            if self.error:
                return False
            cancelled, self._cancelled = list(self._cancelled), deque()
            for ticket, index in cancelled:
                if index is None and self._orders.remove(ticket.order.client, ticket):
                    self._rows_waiting -= ticket.order.num_samples
            orders = self._admitted()
        for ticket in orders:
            if all(row.done for row in ticket.sequences):  # nothing to decode
                ticket.deliver(Finished())
                continue
            self._tickets |= {id(row): ticket for row in ticket.sequences}
            self.batch.submit(ticket.sequences)
        for ticket, index in cancelled:
            for row in ticket.sequences if index is None else [ticket.sequences[index]]:
                if not row.done:
                    self.batch.cancel(row)
            self._end_if_done(ticket)
        return not (self.batch.idle and self._closing and not self._orders)

    def _admitted(self) -> list[RequestHandle]:
        """The orders that there is room for, clients in turn. What does not fit yet waits here, not in the batch,
        where it would stand before orders that come later but are due sooner."""
        room = self.max_rows - len(self.batch.running) - len(self.batch.calling) - sum(map(len, self.batch.waiting))
        orders = []
        while self._orders and room > 0:
            orders.append(self._orders.take())
            room -= orders[-1].order.num_samples
            self._rows_waiting -= orders[-1].order.num_samples
        return orders

    def _step(self) -> None:
        if self.batch.idle:
            return
        started = time.monotonic()
        new = self.batch.step(prefill_chunks=PREFILL_CHUNKS_A_STEP)
        now = time.monotonic()
        self.steps += 1
        self.tokens_made += len(new)
        self.step_seconds = 0.95 * self.step_seconds + 0.05 * (now - started)
        self.observe("step_seconds", now - started)
        self.observe("batch_rows", len(self.batch.running))
        by_ticket: dict[int, tuple[RequestHandle, list[Token]]] = {}
        for token in new:
            ticket = self._tickets[id(token.sequence)]
            by_ticket.setdefault(id(ticket), (ticket, []))[1].append(token)
        for ticket, tokens in by_ticket.values():
            if ticket.first_token is None:
                ticket.first_token = now
                self.observe("first_token_seconds", now - ticket.asked)
            else:
                self.observe("between_tokens_seconds", now - started)
            ticket.deliver(tokens)
            self._end_if_done(ticket)

    def _end_if_done(self, ticket: RequestHandle) -> None:
        if all(row.done for row in ticket.sequences):
            for row in ticket.sequences:
                self._tickets.pop(id(row), None)
            ticket.deliver(Finished())

    def _end_all(self, error: Exception | None) -> None:
        with self._wake:
            left = [*self._orders, *self._tickets.values()]
            self._orders.clear()
            self._rows_waiting, self.orders_lost = 0, len(left)
            self._closing = True
        self.batch.close()
        for ticket in left:
            ticket.deliver(Finished(error or Closed("the service was shut down")))
        self._tickets.clear()


def count_requests(tickets: Iterable[RequestHandle]) -> int:
    """How many requests they belong to; an order that names none is one of its own."""
    return len({ticket.order.group or id(ticket) for ticket in tickets})


def row_bytes(model: GPT) -> int:
    """Memory of the keys and values of one row of the whole context."""
    config = model.config
    slots = sum(min(config.sequence_len, left + 1) for left, _ in config.window_sizes())
    return 2 * slots * config.n_kv_head * config.head_dim * model.compute_dtype.itemsize


class WorkerPool:
    """Replicas behind one door. `make` builds a Service, or what looks like one; it is called again when one died."""

    def __init__(self, make: Callable[[int], Any], size: int = 1) -> None:
        if size < 1:
            raise UserError(f"--num-gpus must be at least 1, got {size}")
        self._make = make
        self._lock = threading.Lock()
        self._turn = itertools.count()
        self.replaced = 0
        self._died_at_once = 0  # replicas in a row that died with orders, and none ever had a token for any
        self.services = [make(index) for index in range(size)]

    def submit(self, order: GenerationRequest, deliver: Deliver, more: bool = False) -> RequestHandle:
        """Give an order to the least loaded replica. Raises what Service.submit raises."""
        with self._lock:
            self._replace_dead()
            turn = next(self._turn)
            count = len(self.services)
            order_of = sorted(range(count), key=lambda i: (self.services[i].load, (i - turn) % count))
        chosen = self.services[order_of[0]]
        try:
            return chosen.submit(order, deliver, more)
        except Closed:
            if chosen.error is None or isinstance(chosen.error, Closed):
                raise
        return self.submit(order, deliver, more)  # it died at this very moment

    def _replace_dead(self) -> None:
        for index, service in enumerate(self.services):
            if not service.alive and not isinstance(service.error, Closed) and service.error is not None:
                warn(f"replica {index} died ({service.error!r}): a new one takes its place")
                if any(each.tokens_made for each in self.services):
                    self._died_at_once = 0
                elif service.orders_lost:
                    self._died_at_once += 1
                self.services[index] = self._make(index)
                self.replaced += 1

    @property
    def alive(self) -> bool:
        """Whether an order could be taken now, if need be by a replica made anew."""
        return any(service.alive or service.error is not None for service in self.services)

    @property
    def failing(self) -> bool:
        """Whether new replicas do not help: one after the other died at its first request. Over once one answers."""
        return self._died_at_once >= MOST_DEATHS and not any(service.tokens_made for service in self.services)

    def stats(self) -> dict[str, Any]:
        parts = [service.stats() for service in self.services]
        return {
            "replicas": parts,
            "replaced": self.replaced,
            **{key: sum(part[key] for part in parts) for key in parts[0] if key != "alive"},
        }

    def close(self, drain_seconds: float = 0.0) -> None:
        """Close all replicas, side by side."""
        threads = [threading.Thread(target=s.close, args=(drain_seconds,)) for s in self.services]
        for thread in threads:
            thread.start()
        for thread in threads:
            with contextlib.suppress(RuntimeError):
                thread.join()
