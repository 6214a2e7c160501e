"""The prefix cache: hits do not change a bit of the results, and its memory is bounded."""

import random
from functools import partial

import pytest
import torch
from engine_helpers import make_model, sequence
from stubs import TOKENIZER

from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import prefill
from nanochat.inference.decoding import RunningBatch
from nanochat.inference.decoding_weights import DecodingWeights
from nanochat.inference.kv_cache import KVCache
from nanochat.inference.prefix_cache import PrefixCache
from nanochat.inference.sampling import SamplingParams
from nanochat.inference.tools import ToolTable

CHUNK = 8


def answers(model: GPT, prompts: list[list[int]], prefixes: PrefixCache | None) -> list[tuple[list[int], list[float]]]:
    """(tokens, their log probabilities) for each prompt, one after the other in one running batch."""
    batch = RunningBatch(DecodingWeights(model), ToolTable(TOKENIZER), {257}, 2, 64, prefixes)
    found = []
    for number, prompt in enumerate(prompts):
        row = sequence(prompt, min(6, 64 - len(prompt)), SamplingParams(seed=1), number, top_logprobs=2)
        batch.submit([row])
        logprobs = []
        while not batch.idle:
            logprobs += [token.logprobs.logprob for token in batch.step() if token.logprobs]
        found.append((row.tokens, logprobs))
    return found


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", CHUNK)


@pytest.mark.parametrize("form", [GPTConfig, GPTConfig.later, partial(GPTConfig.later, ngram_rows=97)])
def test_a_hit_does_not_change_a_bit(form) -> None:  # type: ignore[no-untyped-def]
    """Windows shorter and longer than a chunk; prompts shared in part, whole, to the token, and not at all."""
    model, rng = make_model(form), random.Random(0)
    system = [rng.randrange(256) for _ in range(29)]
    prompts = [system + [rng.randrange(256) for _ in range(n)] for n in (3, 11, 3, 20, 0, 30)]
    prompts += [prompts[1], prompts[1][:32], prompts[1][:33], prompts[1][:8], prompts[1][:9], [5], prompts[0][1:]]
    prefixes = PrefixCache(CHUNK, 10**8)
    cached = answers(model, prompts, prefixes)
    assert cached == answers(model, prompts, None)
    assert prefixes.hit_tokens > 100 and prefixes.prompt_tokens == sum(map(len, prompts))
    before = prefixes.hit_tokens
    assert answers(model, prompts, prefixes) == cached
    # Whole chunks, and at least one token is always computed.
    assert prefixes.hit_tokens - before == sum((len(p) - 1) // CHUNK * CHUNK for p in prompts)


def test_memory_is_bounded_and_the_least_recently_used_chunk_is_evicted() -> None:
    model, cache_of = make_model(), {}
    prefixes = PrefixCache(CHUNK, 0)
    prompts = {name: [i] * 40 for i, name in enumerate("abc")}
    for name, prompt in prompts.items():
        cache = KVCache(model.config, 1, 64)
        model.hidden(torch.tensor([prompt[:CHUNK]]), cache)
        cache_of[name] = cache
    size = sum(t.numel() * t.element_size() for t in cache_of["a"].read_chunk(0, 0, CHUNK))
    prefixes.add(cache_of["a"], prompts["a"], 0)
    assert prefixes.num_bytes == 0  # larger than the budget: not kept
    prefixes.budget_bytes = 2 * size
    for name in "ab":
        prefixes.add(cache_of[name], prompts[name], 0)

    def known(name: str) -> int:
        return prefixes.fill(KVCache(model.config, 1, 64), prompts[name])

    assert known("a") == CHUNK  # a is used now, so b is evicted first
    prefixes.add(cache_of["c"], prompts["c"], 0)
    assert (known("a"), known("b"), known("c")) == (CHUNK, 0, CHUNK) and prefixes.num_bytes == 2 * size


def test_a_chunk_without_the_chunks_before_it_is_not_kept() -> None:
    model, prompt = make_model(), list(range(2 * CHUNK))
    cache, prefixes = KVCache(model.config, 1, 64), PrefixCache(CHUNK, 10**8)
    model.hidden(torch.tensor([prompt[:CHUNK]]), cache)
    model.hidden(torch.tensor([prompt[CHUNK:]]), cache)
    prefixes.add(cache, prompt, CHUNK)
    assert prefixes.num_bytes == 0


def test_prompt_logprobs_bypass_the_cache() -> None:
    """Log probabilities of the prompt's tokens against one plain forward pass."""
    model, prompt = make_model(), [random.Random(1).randrange(256) for _ in range(21)]
    prefixes = PrefixCache(CHUNK, 10**8)
    answers(model, [prompt], prefixes)
    batch = RunningBatch(DecodingWeights(model), ToolTable(TOKENIZER), {257}, 1, 64, prefixes)
    row = sequence(prompt, 1, top_logprobs=3, prompt_logprobs=True)
    batch.submit([row])
    (token,) = batch.step()
    logprobs = model(torch.tensor([prompt]))[0].detach().log_softmax(-1)
    assert [t.logprob for t in row.prompt_logprobs] == pytest.approx(
        [float(logprobs[i, prompt[i + 1]]) for i in range(20)], abs=1e-4
    )
    best = logprobs[4].topk(3)
    assert [i for i, _ in row.prompt_logprobs[4].top] == best.indices.tolist()
    assert token.logprobs is not None and token.logprobs.logprob == pytest.approx(float(logprobs[-1].max()), abs=1e-4)
    assert token.logprobs.top[0][0] == token.id
