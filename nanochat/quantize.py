"""Weights for decoding in eight bits: half the bytes of bfloat16 to read per token, for a little accuracy.

Each row of a matrix is divided by its largest absolute value over 127 and rounded to int8 (symmetric, one scale per
output). Embeddings and gates stay as they are: of those a token reads one row.
"""

import torch
from torch import nn

from nanochat.gpt import GPT


class Int8Weights:
    """The large matrices of a model in int8."""

    def __init__(self, model: GPT) -> None:
        self._of: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.follow(model)

    @torch.no_grad()
    def follow(self, model: GPT) -> None:
        """Quantize the weights of today, into the same memory, and give the model's own the values they now stand for:
        what it works out for prompts then agrees with what is decoded."""
        for linear in matrices(model):
            weight, scale = quantize(linear.weight)
            if linear in self._of:
                self._of[linear][0].copy_(weight)
                self._of[linear][1].copy_(scale)
            else:
                self._of[linear] = weight, scale
            linear.weight.copy_(weight * scale[:, None])

    def of(self, linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight (M, K) int8, scale (M,) fp32) of a linear layer."""
        return self._of[linear]


def matrices(model: GPT) -> list[nn.Linear]:
    """The linear layers that are read whole for every token."""
    in_blocks = [(b.attn.c_q, b.attn.c_k, b.attn.c_v, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj) for b in model.blocks]
    return [*(linear for block in in_blocks for linear in block), model.lm_head]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (M, K) -> (int8 (M, K), scale (M,) fp32); a row of zeros stays zero."""
    scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127  # (M,)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale
