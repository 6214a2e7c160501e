"""A tiny model, a task and a loader for reinforcement learning in tests."""

from typing import Any, ClassVar

import torch
from stubs import TOKENIZER

from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.rl import Curriculum, RolloutLoader, Sampler
from nanochat.runtime import Runtime


def tiny(seed: int = 0, **sizes: Any) -> GPT:
    config = GPTConfig(
        **{"sequence_len": 64, "vocab_size": 265, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, **sizes}
    )
    model = GPT.create(config, seed=seed)
    with torch.no_grad():  # no matrix is zero, so that every gradient shows
        for number, p in enumerate(model.parameters()):
            if p.dim() > 1:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    return model


class Bandit:
    """Answers that begin with one of a few bytes are paid for it; the rest gets nothing."""

    name = "Bandit"
    pays: ClassVar = {ord("a"): 0.2, ord("b"): 1.0, ord("c"): 0.6}

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return {"messages": [{"role": "user", "content": f"arm {index}?"}, {"role": "assistant", "content": "b"}]}

    def reward(self, conversation: Any, completion: str) -> float:
        return self.pays.get(ord(completion[0]), 0.0) if completion else 0.0


class ChatBytes:
    """ByteTokenizer with the rendering that rollouts need."""

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def render_for_completion(self, conversation: Any) -> list[int]:
        return [TOKENIZER.encode_special("<|bos|>"), *TOKENIZER.encode(conversation["messages"][0]["content"])]


def loader_for(
    model: GPT, runtime: Runtime, curricula: list[Curriculum] | None = None, groups: int = 4, **how: Any
) -> RolloutLoader:
    sampler = Sampler(**{"num_samples": 6, "max_new_tokens": 4, "top_k": 0, **how})
    curricula = curricula or [Curriculum([Bandit()])]
    return RolloutLoader(Engine(model, ChatBytes()), curricula, sampler, groups, runtime, seed=3)  # type: ignore[arg-type]
