"""The samples of one HTTP request: submit to the pool, receive tokens on the event loop, yield final text."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastapi import Request
from typing_extensions import TypedDict

from nanochat.inference.request import GenerationRequest, Token
from nanochat.serve.api import Api
from nanochat.serve.errors import ApiError
from nanochat.serve.replica import Busy, Closed, Finished, RequestHandle
from nanochat.serve.sample import Piece, Sample

MAX_UNREAD_TOKENS = 2048  # kept for a client that has not read for UNREAD_SECONDS; then its request is cancelled
UNREAD_SECONDS = 5.0
DROPPED_HEADER = "X-Nanochat-Dropped-Messages"  # how many, if any


class PromptTokensDetails(TypedDict):
    cached_tokens: int  # taken from the prefix cache


class Usage(TypedDict):
    """Tokens of an answer. The token that ends a sample does not count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    dropped_messages: int  # of the conversation, for which the context had no room


@dataclass
class Update:
    """New final text of a sample and the tokens it comes from."""

    sample: Sample
    handle: RequestHandle
    pieces: list[Piece]
    tokens: list[Token]


class Generation:
    """The samples of one or more GenerationRequests. Call `close` when done; unfinished samples are then cancelled."""

    def __init__(
        self, api: Api, http: Request, requests: Sequence[GenerationRequest], stop: Sequence[str], chat: bool
    ) -> None:
        """Submits all requests. Raises ApiError, with none of them left running. `chat` as in Sample."""
        self.api, self.http = api, http
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, list[Token] | Finished]] = asyncio.Queue()
        self._unread = 0  # tokens in the queue
        self._writing_since: float | None = None  # when the last update was yielded, None while waiting for tokens
        self._too_slow = False
        self._retried: set[int] = set()
        self._first_token_at = self._last_token_at = 0.0
        self.handles: list[RequestHandle] = []
        choices = iter(range(sum(request.num_samples for request in requests)))
        self.samples = [  # by request
            [Sample(api.tokenizer, stop, chat, next(choices)) for _ in range(request.num_samples)]
            for request in requests
        ]
        group = uuid.uuid4().hex
        try:
            for number, request in enumerate(requests):
                request = replace(request, client=http.state.client, group=group)
                self.handles.append(self._submit(number, request, admitted=number > 0))
        except ApiError:
            self.cancel()
            raise

    def _submit(self, number: int, request: GenerationRequest, admitted: bool) -> RequestHandle:
        try:
            return self.api.pool.submit(request, partial(self._deliver, number), admitted)
        except Busy as error:
            headers = {"Retry-After": str(math.ceil(error.retry_after))}
            raise ApiError(429, str(error), "rate_limit_error", code="server_busy", headers=headers) from error
        except Closed as error:
            raise ApiError(503, str(error), "server_error", code="unavailable") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def _deliver(self, number: int, message: list[Token] | Finished) -> None:
        """Called on the replica's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._enqueue, number, message)

    def _enqueue(self, number: int, message: list[Token] | Finished) -> None:
        if isinstance(message, list):
            self._unread += len(message)
            # Many tokens alone do not show a slow client: the event loop may be behind.
            since = self._writing_since
            if self._unread > MAX_UNREAD_TOKENS and since is not None and time.monotonic() - since > UNREAD_SECONDS:
                self._too_slow = True
                self.cancel()
                return
        self._queue.put_nowait((number, message))

    async def _receive(self, deadline: float) -> tuple[int, list[Token] | Finished]:
        try:
            number, message = await asyncio.wait_for(self._queue.get(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            seconds = self.api.settings.request_seconds
            raise ApiError(504, f"the answer took more than {seconds:g} s", "server_error", code="timeout") from None
        if self._too_slow:
            raise ApiError(408, "the answer was not read", code="client_too_slow")
        if isinstance(message, list):
            self._unread -= len(message)
            self._last_token_at = time.monotonic()
            self._first_token_at = self._first_token_at or self._last_token_at
        return number, message

    async def updates(self) -> AsyncIterator[Update]:
        """Updates of all samples as they come; the last of each has finish_reason set.

        Raises ApiError if a replica died, the time is up, or the client does not read.
        """
        deadline = time.monotonic() + self.api.settings.request_seconds
        running = len(self.handles)
        for samples, handle in zip(self.samples, self.handles):
            if begun := handle.request.answer_begun:
                for sample in samples:
                    yield Update(sample, handle, sample.begin(handle.request.prompt[-begun:]), [])
        while running:
            number, message = await self._receive(deadline)
            if isinstance(message, Finished):
                if message.error is not None and self._retry(number, message.error):
                    continue
                running -= 1
                updates = self._finish(number, message.error)
            else:
                updates = self._feed(number, message)
            for update in updates:
                await self.api.budget.wait()
                self._writing_since = time.monotonic()
                yield update
                self._writing_since = None

    def _feed(self, number: int, tokens: list[Token]) -> Iterator[Update]:
        handle = self.handles[number]
        for token in tokens:
            sample, sequence = self.samples[number][token.sequence.index], token.sequence
            if sample.finish_reason is not None or len(sample.tokens) >= handle.request.max_tokens:
                continue
            if token.is_end:  # has no text
                if token.logprobs is not None and not sample.chat:  # evaluation harnesses count on its log probability
                    sample.tokens.append(token)
                    yield Update(sample, handle, [], [token])
                continue
            pieces = sample.feed(token)
            if sample.stopped:
                sample.finish_reason = "stop"
                handle.cancel(sequence.index)
            yield Update(sample, handle, pieces, [token])

    def _finish(self, number: int, error: Exception | None) -> Iterator[Update]:
        if isinstance(error, Closed):
            raise ApiError(503, "the server is shutting down", "server_error")
        if error is not None:
            raise ApiError(500, "the model failed on this request; try again", "server_error")
        handle = self.handles[number]
        for sample, sequence in zip(self.samples[number], handle.sequences):
            if sample.finish_reason is None:
                pieces = sample.finish()
                sample.finish_reason = "stop" if sample.stopped or sequence.end is not None else "length"
                yield Update(sample, handle, pieces, [])

    def _retry(self, number: int, error: Exception) -> bool:
        """Submit a request whose replica died again, once, if the client has nothing of it yet."""
        if isinstance(error, Closed) or number in self._retried or any(s.tokens for s in self.samples[number]):
            return False
        self._retried.add(number)
        try:
            self.handles[number] = self._submit(number, self.handles[number].request, admitted=True)
        except ApiError:
            return False
        return True

    async def run(self) -> None:
        """Generate everything. Raises ApiError, also if the client disconnects."""
        watch = asyncio.create_task(wait_for_disconnect(self.http))
        watch.add_done_callback(lambda _: self.cancel())
        try:
            async for _ in self.updates():
                pass
            if watch.done():
                raise ApiError(499, "the client disconnected")
        finally:
            watch.cancel()
            self.close()

    def cancel(self) -> None:
        """Cancel all samples; safe to call at any time."""
        for handle in self.handles:
            handle.cancel()

    def close(self) -> None:
        """Cancel and count the tokens in the metrics."""
        self.cancel()
        usage = self.usage()
        self.api.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.api.metrics.completion_tokens.inc(usage["completion_tokens"])

    def usage(self) -> Usage:
        prompt = sum(len(handle.request.prompt) for handle in self.handles)
        completion = sum(not token.is_end for samples in self.samples for sample in samples for token in sample.tokens)
        cached = sum(max(sequence.cached_tokens for sequence in handle.sequences) for handle in self.handles)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "dropped_messages": self.dropped_messages,
        }

    def timings(self) -> dict[str, float]:
        """Seconds from the answer's first token to its last, on the server."""
        return {"answer_seconds": round(self._last_token_at - self._first_token_at, 4)}

    @property
    def dropped_messages(self) -> int:
        return sum(handle.request.dropped_messages for handle in self.handles)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer, whole or streamed."""
        return {DROPPED_HEADER: str(self.dropped_messages)} if self.dropped_messages else {}


async def wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
