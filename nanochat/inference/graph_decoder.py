"""Decoding on an NVIDIA GPU: all kernels of a decode step launched at once, as a CUDA graph.

A step of a small model is some forty kernels a layer of a few microseconds each; launching them one by one takes the
CPU several times as long as the GPU needs to run them. A graph replays what was launched once, with the same shapes,
the same addresses and the same Python decisions. StaticStep is such a step: the model's own forward pass, edited layers
included, on a view of the KVCache that takes lengths from the device. GraphDecoder keeps a graph per size of step.

The plain step, the model on the KVCache itself, decodes until a size has come up EAGER_STEPS times, and for good where
capturing fails or the first result of a graph differs from the plain one.

Shapes: B rows in use, R rows of a step (B and padding), S slots, H query heads, G key/value heads, D head size,
C channels, V vocabulary.
"""

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanochat.common.fast_path import warn_once
from nanochat.flash_attention import scaled_dot_product
from nanochat.gpt import GPT
from nanochat.inference.kv_cache import KVCache, plain_step
from nanochat.runtime import to_device

EAGER_STEPS = 4  # of a size before it is captured: capturing takes as long as some plain steps
MIN_SLOTS = 256
Size = tuple[int, int]  # rows and slots of a step

_plain_only: "weakref.WeakSet[GPT]" = weakref.WeakSet()  # models whose graphs failed
_capturing = threading.Lock()


def round_up(n: int, smallest: int) -> int:
    """The next size from n on among the powers of two and their means (1, 2, 3, 4, 6, 8, 12, ...), in multiples of
    `smallest`: few sizes, and at most a third of each unused above the first ones."""
    step = max(smallest, 1 << max(0, (n - 1).bit_length() - 2))
    return -(-n // step) * step


class StaticStep:
    """One more token in each of the first R rows of a KVCache (gpt.AttentionCache), without anything that depends on
    lengths known to the host.

    `inputs` (2, R) are the token ids and the lengths. `run` stores keys and values and sets `logits` (R, V). It reads
    nothing that it writes, so it may be repeated. A row beyond those in use has the length 0: it writes to its own
    first slot, which the next `join` overwrites.
    """

    def __init__(self, model: GPT, cache: KVCache, size: Size) -> None:
        rows, self.slots = size
        self.model, self.cache, self.num_rows = model, cache, rows
        device, width = model.device, -(-self.slots // 8) * 8  # see scaled_dot_product
        self.inputs = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.lengths = self.inputs[1]
        self.logits: torch.Tensor
        self._row, self._slot = torch.arange(rows, device=device), torch.arange(width, device=device)
        self._all_visible = torch.zeros(rows, 1, 1, width, dtype=model.compute_dtype, device=device)
        self._mask = self._all_visible
        self._next_slots: dict[int, torch.Tensor] = {}  # by ring size

    def fill(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Set the inputs of the rows in use, without waiting for the device."""
        padding = [0] * (self.num_rows - len(tokens))
        self.inputs.copy_(to_device(torch.tensor([[*tokens, *padding], [*lengths, *padding]]), self.inputs.device))

    def run(self) -> None:
        self._next_slots.clear()
        self._mask = self._all_visible.masked_fill(self._slot > self.lengths[:, None, None, None], -torch.inf)
        self.logits = self.model(self.inputs[0][:, None], kv_cache=self)[:, -1]

    @property
    def recent(self) -> torch.Tensor:
        """(R, RECENT) ids of each row's last tokens."""
        return self.cache.recent_of_all[: self.num_rows]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k, v (R, 1, G, D) and attend from q (R, 1, H, D) over the first S slots -> (R, 1, H, D)."""
        keys, values = self.cache.k[layer], self.cache.v[layer]
        size = keys.size(1)
        if size not in self._next_slots:
            self._next_slots[size] = self.lengths % size
        where = (self._row, self._next_slots[size])
        keys.index_put_(where, k[:, 0])
        values.index_put_(where, v[:, 0])
        R, S = self.num_rows, min(size, self.slots)
        return scaled_dot_product(q, keys[:R, :S], values[:R, :S], self._mask[..., :S])

    def advance(self, idx: torch.Tensor) -> None:
        """Nothing: the KVCache advances after the replay."""


class GraphDecoder:
    """Decodes with `model` on `cache`, with a graph for each size of step that is used often.

    Graphs hold addresses: those of the cache, which lives as long as the decoder, and of the weights, which
    DecodingWeights renews in place. A result is overwritten by the thread's next call of a decoder: its graphs share
    their memory.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._kept = [p.detach() for p in model.parameters()]  # also if the model is given other tensors
        self._seen: Counter[Size] = Counter()
        self._captured: dict[Size, tuple[StaticStep, Any]] = {}

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token per row in use to the cache -> softcapped fp32 logits (B, V) of the next."""
        size = self._size()
        if size not in self._captured:
            self._seen[size] += 1
            wait = self._seen[size] <= EAGER_STEPS or self.model in _plain_only
            return plain_step(self.model, self.cache, tokens) if wait else self._capture(size, tokens)
        step, graph = self._captured[size]
        step.fill(tokens, self._lengths())
        graph.replay()
        B = len(tokens)
        self.cache.advance(step.inputs[0][:B, None])
        return step.logits[:B]

    def _size(self) -> Size:
        """The size of a step for the rows in use and their lengths."""
        cache, longest = self.cache, max(self._lengths())
        assert longest < cache.max_tokens, f"{longest} + 1 tokens do not fit in {cache.max_tokens}"
        slots = min(round_up(longest + 1, MIN_SLOTS), max(ring.size(1) for ring in cache.k))
        return min(round_up(cache.num_rows, 1), cache.batch_size), slots

    def _lengths(self) -> list[int]:
        return [self.cache.length(row) for row in range(self.cache.num_rows)]

    def _capture(self, size: Size, tokens: Sequence[int]) -> torch.Tensor:
        """A plain step; in addition, capture the step and keep it if it gives the same result."""
        step, graph = StaticStep(self.model, self.cache, size), None
        try:
            step.fill(tokens, self._lengths())
            graph = capture(step.run, self.model.device)
            graph.replay()
        except Exception as failure:  # of CUDA, of memory, of a layer that asks the cache for more
            self._give_up(f"capturing failed: {failure}")
        logits = plain_step(self.model, self.cache, tokens)
        if graph is not None:
            error = float((step.logits[: len(tokens)] - logits).norm() / logits.norm())
            if error < (1e-3 if self.model.compute_dtype == torch.float32 else 0.1):
                self._captured[size] = step, graph
            elif logits.isfinite().all():
                self._give_up(f"relative error {error:.2g}")
        return logits

    def _give_up(self, reason: str) -> None:
        _plain_only.add(self.model)
        warn_once(f"this model is not decoded with CUDA graphs, slower: {reason.splitlines()[0]}")


def capture(run: Callable[[], None], device: torch.device) -> Any:
    """The CUDA graph of what `run` launches. It is run once before, as libraries allocate memory and load kernels when
    first called, which a capture does not allow."""
    with _capturing, torch.cuda.device(device):
        stream, keeper = _side(device, threading.get_ident())
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                run()
                return _record(run, keeper.pool())
        finally:
            current.wait_stream(stream)  # after a failure too: the memory that `run` uses is about to be freed


@functools.cache
def _side(device: torch.device, thread: int) -> tuple[Any, Any]:
    """A thread's stream for captures, as cuBLAS keeps a workspace of up to 32 MB per stream, and a graph that keeps the
    memory pool of all its graphs: it would be allocated anew for every batch. Not shared by threads: a graph may write
    where the results of another lie."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        return stream, _record(lambda: torch.zeros(1, device=device), None)


def _record(run: Callable[[], Any], pool: Any) -> Any:
    """Capture on the current stream. Not with torch.cuda.graph(), which waits for the device and empties the
    allocator's cache."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on using the device
    try:
        run()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # where the error has ended the capture; it says more
            _end(graph, pool)
        raise
    _end(graph, pool)
    return graph


def _end(graph: Any, pool: Any) -> None:
    """End the capture. Where that fails, PyTorch before 2.13 leaves the allocator in it: it would never free memory
    again, and empty_cache() would fail (https://github.com/pytorch/pytorch/pull/180395)."""
    try:
        graph.capture_end()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # that it is not in it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
