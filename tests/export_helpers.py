"""Tiny models with noise in every weight, exported for transformers by both routes, and what a reader makes of them."""

from pathlib import Path
from typing import Any

import torch
from stubs import stir

from nanochat.formats.hf_folder import write_hf
from nanochat.formats.portable import PortableModel
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

TEXTS = ["the cats and the hats on the mats sat", "two and two are four, and four and four are eight", "é 你好 😀!"]
TOKENIZER = RustBPETokenizer.train_from_iterator(TEXTS * 3, 300)
SIZES = {"sequence_len": 128, "vocab_size": 300, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
CONFIGS = {"class": GPTConfig.plain(**SIZES), "code": GPTConfig.later(**SIZES)}
"""By the route that --route=auto takes."""


def stirred(config: GPTConfig, seed: int = 3, noise: float = 0.1) -> GPT:
    """A model with noise in every weight, so that every feature matters."""
    return stir(GPT.create(config, seed=seed), noise).eval()


def make_model(route: str) -> GPT:
    """A model that needs this route."""
    return stirred(CONFIGS[route])


def portable(model: GPT, source: str = "sft", tokenizer: RustBPETokenizer = TOKENIZER, **meta: Any) -> PortableModel:
    """The model of a run named tiny."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    return PortableModel(model.config, state, tokenizer, source, {"model_tag": "tiny", "step": 1, **meta})


def export(model: GPT, out: Path) -> Path:
    """Write the model for transformers; returns `out`."""
    write_hf(portable(model), out, "float32")
    return out


def model_of(portable: PortableModel) -> GPT:
    """The model that was read."""
    model = GPT.create(portable.config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(portable.state[name])
    return model.eval()
