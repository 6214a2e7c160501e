"""The key/value cache: keys and values of the sequences being decoded.

Shapes: B rows in use, T new tokens per row, S slots, H query heads, G key/value heads, D head size, C channels.

A layer with window w stores w+1 tokens in a ring buffer: the token at position p is in slot p % size, and newer tokens
overwrite those that left the window. So in a row of n tokens, slot s holds the largest position below n that is s
modulo the size, and is empty if that is negative; no further bookkeeping is needed.

Rows differ in length and come and go: `join` copies a prefilled row in, `leave` fills the gap with the last row, so the
rows in use are always the first ones and a forward pass runs on them alone. All memory is allocated at construction.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nanochat.flash_attention import attend_at_positions, flash_attn_func, scaled_dot_product
from nanochat.gpt import GPT, RECENT, GPTConfig
from nanochat.runtime import to_device


class _Decode(NamedTuple):
    """Where one new token per row is stored and what it sees; the same for all layers with one ring size."""

    where: Any  # index of each row's next slot: (B, 1 slot) in a (batch_size, size, G, D) ring
    num_slots: int  # slots to read; the others are empty in every row
    visible: torch.Tensor | None  # (B, 1, 1, S), None where every row fills all of them


class KVCache:
    """Keys and values of up to `batch_size` rows of up to `max_tokens` tokens each (gpt.AttentionCache)."""

    stop_layer: int | None = None  # where attend only stores k and v, then raises AllStored; see prefill

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_rows: int | None = None,
    ) -> None:
        """`num_rows` empty rows are in use at first, by default all."""
        assert batch_size >= 1 and max_tokens >= 1
        self.batch_size, self.max_tokens = batch_size, max_tokens
        G, D = config.n_kv_head, config.head_dim
        sizes = [min(max_tokens, left + 1) for left, _ in config.window_sizes()]
        # Zeros, not garbage: a masked slot is multiplied by zero, and zero times NaN is NaN.
        self.k = [torch.zeros(batch_size, size, G, D, device=device, dtype=dtype) for size in sizes]
        self.v = [torch.zeros(batch_size, size, G, D, device=device, dtype=dtype) for size in sizes]
        self._host_lengths = [0] * batch_size  # known without waiting for the device
        self._lengths: torch.Tensor | None = None  # those in use on the device, until they change
        self.recent_of_all = torch.full((batch_size, RECENT), -1, device=device)  # `recent` of rows not in use too
        self._plans: dict[int, _Decode] = {}  # by ring size, until the lengths change
        self._use_rows(batch_size if num_rows is None else num_rows)

    # -- gpt.AttentionCache ---------------------------------------------------------------------------

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens cached per row in use."""
        if self._lengths is None:
            lengths = torch.tensor(self._host_lengths[: self.num_rows], dtype=torch.long)
            self._lengths = to_device(lengths, self.k[0].device)
        return self._lengths

    @property
    def recent(self) -> torch.Tensor:
        """(B, RECENT) ids of each row's last tokens, the very last at the end; -1 where there is none."""
        return self.recent_of_all[: self.num_rows]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Store k, v (B, T, G, D) after what each row holds and attend from q (B, T, H, D) -> (B, T, H, D)."""
        B, T = q.shape[:2]
        longest = max(self._host_lengths[:B])
        if layer == self.stop_layer:
            self.store(layer, k, v)
            raise AllStored
        assert self.num_rows == B, f"{B} rows given, {self.num_rows} in use"
        assert longest + T <= self.max_tokens, f"{longest} + {T} tokens do not fit in {self.max_tokens}"
        if T == 1:
            return self._attend_one(layer, q, k, v)
        if longest == 0:
            y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        else:
            y = self._attend_many(layer, q, k, v, window)
        self.store(layer, k, v)
        return y

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k, v (B, T, G, D) after what each row holds."""
        B, T = k.shape[:2]
        size = self.k[layer].size(1)
        kept = min(T, size)
        slots = (self.lengths[:, None] + torch.arange(T - kept, T, device=k.device)) % size  # (B, kept)
        rows = torch.arange(B, device=k.device)[:, None]
        self.k[layer][rows, slots], self.v[layer][rows, slots] = k[:, T - kept :], v[:, T - kept :]

    def advance(self, idx: torch.Tensor) -> None:
        """Count the tokens idx (B, T) in every row in use, after all layers have stored their k and v."""
        self.recent.copy_(torch.cat([self.recent, idx], dim=1)[:, -RECENT:])
        self.lengthen(idx.size(1))

    def lengthen(self, num_tokens: int) -> None:
        """As `advance`, of a decoder that keeps `recent_of_all` itself."""
        for row in range(self.num_rows):
            self._host_lengths[row] += num_tokens
        self._forget_lengths()

    # -- attention ------------------------------------------------------------------------------------

    def _attend_one(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One token per row: once it is in its slot, the ring holds exactly the tokens that it may see."""
        B = q.size(0)
        keys, values = self.k[layer], self.v[layer]
        plan = self._plan(keys.size(1))
        keys[plan.where], values[plan.where] = k[:, 0], v[:, 0]
        return scaled_dot_product(q, keys[:B, : plan.num_slots], values[:B, : plan.num_slots], plan.visible)

    def _plan(self, size: int) -> _Decode:
        """Slots and mask of one more token per row, for rings of `size` slots."""
        if size not in self._plans:
            lengths = self._host_lengths[: self.num_rows]
            shortest, longest = min(lengths), max(lengths)
            where: Any = (slice(self.num_rows), shortest % size)
            if shortest != longest:
                where = (torch.arange(self.num_rows, device=self.lengths.device), self.lengths % size)
            num_slots = min(size, longest + 1)
            visible = None
            if shortest + 1 < num_slots:
                slot = torch.arange(num_slots, device=self.lengths.device)
                visible = (slot <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, S)
            self._plans[size] = _Decode(where, num_slots, visible)
        return self._plans[size]

    def _attend_many(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Several tokens after others: attend over the ring and the new keys together, masked by position."""
        B, T = q.shape[:2]
        used = min(self.k[layer].size(1), max(self._host_lengths[:B]))
        new = self.lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
        positions = torch.cat([self._ring_positions(layer, used), new], dim=1)  # (B, S+T)
        k = torch.cat([self.k[layer][:B, :used], k], dim=1)
        v = torch.cat([self.v[layer][:B, :used], v], dim=1)
        return attend_at_positions(q, k, v, new, positions, window)

    def _ring_positions(self, layer: int, used: int) -> torch.Tensor:
        """(B, used) position in each of a layer's first slots, negative if empty."""
        last = self.lengths[:, None] - 1
        return last - (last - torch.arange(used, device=last.device)) % self.k[layer].size(1)

    # -- rows -----------------------------------------------------------------------------------------

    def length(self, row: int) -> int:
        """Number of tokens in `row`."""
        return self._host_lengths[row]

    def copy_row_from(self, other: "KVCache", src: int, dst: int) -> None:
        """Copy row `src` of `other` to row `dst`; the two caches may differ in size."""
        n = other._host_lengths[src]
        assert n <= self.max_tokens, f"a row of {n} tokens does not fit in {self.max_tokens}"
        # Two rings of one layer differ in size only if a cache is shorter than the window, and such a ring never wraps;
        # so the row's tokens are in the same slots of both.
        for ring, other_ring in zip([*self.k, *self.v], [*other.k, *other.v]):
            kept = min(n, ring.size(1))
            ring[dst, :kept] = other_ring[src, :kept]
        self.recent_of_all[dst] = other.recent_of_all[src]
        self._set_length(dst, n)

    def read_chunk(self, row: int, start: int, end: int) -> list[torch.Tensor]:
        """Copy the k and v of tokens start .. end-1, the last of `row`, layer by layer as far as the ring still holds
        them, and the last tokens' ids."""
        assert self._host_lengths[row] == end
        parts = []
        for ring in [*self.k, *self.v]:
            size = ring.size(1)
            positions = torch.arange(max(start, end - size), end, device=ring.device)
            parts.append(ring[row, positions % size])  # (kept, G, D)
        return [*parts, self.recent_of_all[row].clone()]

    def write_chunk(self, row: int, start: int, end: int, parts: list[torch.Tensor]) -> None:
        """Append to `row`, which has `start` tokens, what read_chunk copied of the next ones."""
        assert self._host_lengths[row] == start and end <= self.max_tokens
        for ring, part in zip([*self.k, *self.v], parts):
            size = ring.size(1)
            kept = part[-size:]  # this cache may be shorter than the one it was read from
            positions = torch.arange(end - kept.size(0), end, device=ring.device)
            ring[row, positions % size] = kept
        self.recent_of_all[row] = parts[-1]
        self._set_length(row, end)

    def join(self, other: "KVCache", src: int = 0) -> int:
        """Copy a row of `other` in as the last row in use; returns its index."""
        assert self.num_rows < self.batch_size, "no row is free"
        self._use_rows(self.num_rows + 1)
        self.copy_row_from(other, src, self.num_rows - 1)
        return self.num_rows - 1

    def leave(self, row: int) -> None:
        """Free `row`; the last row in use moves to its index."""
        assert 0 <= row < self.num_rows
        self._use_rows(self.num_rows - 1)
        if row != self.num_rows:
            self.copy_row_from(self, self.num_rows, row)

    def clear(self) -> None:
        """Empty every row in use."""
        for row in range(self.num_rows):
            self._set_length(row, 0)
            self.recent_of_all[row] = -1

    def rewind(self, lengths: list[int]) -> None:
        """Truncate the rows to `lengths`. For benchmarks: a ring that has wrapped has lost the older tokens."""
        for row, length in enumerate(lengths):
            self._set_length(row, length)

    def _use_rows(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._forget_lengths()

    def _set_length(self, row: int, length: int) -> None:
        self._host_lengths[row] = length
        self._forget_lengths()

    def _forget_lengths(self) -> None:
        self._lengths = None
        self._plans.clear()

    @property
    def num_bytes(self) -> int:
        """Memory allocated for keys and values."""
        return sum(x.numel() * x.element_size() for x in [*self.k, *self.v])


class AllStored(Exception):
    """Raised at a cache's `stop_layer`, once the keys and values of all layers are stored."""


def prefill(model: GPT, cache: KVCache, idx: torch.Tensor) -> None:
    """Append idx (B, T) to the cache without logits: the forward pass ends once the last layer's k and v are stored."""
    cache.stop_layer = model.config.n_layer - 1
    try:
        model.hidden(idx, cache)
    except AllStored:
        cache.advance(idx)
    finally:
        cache.stop_layer = None


def plain_step(model: GPT, cache: KVCache, tokens: Sequence[int]) -> torch.Tensor:
    """Append one token per row in use to the cache -> logits (B, V) of the next. The plain form of a decode step."""
    ids = to_device(torch.tensor(tokens), model.device)[:, None]  # (B, 1)
    return model(ids, kv_cache=cache)[:, -1]
