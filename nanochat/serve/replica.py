"""The interface of a replica: submit a GenerationRequest, get a RequestHandle, receive its tokens by callback.

`deliver` is called on a thread of the replica: with lists of tokens as they are decoded, then with exactly one
Finished.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nanochat.common import warn
from nanochat.inference.request import GenerationRequest, Token

MAX_RETRY_SECONDS = 60.0  # a client would not come back after a longer wait


class Busy(Exception):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, seconds: float) -> None:
        self.retry_after = min(max(1.0, seconds), MAX_RETRY_SECONDS)
        super().__init__(f"too many requests are waiting; try again in {self.retry_after:.0f} s")


class Closed(Exception):
    """The replica takes no more requests: it is shutting down, or it died."""


@dataclass(frozen=True)
class Finished:
    """The last message of a request. `error`: why it was ended early, None if it was completed or cancelled."""

    error: Exception | None = None


Deliver = Callable[[list[Token] | Finished], None]


class RequestHandle:
    """A submitted GenerationRequest."""

    def __init__(self, request: GenerationRequest, deliver: Deliver, replica: "Replica") -> None:
        self.request, self.replica, self._deliver = request, replica, deliver
        self.sequences = request.sequences()
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # time.monotonic() of its delivery
        self.finished = False

    def cancel(self, index: int | None = None) -> None:
        """Cancel one sample, or all. Finished is delivered when the last sample has stopped."""
        self.replica.cancel(self, index)

    def deliver(self, message: list[Token] | Finished) -> None:
        """For the replica. A callback that raises does not affect other requests."""
        if self.finished:
            return
        self.finished = isinstance(message, Finished)
        try:
            self._deliver(message)
        except Exception as error:
            warn(f"the callback of a request failed: {error!r}")
            self.finished = True
        if self.finished:
            del self._deliver  # the callback refers to this handle: the cycle would outlive the request
            self.replica.release(self)


class Replica(ABC):
    """A model that decodes requests: Service in this process, RemoteService in another."""

    _waiting: Iterable[RequestHandle]  # count against max_waiting
    request_seconds = 0.2  # estimated for each waiting request, for Retry-After

    def __init__(self, max_context: int, max_waiting: int) -> None:
        """`max_waiting`: groups of requests in the queue; more are refused."""
        self.max_context, self.max_waiting = max_context, max_waiting
        self.load = 0  # samples of unfinished requests
        self.tokens_made = 0
        self.requests_lost = 0  # unfinished when it died
        self.error: Exception | None = None  # why it has ended; Closed if it was shut down
        self._closing = False
        self._changed = threading.Condition()  # guards the queue and the fields above

    @property
    def alive(self) -> bool:
        return self.error is None

    @property
    def died(self) -> bool:
        return not isinstance(self.error, Closed | None)

    def submit(self, request: GenerationRequest, deliver: Deliver, admitted: bool = False) -> RequestHandle:
        """Queue a request. `admitted`: a request of its group is in the queue, so a full queue does not refuse it.

        Raises Busy, Closed, or ValueError if the prompt is longer than the context.
        """
        handle = RequestHandle(request.fit(self.max_context), deliver, self)
        with self._changed:
            if self._closing or not self.alive:
                raise Closed("the service is shutting down" if self._closing else f"the service died: {self.error!r}")
            if not admitted:
                waiting = list(self._waiting)
                groups = {other.request.group or id(other) for other in waiting}  # a request without one is its own
                if len(groups) >= self.max_waiting:
                    raise Busy(len(waiting) * self.request_seconds)
            self.load += request.num_samples
            self._enqueue(handle)
        return handle

    def release(self, handle: RequestHandle) -> None:
        """Called once for every finished request."""
        with self._changed:
            self.load -= handle.request.num_samples

    @abstractmethod
    def _enqueue(self, handle: RequestHandle) -> None: ...

    @abstractmethod
    def cancel(self, handle: RequestHandle, index: int | None) -> None:
        """Cancel one sample, or all."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Figures of /stats; numbers except for "alive"."""

    @abstractmethod
    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let active ones finish for so long, then end them with Closed."""
