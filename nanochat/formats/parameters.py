"""GPT's parameters as other files have them: their shapes, and a vocabulary without the rows that pad it."""

import re

import torch

from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig

VOCABULARY_SIZED = re.compile(r"transformer\.wte\.weight|lm_head\.weight|value_embeds\.\d+\.weight")


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of GPT's parameters by name; needs no memory for them."""
    model = GPT.allocate(config, "meta", torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def has_row_per_token(name: str) -> bool:
    """Whether it is a table with a row for each token of the vocabulary."""
    return bool(VOCABULARY_SIZED.fullmatch(name))


def padded_shape(name: str, shape: tuple[int, ...], config: GPTConfig) -> tuple[int, ...]:
    """The shape of a saved tensor with the rows that pad the vocabulary, which other files leave out."""
    if has_row_per_token(name) and len(shape) == 2 and shape[0] == config.vocab_size:
        return config.padded_vocab_size, shape[1]
    return shape


def cropped_shape(name: str, shape: tuple[int, ...], config: GPTConfig) -> tuple[int, ...]:
    """The shape of a tensor without the rows that pad the vocabulary."""
    if has_row_per_token(name) and shape and shape[0] == config.padded_vocab_size:
        return config.vocab_size, *shape[1:]
    return shape


def pad(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor` with rows of zeros up to `shape`."""
    if tensor.shape == shape:
        return tensor
    return torch.cat([tensor, torch.zeros(shape[0] - tensor.shape[0], *shape[1:])])
