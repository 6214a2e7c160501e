"""Short ways to make requests and sequences in tests."""

from typing import Any

from nanochat.engine import Engine
from nanochat.inference.request import GenerationRequest, TokenSequence
from nanochat.inference.sampling import SamplingParams


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
