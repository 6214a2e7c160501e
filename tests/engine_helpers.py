"""A small model, and short ways to make requests and sequences."""

from typing import Any

from stubs import stir

from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.request import GenerationRequest, TokenSequence
from nanochat.inference.sampling import SamplingParams


def make_model(form: Any = GPTConfig, vocab_size: int = 300, sequence_len: int = 64) -> GPT:
    """A small model with a small context, short and full windows, and no weight of zero."""
    config = form(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
    return stir(GPT.create(config, seed=3))


def sequence(
    prompt: list[int], max_tokens: int = 10, sampling: SamplingParams | None = None, index: int = 0, **more: Any
) -> TokenSequence:
    """Sample `index` of a request, greedy by default."""
    return TokenSequence(GenerationRequest(prompt, max_tokens, sampling or SamplingParams(0.0), **more), index)


def complete(
    engine: Engine, prompts: list[list[int]], max_tokens: int = 10_000, batch_size: int = 32, **settings: Any
) -> list[TokenSequence]:
    """Engine.complete with a request per prompt, prompt i being sample i of the seed."""
    sampling = SamplingParams(**settings)
    requests = [GenerationRequest(p, max_tokens, sampling, first_index=i) for i, p in enumerate(prompts)]
    return engine.complete(requests, batch_size)


def answers(engine: Engine, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """The tokens of complete()."""
    return [sequence.tokens for sequence in complete(engine, prompts, **settings)]
