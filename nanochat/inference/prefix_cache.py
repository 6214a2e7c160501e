"""Beginnings of prompts that need not be computed again: system prompts, earlier turns of a chat.

A prompt is prefilled in chunks of PREFILL_CHUNK tokens, always cut at the same places, and only whole chunks are kept.
So what comes out of here is bit for bit what would be computed again. The chunks form a tree, each one below the
chunk before it; what has not been used for longest is forgotten first, from the leaves up.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanochat.inference.kv_cache import KVCache


@dataclass(eq=False)
class _Chunk:
    """One chunk's keys and values, below the chunks that stand before it."""

    parent: "_Chunk | None"
    tokens: tuple[int, ...]
    parts: list[torch.Tensor]
    children: dict[tuple[int, ...], "_Chunk"] = field(default_factory=dict)
    used: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)


class PrefixCache:
    """Chunks of prompts, up to `budget_bytes` of keys and values. Safe to use from several threads."""

    def __init__(self, chunk_tokens: int, budget_bytes: int) -> None:
        self.chunk_tokens, self.budget_bytes = chunk_tokens, budget_bytes
        self.num_bytes = self.hit_tokens = self.prompt_tokens = 0
        self._root = _Chunk(None, (), [])
        self._clock = 0
        self._lock = threading.Lock()

    def fill(self, cache: KVCache, prompt: Sequence[int]) -> int:
        """Put the longest known beginning of `prompt` into row 0 of an empty cache; how many tokens that was.

        At least one token is left, as it is the last one's logits that the next token is drawn from.
        """
        assert cache.length(0) == 0
        with self._lock:
            self.prompt_tokens += len(prompt)
            node, start = self._root, 0
            while start + self.chunk_tokens < len(prompt):
                child = node.children.get(tuple(prompt[start : start + self.chunk_tokens]))
                if child is None:
                    break
                cache.write_chunk(0, start, start + self.chunk_tokens, child.parts)
                node, start = child, start + self.chunk_tokens
                self._touch(node)
            self.hit_tokens += start
            return start

    def add(self, cache: KVCache, prompt: Sequence[int], start: int) -> None:
        """Keep the chunk of `prompt` that begins at `start`, which row 0 of `cache` has just been given whole."""
        end = start + self.chunk_tokens
        assert start % self.chunk_tokens == 0 and cache.length(0) == end <= len(prompt)
        with self._lock:
            node = self._root
            for at in range(0, start, self.chunk_tokens):
                known = node.children.get(tuple(prompt[at : at + self.chunk_tokens]))
                if known is None:
                    return  # a chunk before it has been forgotten meanwhile
                node = known
                self._touch(node)
            tokens = tuple(prompt[start:end])
            if tokens in node.children:
                return
            chunk = _Chunk(node, tokens, cache.read_chunk(0, start, end))
            if chunk.num_bytes > self.budget_bytes:
                return
            node.children[tokens] = chunk
            self._touch(chunk)
            self.num_bytes += chunk.num_bytes
            while self.num_bytes > self.budget_bytes:
                self._forget_one()

    def _touch(self, chunk: _Chunk) -> None:
        self._clock += 1
        chunk.used = self._clock

    def _forget_one(self) -> None:
        """Drop the leaf that was used longest ago. A parent is used whenever its child is."""
        leaves, waiting = [], [self._root]
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            if not node.children and node.parent is not None:
                leaves.append(node)
        oldest = min(leaves, key=lambda leaf: leaf.used)
        assert oldest.parent is not None
        del oldest.parent.children[oldest.tokens]
        self.num_bytes -= oldest.num_bytes
