"""Published checkpoints of tiny models, as torch.save, pickle and json write them."""

import json
import pickle
from pathlib import Path
from typing import Any

import tiktoken
import torch
from export_helpers import SIZES, TOKENIZER
from stubs import stir

from nanochat.gpt import GPT, GPTConfig

PUBLISHED = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"}
FORMS = {"published": GPTConfig, "later": GPTConfig.later}


def make_model(form: str) -> GPT:
    """A model of a published form with noise in every weight."""
    return stir(GPT.create(FORMS[form](**SIZES), seed=5), 0.1).eval()


def encoding(**changes: Any) -> tiktoken.Encoding:
    """TOKENIZER as tiktoken's class."""
    ranks = {token: rank for rank, token in enumerate(TOKENIZER._tokens)}
    values = {"pat_str": TOKENIZER.pattern, "mergeable_ranks": ranks, "special_tokens": TOKENIZER.special_ids}
    return tiktoken.Encoding("rustbpe", **{**values, **changes})


def write_published(base: Path, model: GPT, step: int = 100, folder: str = "base_checkpoints/d3") -> Path:
    """A base folder of the published system; returns the checkpoint's folder."""
    out = base / folder
    out.mkdir(parents=True)
    torch.save({f"_orig_mod.{name}": p for name, p in model.state_dict().items()}, out / f"model_{step:06d}.pt")
    sizes = {name: value for name, value in model.config.to_dict().items() if name in PUBLISHED}
    meta = {"step": step, "val_bpb": 1.25, "model_config": sizes, "user_config": {"total_batch_size": 2048}}
    (out / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (base / "tokenizer").mkdir(exist_ok=True)
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    return out
