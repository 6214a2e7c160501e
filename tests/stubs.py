"""Stand-ins: a tokenizer with a token per byte, a model with scripted answers, noise for the weights of a real one."""

import itertools
from collections.abc import Sequence

import torch

from nanochat.common import SPECIAL_TOKENS
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.kv_cache import KVCache

SPECIAL = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
BOS, END = SPECIAL["<|bos|>"], SPECIAL["<|assistant_end|>"]
PYTHON, PYTHON_END = SPECIAL["<|python_start|>"], SPECIAL["<|python_end|>"]
OUTPUT, OUTPUT_END = SPECIAL["<|output_start|>"], SPECIAL["<|output_end|>"]
START = SPECIAL["<|assistant_start|>"]

# Flags of a run small enough for a test; the fixture `trained` holds one.
TINY = [
    "--depth=1",
    "--n-embd=16",
    "--head-dim=8",
    "--max-seq-len=16",
    "--total-batch-size=32",
    "--num-iterations=1",
    "--eval-tokens=64",
    "--device-type=cpu",
    "--model-tag=tiny",
]


class ByteTokenizer:
    """A token per byte, then the special tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def encode_special(self, name: str) -> int:
        return SPECIAL[name]

    def get_vocab_size(self) -> int:
        return 256 + len(SPECIAL)


TOKENIZER = ByteTokenizer()


class Scripted:
    """A stand-in for GPT: `follows` maps each token to the next; the end token follows all others."""

    device, compute_dtype = torch.device("cpu"), torch.float32

    def __init__(self, follows: dict[int, int], sequence_len: int = 64) -> None:
        self.config = GPTConfig(sequence_len, 265, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
        self.table = torch.full((265, 265), -20.0)
        for token in range(265):
            self.table[token, follows.get(token, END)] = 20.0
        self.fed: list[list[list[int]]] = []

    def __call__(self, idx: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        self.fed.append(idx.tolist())
        kv_cache.advance(idx)
        return self.table[idx]

    hidden = __call__

    def last_logits(self, idx: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        return self(idx, kv_cache)[:, -1]

    def parameters(self) -> list[torch.Tensor]:
        return []


def chain(*parts: str | int) -> dict[int, int]:
    """`follows` for Scripted: each token of the parts to the next. No token may appear twice."""
    ids = [i for part in parts for i in (part.encode() if isinstance(part, str) else [part])]
    assert len(set(ids)) == len(ids)
    return dict(itertools.pairwise(ids))


def stir(model: GPT, amount: float = 0.1, seed: int = 0) -> GPT:
    """Add noise to all weights: those initialised to zero would hide features, and the gradients behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=amount)
    return model
