"""The engine as a service: one thread runs the running batch; requests join and leave it from any thread.

Service     a replica in this process: a model, its running batch, its queue, its thread
WorkerPool  several replicas; each request goes to the least loaded, a dead replica is replaced
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.common import UserError, is_out_of_memory, warn
from nanochat.conversation import Tokenizer, end_tokens
from nanochat.gpt import GPT
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.grammar import grammar_compiler
from nanochat.inference.prefill import PREFILL_CHUNK
from nanochat.inference.prefix_cache import PrefixCache
from nanochat.inference.request import GenerationRequest, Token, TokenSequence
from nanochat.inference.tools import DEFAULT_TOOLS, Tool, ToolTable
from nanochat.serve.fair_queue import FairQueue
from nanochat.serve.replica import Closed, Deliver, Finished, Replica, RequestHandle

PREFILL_CHUNKS_PER_STEP = 1
MAX_CRASHES = 3  # after this many consecutive crashes without a token, report unhealthy: a new replica does not help
STEPS_PER_REQUEST = 20  # assumed for Retry-After
MIB = 2**20

Observe = Callable[[str, float], None]


class Service(Replica):
    """A replica in this process. It allocates its memory at the start: `max_rows` slots of the model's context."""

    request_seconds = 1.0

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
        observe: Observe = lambda name, value: None,
    ) -> None:
        """`memory_bytes` limits keys and values: as many slots as fit, at least 1, at most `max_rows`. `observe` gets
        "step_seconds", "batch_rows", "first_token_seconds", "between_tokens_seconds", on the service's thread."""
        super().__init__(model.config.sequence_len, max_waiting)
        if memory_bytes is not None:
            max_rows = max(1, min(max_rows, memory_bytes // slot_bytes(model)))
        self.max_rows, self.observe = max_rows, observe
        self.prefixes = PrefixCache(PREFILL_CHUNK, prefix_bytes)
        weights, table = DecodingWeights(model, int8), ToolTable(tokenizer, tools)
        self.batch = RunningBatch(weights, table, end_tokens(tokenizer), max_rows, self.max_context, self.prefixes)
        self._waiting: FairQueue[RequestHandle] = FairQueue()  # for batch slots
        self._cancelled: list[tuple[RequestHandle, int | None]] = []
        self._handles: dict[TokenSequence, RequestHandle] = {}  # of the sequences in the batch
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="nanochat-service", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, deliver: Deliver, admitted: bool = False) -> RequestHandle:
        if request.grammar is not None:  # compiled here, once, since the batch would wait for it
            grammar_compiler(self.batch.tools.tokenizer).guide(request.grammar)
        return super().submit(request, deliver, admitted)

    def _enqueue(self, handle: RequestHandle) -> None:
        self._waiting.add(handle.request.client, handle)
        self._changed.notify()

    def cancel(self, handle: RequestHandle, index: int | None) -> None:
        with self._changed:
            self._cancelled.append((handle, index))
            self._changed.notify()

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain_seconds if drain_seconds > 0 else 0.01)
        if self._thread.is_alive():
            with self._changed:
                self.error = Closed("the service was shut down")
                self._changed.notify()
            self._thread.join(30)

    def stats(self) -> dict[str, Any]:
        with self._changed:
            waiting = len(self._waiting)
        return {
            "alive": self.alive,
            "rows_running": len(self.batch.running) + len(self.batch.calling),
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

    def _run(self) -> None:
        try:
            while self._update_batch():
                if not self.batch.idle:
                    self._step()
        except Exception as error:  # the batch is in an unknown state: end all requests, the pool makes a new replica
            self.error = self.error or error
        finally:
            self.error = self.error or Closed("the service was shut down")
            self._finish_all(self.error)

    def _update_batch(self) -> bool:
        """Wait for work; cancel and submit sequences. False if the thread is to end."""
        with self._changed:
            while not (self._waiting or self._cancelled or self._closing or self.error) and self.batch.idle:
                self._changed.wait()
            if self.error:
                return False
            cancelled, self._cancelled = self._cancelled, []
            for handle, index in cancelled:
                if index is None:
                    self._waiting.remove(handle.request.client, handle)
            admitted = self._take_from_queue()
        for handle in admitted:  # all of them first: if the batch fails on one, none is forgotten
            self._handles |= dict.fromkeys(handle.sequences, handle)
        for handle in admitted:
            self.batch.submit(handle.sequences)
        for handle, index in cancelled:
            for sequence in handle.sequences if index is None else [handle.sequences[index]]:
                if not sequence.done:
                    self.batch.cancel(sequence)
        for handle in [*admitted, *(handle for handle, _ in cancelled)]:
            self._finish_if_done(handle)
        return not (self.batch.idle and self._closing and not self._waiting)

    def _take_from_queue(self) -> list[RequestHandle]:
        """Requests for the free slots, clients in turn. The rest wait here and not in the batch, where they would be
        ahead of later requests of clients whose turn is earlier."""
        batch, admitted = self.batch, []
        slots = self.max_rows - len(batch.running) - len(batch.calling) - sum(map(len, batch.waiting))
        while self._waiting and slots > 0:
            admitted.append(self._waiting.take())
            slots -= admitted[-1].request.num_samples
        return admitted

    def _step(self) -> None:
        started = time.monotonic()
        tokens = self.batch.step(prefill_chunks=PREFILL_CHUNKS_PER_STEP)
        now = time.monotonic()
        self.steps += 1
        self.tokens_made += len(tokens)
        self.request_seconds = 0.95 * self.request_seconds + 0.05 * STEPS_PER_REQUEST * (now - started)
        self.observe("step_seconds", now - started)
        self.observe("batch_rows", len(self.batch.running))
        by_handle: dict[RequestHandle, list[Token]] = {}
        for token in tokens:
            by_handle.setdefault(self._handles[token.sequence], []).append(token)
        for handle, own in by_handle.items():
            if handle.first_token is None:
                handle.first_token = now
                self.observe("first_token_seconds", now - handle.submitted)
            else:
                self.observe("between_tokens_seconds", now - started)
            handle.deliver(own)
            self._finish_if_done(handle)

    def _finish_if_done(self, handle: RequestHandle) -> None:
        if all(sequence.done for sequence in handle.sequences):
            for sequence in handle.sequences:
                self._handles.pop(sequence, None)
            handle.deliver(Finished())

    def _finish_all(self, error: Exception) -> None:
        with self._changed:
            unfinished = {*self._waiting, *self._handles.values()}
            self._waiting.clear()
            self._handles.clear()
            self.requests_lost = len(unfinished)
            self._closing = True
        self.batch.close()
        for handle in unfinished:
            handle.deliver(Finished(error))


def slot_bytes(model: GPT) -> int:
    """Memory of the keys and values of one batch slot, for the model's whole context."""
    config = model.config
    positions = sum(min(config.sequence_len, left + 1) for left, _ in config.window_sizes())
    return 2 * positions * config.n_kv_head * config.head_dim * model.compute_dtype.itemsize


class WorkerPool:
    """Replicas that share the requests. `make(index)` starts a replica; called again for one that died."""

    def __init__(self, make: Callable[[int], Replica], size: int = 1) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._first = itertools.cycle(range(size))  # of equally loaded replicas
        self.replaced = 0
        self._crashes = 0  # consecutive ones with requests, in which no replica ever had a token
        self.replicas = [make(index) for index in range(size)]

    def submit(self, request: GenerationRequest, deliver: Deliver, admitted: bool = False) -> RequestHandle:
        """Submit to the least loaded replica; arguments and exceptions as Replica.submit."""
        while True:
            with self._lock:
                self._replace_dead()
                first = next(self._first)
                alive = [r for r in self.replicas[first:] + self.replicas[:first] if not r.died]
                if not alive:
                    raise Closed("no replica can be started")
                chosen = min(alive, key=lambda replica: replica.load)
            try:
                return chosen.submit(request, deliver, admitted)
            except Closed:
                if not chosen.died:
                    raise  # else it died since the check above

    def _replace_dead(self) -> None:
        for index, replica in enumerate(self.replicas):
            if replica.died:
                full = replica.error is not None and is_out_of_memory(replica.error)
                lower = "; lower --max-rows, --cache-mib or --prefix-mib" if full else ""
                warn(f"replica {index} died ({replica.error!r}) and is replaced{lower}")
                try:
                    replacement = self._make(index)
                except (UserError, OSError, RuntimeError, MemoryError) as error:  # the others go on
                    warn(f"replica {index} cannot be started again: {error}")
                    continue
                if any(each.tokens_made for each in self.replicas):
                    self._crashes = 0
                elif replica.requests_lost:
                    self._crashes += 1
                self.replicas[index] = replacement
                self.replaced += 1

    @property
    def alive(self) -> bool:
        """Whether a request could be taken now, by a new replica if need be."""
        return any(replica.alive or replica.died for replica in self.replicas)

    @property
    def failing(self) -> bool:
        """Whether MAX_CRASHES replicas in a row died at their first request; until one has a token."""
        return self._crashes >= MAX_CRASHES and not any(replica.tokens_made for replica in self.replicas)

    def stats(self) -> dict[str, Any]:
        """Figures of all replicas, and their sums."""
        parts = [replica.stats() for replica in self.replicas]
        sums = {key: sum(part[key] for part in parts) for key in parts[0] if key != "alive"}
        return {"replicas": parts, "replaced": self.replaced, **sums}

    def close(self, drain_seconds: float = 0.0) -> None:
        """Close all replicas at the same time."""
        threads = [threading.Thread(target=replica.close, args=(drain_seconds,)) for replica in self.replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
