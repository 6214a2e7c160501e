"""A replica in a process of its own, so that a crash ends only that process.

    RemoteService  in the server: a Replica that forwards requests over a socket
    serve_replica  in the child: a Service that carries them out

Both send JSON, one message a line. To the child: {"submit": id, ...GenerationRequest}, {"cancel": id, "index"},
{"stats"}, {"close": drain_seconds}. From the child: {"id", "tokens"}, {"id", "finished"}, {"stats"}; every message
carries "observed". The end of the socket means that the other side has exited: unfinished requests then end with an
error, and the pool starts another replica.
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
from nanochat.serve.replica import Closed, Finished, Replica, RequestHandle
from nanochat.serve.service import Observe, Service

STATS = (  # the keys of Service.stats() besides "alive"
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
STATS_TIMEOUT_SECONDS = 2.0  # a busy replica may not answer in time

WireMessage = dict[str, Any]


# ---------------------------------------------------------------------------------------------------
# In the server


class RemoteService(Replica):
    """A Service in a child process. It takes requests at once; they wait until the child has loaded its model."""

    def __init__(
        self, command: Sequence[str], max_context: int, max_requests: int, observe: Observe = lambda name, value: None
    ) -> None:
        """`command` starts the child; the file descriptor of its socket is appended as the last argument."""
        super().__init__(max_context, max_requests)
        self.observe = observe
        self._ids = itertools.count()
        self._handles: dict[int, RequestHandle] = {}
        self._waiting = self._handles.values()
        self._stats: WireMessage = dict.fromkeys(STATS, 0)
        self._stats_arrived = threading.Event()
        self.ready = threading.Event()  # the child has loaded its model
        self._socket, other = socket.socketpair()
        self.process = subprocess.Popen(
            [*command, str(other.fileno())], pass_fds=[other.fileno()], start_new_session=True
        )
        other.close()
        self._outbox: queue.SimpleQueue[WireMessage | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name="nanochat-replica", daemon=True) for work in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    # -- from any thread ------------------------------------------------------------------------------

    def _enqueue(self, handle: RequestHandle) -> None:
        id = next(self._ids)
        self._handles[id] = handle
        self._outbox.put({"submit": id, **asdict(handle.request)})

    def cancel(self, handle: RequestHandle, index: int | None) -> None:
        id = next((id for id, other in list(self._handles.items()) if other is handle), None)
        if id is not None:
            self._outbox.put({"cancel": id, "index": index})

    def stats(self) -> dict[str, Any]:
        """As Replica.stats; the last known figures if the child does not answer in time."""
        if self.alive and self.ready.is_set():
            self._stats_arrived.clear()
            self._outbox.put({"stats": True})
            self._stats_arrived.wait(STATS_TIMEOUT_SECONDS)
        return {**self._stats, "alive": self.alive}

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._changed:
            self._closing = True
        self._outbox.put({"close": drain_seconds})
        try:
            self.process.wait(drain_seconds + 5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for thread in self._threads:
            thread.join(5)

    # -- the threads ----------------------------------------------------------------------------------

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):  # the child has exited: _read notices
                self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _read(self) -> None:
        try:
            # A killed child may leave an incomplete line, which is not JSON.
            with self._socket.makefile("rb") as lines, contextlib.suppress(OSError, ValueError):
                for line in lines:
                    self._handle(json.loads(line))
        finally:
            self._finish_all()

    def _handle(self, message: WireMessage) -> None:
        for name, value in message["observed"]:
            self.observe(name, value)
        if "stats" in message:
            self._stats = message["stats"]
            self._stats_arrived.set()
            self.ready.set()
        handle = self._handles.get(message.get("id", -1))
        if handle is None:
            return
        if "finished" in message:
            with self._changed:
                del self._handles[message["id"]]
            handle.deliver(Finished(Closed("the service was shut down") if message["finished"] == "closed" else None))
            return
        handle.sequences[0].cached_tokens = message.get("cached_tokens", handle.sequences[0].cached_tokens)
        if "prompt_logprobs" in message:
            handle.sequences[0].prompt_logprobs = [TokenLogprobs(*found) for found in message["prompt_logprobs"]]
        tokens = []
        for index, id, mask, is_end, logprobs in message["tokens"]:
            sequence = handle.sequences[index]
            sequence.end = id if is_end else None
            tokens.append(Token(sequence, id, mask, logprobs and TokenLogprobs(*logprobs)))
        self.tokens_made += len(tokens)
        handle.deliver(tokens)

    def _finish_all(self) -> None:
        """End all requests, since the child has exited."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:  # it is running, but its socket is closed
            self.process.kill()
            code = self.process.wait()
        with self._changed:
            died = RuntimeError(f"its process ended with {code}")
            self.error = Closed("the service was shut down") if self._closing else died
            unfinished = list(self._handles.values())
            self._handles.clear()
            self.requests_lost = len(unfinished)
        for handle in unfinished:
            handle.deliver(Finished(self.error))
        self._stats_arrived.set()
        self.ready.set()
        self._outbox.put(None)
        self._socket.close()


# ---------------------------------------------------------------------------------------------------
# In the child


def serve_replica(make: Callable[[Observe], Service], fd: int) -> None:
    """Serve the socket `fd` until the server closes it or says so. `make(observe)` loads the service."""
    with socket.socket(fileno=fd) as connection:
        lock = threading.Lock()
        observed: deque[tuple[str, float]] = deque()

        def send(message: WireMessage) -> None:
            with lock, contextlib.suppress(OSError):  # the server has exited: the loop below ends
                message["observed"] = [observed.popleft() for _ in range(len(observed))]
                connection.sendall(json.dumps(message).encode() + b"\n")

        service = make(lambda name, value: observed.append((name, value)))
        send({"stats": service.stats()})
        handles: dict[int, RequestHandle] = {}
        drain_seconds = 0.0
        with connection.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "submit" in message:
                    submit(service, message, handles, send)
                elif "cancel" in message:
                    if handle := handles.get(message["cancel"]):
                        handle.cancel(message["index"])
                elif "stats" in message:
                    send({"stats": service.stats()})
                else:
                    drain_seconds = message["close"]
                    break
        service.close(drain_seconds)


def submit(
    service: Service, message: WireMessage, handles: dict[int, RequestHandle], send: Callable[[WireMessage], None]
) -> None:
    """Submit a request to the service, and send its tokens back. If the service fails, exits the process."""
    id = message.pop("submit")
    request = GenerationRequest(**{**message, "sampling": SamplingParams(**message["sampling"])})
    submitted = threading.Event()  # `deliver` may be called before service.submit has returned
    first_tokens = True  # what is known of the prompt goes with them

    def deliver(message: list[Token] | Finished) -> None:
        nonlocal first_tokens
        submitted.wait()
        if isinstance(message, Finished):
            closed = isinstance(message.error, Closed)
            if message.error is not None and not closed:
                warn(f"a replica failed: {message.error!r}")
                os._exit(1)  # the server notices and starts another one
            del handles[id]
            send({"id": id, "finished": "closed" if closed else "done"})
            return
        answer: WireMessage = {"id": id, "tokens": [token_to_wire(token) for token in message]}
        if first_tokens:
            first_tokens = False
            answer["cached_tokens"] = max(sequence.cached_tokens for sequence in handles[id].sequences)
            if request.prompt_logprobs:
                answer["prompt_logprobs"] = list(map(logprobs_to_wire, handles[id].sequences[0].prompt_logprobs))
        send(answer)

    handles[id] = service.submit(request, deliver, admitted=True)
    submitted.set()


def token_to_wire(token: Token) -> list[Any]:
    return [
        token.sequence.index,
        token.id,
        token.mask,
        token.is_end,
        token.logprobs and logprobs_to_wire(token.logprobs),
    ]


def logprobs_to_wire(logprobs: TokenLogprobs) -> list[Any]:
    return [logprobs.logprob, logprobs.top]
