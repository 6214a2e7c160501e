"""How a model is looked at, during training and after it: bits per byte on held-out rows, and what it makes of
fixed prompts."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Corpus
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate_bpb
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

EVAL_ROWS = 32  # per evaluation step over all processes: fixed, so that the figure does not depend on them


def corpus_bpb(
    model: GPT,
    corpus: Corpus,
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    *,
    split: str,
    tokens: int,
    device_batch_size: int,
) -> float:
    """Bits per byte over the same rows of a split every time, about `tokens` of them in all."""
    T = model.config.sequence_len
    loader = PretrainLoader(corpus, tokenizer, sequence_len=T, rows_per_step=EVAL_ROWS, split=split, seed=0,
                            rank=runtime.rank, world_size=runtime.world_size)  # fmt: skip
    return loader_bpb(model, loader, tokenizer, runtime, max(1, tokens // (EVAL_ROWS * T)), device_batch_size)


def loader_bpb(
    model: GPT, loader: Any, tokenizer: RustBPETokenizer, runtime: Runtime, steps: int, device_batch_size: int
) -> float:
    """Bits per byte over the loader's next `steps` batches, or as many as it has; closes it."""

    def micro_batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(steps):
            try:
                batch = loader.next_batch()
            except StopIteration:
                return
            for start in range(0, batch.inputs.size(0), device_batch_size):
                rows = slice(start, start + device_batch_size)
                yield batch.inputs[rows], batch.targets[rows]

    try:
        return evaluate_bpb(model, micro_batches(), 10**9, torch.tensor(tokenizer.token_bytes), runtime)
    finally:
        loader.close()


def continuations(
    model: GPT,
    tokenizer: RustBPETokenizer,
    prompts: Iterable[tuple[str, list[int]]],
    max_tokens: int,
    temperature: float = 0.0,
) -> list[dict[str, str]]:
    """What the model adds to each (name, token ids); a prompt longer than the context is left out."""
    engine, found = Engine(model, tokenizer), []
    for number, (name, tokens) in enumerate(prompts):
        if len(tokens) < engine.max_context:
            results, _ = engine.generate_batch(tokens, num_samples=1, max_tokens=max_tokens, temperature=temperature,
                                               seed=42 + number)  # fmt: skip
            found.append({"prompt": name, "text": tokenizer.decode(results[0][len(tokens) :])})
    return found
