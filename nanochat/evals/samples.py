"""Completions of fixed prompts, to read."""

from collections.abc import Iterable

from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer


def continuations(
    model: GPT,
    tokenizer: RustBPETokenizer,
    prompts: Iterable[tuple[str, list[int]]],
    max_tokens: int,
    temperature: float = 0.0,
) -> list[dict[str, str]]:
    """{"prompt", "text"} for each (name, token ids); prompts longer than the context are left out."""
    engine, samples = Engine(model, tokenizer), []
    for number, (name, tokens) in enumerate(prompts):
        if len(tokens) < engine.max_context:
            results, _ = engine.generate_batch(
                tokens, num_samples=1, max_tokens=max_tokens, temperature=temperature, seed=42 + number
            )
            samples.append({"prompt": name, "text": tokenizer.decode(results[0][len(tokens) :])})
    return samples
