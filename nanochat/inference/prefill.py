"""Prefill: run a prompt through the model, chunk by chunk, into a cache of one slot.

Shapes: T tokens of a chunk, V vocabulary.
"""

from collections.abc import Sequence

import torch

from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.kv_cache import KVCache, prefill
from nanochat.inference.prefix_cache import PrefixCache
from nanochat.inference.request import TokenLogprobs, TokenSequence
from nanochat.runtime import to_device

PREFILL_CHUNK = 256  # tokens: bounds how long a prompt delays the running sequences, and its attention's memory


class Prefill:
    """The prompt being prefilled. `logits` (1, V) follow its last token once all of it is in `cache`."""

    def __init__(self, weights: DecodingWeights, max_tokens: int, prefixes: PrefixCache | None = None) -> None:
        self.model, self.prefixes = weights.current(), prefixes
        self.cache = KVCache(self.model.config, 1, max_tokens, self.model.device, self.model.compute_dtype)
        self._cpu_decoder = weights.cpu_decoder(self.cache)  # for short prompts
        self.logits: torch.Tensor | None = None

    @property
    def started(self) -> bool:
        return self.cache.length(0) > 0

    def reset(self) -> None:
        self.cache.clear()
        self.logits = None

    def run_chunk(self, sequence: TokenSequence) -> None:
        """Prefill the next chunk of the sequence's context; the prompt's log probabilities too, where requested."""
        prompt, start = sequence.context, self.cache.length(0)
        with_logprobs = sequence.request.prompt_logprobs and not sequence.tokens
        prefixes = None if with_logprobs else self.prefixes  # cached chunks have no logits
        if start == 0 and prefixes:
            start = prefixes.fill(self.cache, prompt)
            if not sequence.tokens:
                sequence.cached_tokens = start
        end = min(start + PREFILL_CHUNK, len(prompt))
        decoder = self._cpu_decoder if end == len(prompt) and not with_logprobs else None
        if decoder and decoder.takes(start, end - start):
            self.logits = decoder.prompt(prompt[start:end])
            return
        ids = to_device(torch.tensor([prompt[start:end]]), self.model.device)  # (1, T)
        if with_logprobs:
            logits = self.model(ids, kv_cache=self.cache)  # (1, T, V)
            self._add_prompt_logprobs(sequence, logits[0], start)
            self.logits = logits[:, -1] if end == len(prompt) else None
        elif end == len(prompt):
            self.logits = self.model.last_logits(ids, self.cache)
        else:
            prefill(self.model, self.cache, ids)
        if prefixes and end - start == PREFILL_CHUNK:
            prefixes.add(self.cache, prompt, start)

    @staticmethod
    def _add_prompt_logprobs(sequence: TokenSequence, logits: torch.Tensor, start: int) -> None:
        """Add the log probabilities of the tokens after start .. start+T-1, from the logits (T, V) there."""
        following = sequence.prompt[start + 1 : start + 1 + len(logits)]
        if following:
            top = sequence.request.top_logprobs or 0
            sequence.prompt_logprobs += token_logprobs(logits[: len(following)], following, top)


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log probabilities of `tokens` under logits (N, V) as they are, without temperature, and the `top` most likely."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    of_tokens = logprobs.gather(1, to_device(torch.tensor(tokens), logits.device)[:, None])  # (N, 1)
    best = logprobs.topk(min(top, logprobs.size(-1)), dim=-1)  # (N, K)
    found = torch.cat([of_tokens, best.values, best.indices.float()], dim=1)  # ids are below 2^24, so exact
    K = best.values.size(1)
    return [
        TokenLogprobs(value, [(int(id), logprob) for id, logprob in zip(rest[K:], rest[:K])])
        for value, *rest in found.tolist()  # one wait for the device
    ]
