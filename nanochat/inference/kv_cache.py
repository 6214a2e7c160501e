"""The key/value cache: what attention remembers of each sequence while it is being continued.

Shapes: B rows in use, T new tokens per row, S slots, H query heads, G key/value heads, D head size, C channels.

A layer whose window is w keeps w+1 tokens and no more: its storage is a ring, the token at position p
stands in slot p % size, and newer tokens overwrite those that left the window. Nothing else needs to be
remembered about the slots: in a row of n tokens, slot s holds the largest position below n that is s
modulo the size, or nothing yet where that is negative.

Rows are of different length, and come and go: `join` copies a prefilled row in, `leave` closes the gap
with the last row, so that the rows in use are always the first ones and a forward pass runs on them alone.
All memory is reserved when the cache is made; nothing is ever moved to grow.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nanochat.flash_attention import attend_at_positions, flash_attn_func
from nanochat.gpt import AllStored, GPTConfig


class _Decode(NamedTuple):
    """Where one new token per row goes and what it sees, the same for all layers with rings of one size."""

    where: Any  # index of each row's next slot: (B, 1 slot) in a (batch_size, size, G, D) ring
    num_slots: int  # slots to look at: the rest is empty in every row
    visible: torch.Tensor | None  # (B, 1, 1, S), None where every row fills all of them


class KVCache:
    """Keys and values of up to `batch_size` rows of up to `max_tokens` tokens each (gpt.AttentionCache)."""

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_rows: int | None = None,
    ) -> None:
        """`num_rows` rows are in use at first, by default all of them; all are empty."""
        assert batch_size >= 1 and max_tokens >= 1
        self.batch_size, self.max_tokens = batch_size, max_tokens
        G, D = config.n_kv_head, config.head_dim
        sizes = [min(max_tokens, left + 1) for left, _ in config.window_sizes()]
        # Zeros, not garbage: a masked slot is multiplied by zero, and zero times NaN is NaN.
        self.k = [torch.zeros(batch_size, size, G, D, device=device, dtype=dtype) for size in sizes]
        self.v = [torch.zeros(batch_size, size, G, D, device=device, dtype=dtype) for size in sizes]
        self._all_lengths = torch.zeros(batch_size, device=device, dtype=torch.long)
        self._host_lengths = [0] * batch_size  # the same numbers, known without asking the device
        self._previous = torch.zeros(batch_size, 1, config.n_embd, device=device, dtype=dtype) if config.smear else None
        self._new_previous: torch.Tensor | None = None
        self._plans: dict[int, _Decode] = {}  # by ring size, until the lengths change
        self._use_rows(batch_size if num_rows is None else num_rows)

    @property
    def embeddings(self) -> torch.Tensor | None:
        """(batch_size, 1, C) where previous_embedding of every row is kept."""
        return self._previous

    # -- gpt.AttentionCache ---------------------------------------------------------------------------

    stop_layer: int | None = None

    @property
    def previous_embedding(self) -> torch.Tensor | None:
        """(B, 1, C) embedding of each row's last token, zero where there is none; None without smear."""
        return None if self._previous is None else self._previous[: self.num_rows]

    @previous_embedding.setter
    def previous_embedding(self, value: torch.Tensor | None) -> None:
        self._new_previous = value  # kept aside: the model still reads the old one in this forward pass

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

    def advance(self, num_tokens: int) -> None:
        """Every row in use has `num_tokens` more; called once all layers have stored theirs."""
        self.lengths += num_tokens
        for row in range(self.num_rows):
            self._host_lengths[row] += num_tokens
        if self._previous is not None and self._new_previous is not None:
            self._previous[: self.num_rows] = self._new_previous
        self._new_previous = None
        self._plans.clear()

    # -- attention ------------------------------------------------------------------------------------

    def _attend_one(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """One token per row: once it has taken its slot, what the ring holds is exactly what it may see."""
        B = q.size(0)
        keys, values = self.k[layer], self.v[layer]
        plan = self._plan(keys.size(1))
        keys[plan.where], values[plan.where] = k[:, 0], v[:, 0]
        keys, values = keys[:B, : plan.num_slots].transpose(1, 2), values[:B, : plan.num_slots].transpose(1, 2)
        grouped = keys.size(1) != q.size(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=plan.visible, enable_gqa=grouped)
        return y.transpose(1, 2)

    def _plan(self, size: int) -> _Decode:
        """How one more token per row meets a ring of `size` slots."""
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
        """Several tokens after others: over the ring and the new keys together, told apart by position."""
        B, T = q.shape[:2]
        used = min(self.k[layer].size(1), max(self._host_lengths[:B]))
        new = self.lengths[:, None] + torch.arange(T, device=q.device)  # (B, T)
        positions = torch.cat([self._ring_positions(layer, used), new], dim=1)  # (B, S+T)
        k = torch.cat([self.k[layer][:B, :used], k], dim=1)
        v = torch.cat([self.v[layer][:B, :used], v], dim=1)
        return attend_at_positions(q, k, v, new, positions, window)

    def _ring_positions(self, layer: int, used: int) -> torch.Tensor:
        """(B, used) position held by each of a layer's first slots, negative where there is none."""
        last = self.lengths[:, None] - 1
        return last - (last - torch.arange(used, device=last.device)) % self.k[layer].size(1)

    # -- rows -----------------------------------------------------------------------------------------

    def length(self, row: int) -> int:
        """Tokens that `row` holds."""
        return self._host_lengths[row]

    def copy_row_from(self, other: "KVCache", src: int, dst: int) -> None:
        """Make row `dst` what row `src` of `other` is; the two caches may differ in size."""
        n = other._host_lengths[src]
        assert n <= self.max_tokens, f"a row of {n} tokens does not fit in {self.max_tokens}"
        # Two rings of one layer differ in size only where a cache is shorter than the window, and such a ring
        # never wraps; so the row's tokens stand in the same slots of both.
        for mine, theirs in zip([*self.k, *self.v], [*other.k, *other.v]):
            kept = min(n, mine.size(1))
            mine[dst, :kept] = theirs[src, :kept]
        if self._previous is not None and other._previous is not None:
            self._previous[dst] = other._previous[src]
        self._set_length(dst, n)

    def read_chunk(self, row: int, start: int, end: int) -> list[torch.Tensor]:
        """A copy of what the tokens start .. end-1, the last that `row` holds, left behind: k and v of each layer, as
        far as its ring still has them, and the last embedding."""
        assert self._host_lengths[row] == end
        parts = []
        for ring in [*self.k, *self.v]:
            size = ring.size(1)
            positions = torch.arange(max(start, end - size), end, device=ring.device)
            parts.append(ring[row, positions % size])  # (kept, G, D)
        return parts if self._previous is None else [*parts, self._previous[row].clone()]

    def write_chunk(self, row: int, start: int, end: int, parts: list[torch.Tensor]) -> None:
        """Give `row`, which holds `start` tokens, what read_chunk took of the next ones."""
        assert self._host_lengths[row] == start and end <= self.max_tokens
        for ring, part in zip([*self.k, *self.v], parts):
            size = ring.size(1)
            kept = part[-size:]  # this cache may be shorter than the one that was read
            positions = torch.arange(end - kept.size(0), end, device=ring.device)
            ring[row, positions % size] = kept
        if self._previous is not None:
            self._previous[row] = parts[-1]
        self._set_length(row, end)

    def join(self, other: "KVCache", src: int = 0) -> int:
        """Take a copy of a row of `other` in as the last row in use, and return its number."""
        assert self.num_rows < self.batch_size, "no row is free"
        self._use_rows(self.num_rows + 1)
        self.copy_row_from(other, src, self.num_rows - 1)
        return self.num_rows - 1

    def leave(self, row: int) -> None:
        """Free `row`; the last row in use takes its number."""
        assert 0 <= row < self.num_rows
        self._use_rows(self.num_rows - 1)
        if row != self.num_rows:
            self.copy_row_from(self, self.num_rows, row)

    def clear(self) -> None:
        """Empty every row in use."""
        for row in range(self.num_rows):
            self._set_length(row, 0)
            if self._previous is not None:
                self._previous[row] = 0

    def rewind(self, lengths: list[int]) -> None:
        """Forget each row's tokens past `lengths`: for measuring, a ring that has wrapped has lost others for them."""
        for row, length in enumerate(lengths):
            self._set_length(row, length)

    def _use_rows(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.lengths = self._all_lengths[:num_rows]  # (B,) tokens cached per row in use
        self._plans.clear()

    def _set_length(self, row: int, length: int) -> None:
        self._all_lengths[row] = length
        self._host_lengths[row] = length
        self._plans.clear()

    @property
    def num_bytes(self) -> int:
        """Memory reserved for keys and values."""
        return sum(x.numel() * x.element_size() for x in [*self.k, *self.v])
