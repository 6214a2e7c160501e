"""Keys and values of prompt prefixes seen before: system prompts, earlier turns of a chat.

A prompt is prefilled in chunks of PREFILL_CHUNK tokens, always cut at the same places, and only whole chunks are kept;
so a hit has the same bits as computing the chunk again. A chunk is found by the digest of the prompt up to its end.
The least recently used chunk is evicted first. Using a chunk uses those before it in its prompt as well, and counts as
earlier than theirs, so no chunk is evicted before one that follows it.
"""

import hashlib
import itertools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from nanochat.inference.kv_cache import KVCache


class PrefixCache:
    """Chunks of prompts, up to `budget_bytes` of keys and values. Thread-safe."""

    def __init__(self, chunk_tokens: int, budget_bytes: int) -> None:
        self.chunk_tokens, self.budget_bytes = chunk_tokens, budget_bytes
        self.num_bytes = self.hit_tokens = self.prompt_tokens = 0
        self._chunks: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def fill(self, cache: KVCache, prompt: Sequence[int]) -> int:
        """Copy the longest cached prefix of `prompt` into slot 0 of an empty cache; returns its length.

        At least the last token is left to compute: its logits give the next token.
        """
        assert cache.length(0) == 0
        with self._lock:
            hits = list(itertools.takewhile(self._chunks.__contains__, self._digests(prompt[:-1])))
            for number, digest in enumerate(hits):
                start = number * self.chunk_tokens
                cache.write_chunk(0, start, start + self.chunk_tokens, self._chunks[digest])
            self._use(hits)
            self.prompt_tokens += len(prompt)
            self.hit_tokens += len(hits) * self.chunk_tokens
            return len(hits) * self.chunk_tokens

    def add(self, cache: KVCache, prompt: Sequence[int], start: int) -> None:
        """Keep the chunk of `prompt` at `start`, the last tokens in slot 0 of `cache`; not if one before it is gone."""
        end = start + self.chunk_tokens
        assert start % self.chunk_tokens == 0 and cache.length(0) == end <= len(prompt)
        with self._lock:
            *before, digest = self._digests(prompt[:end])
            if any(earlier not in self._chunks for earlier in before):
                return
            if digest not in self._chunks:
                chunk = cache.read_chunk(0, start, end)
                if size_of(chunk) > self.budget_bytes:
                    return
                self._chunks[digest] = chunk
                self.num_bytes += size_of(chunk)
            self._use([*before, digest])
            while self.num_bytes > self.budget_bytes:
                self.num_bytes -= size_of(self._chunks.popitem(last=False)[1])

    def _digests(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """For each whole chunk, the digest of all tokens up to its end."""
        digest = hashlib.sha256()
        for start in range(0, len(tokens) - self.chunk_tokens + 1, self.chunk_tokens):
            digest.update(array("q", tokens[start : start + self.chunk_tokens]))
            yield digest.digest()

    def _use(self, digests: list[bytes]) -> None:
        for digest in reversed(digests):
            self._chunks.move_to_end(digest)


def size_of(chunk: list[torch.Tensor]) -> int:
    """Bytes of a chunk's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chunk)
