"""GGUF files of the plain network, for the nanochat branch of a llama.cpp fork (github.com/ulanch/llama.cpp).

llama.cpp itself computes no network like ours: those of its architectures that cap the logits also norm the output of
each layer. Nor does it split numbers into pairs of digits as our tokenizer does. The fork adds both, under the name
"nanochat". Other forks use this name for other tensors; docs/portable.md compares them.
"""

import dataclasses
from importlib import resources
from pathlib import Path

import torch

from nanochat.common import UserError, first_line
from nanochat.formats import hf_class
from nanochat.formats.bpe_merges import derive_merges, to_byte_level
from nanochat.formats.gguf_container import ENCODINGS, Value, write_container
from nanochat.formats.hf_tokenizer import token_roles
from nanochat.formats.portable import PortableModel, check_new
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer

ARCHITECTURE = "nanochat"
NORMAL, CONTROL = 1, 3  # types of tokens


def write_gguf(model: PortableModel, out: Path, dtype: str, license: str = "") -> None:
    """Write the file `out`, with matrices as float32, bfloat16 or q8_0.

    Raises UserError if `out` exists, and for a model that the fork would compute differently.
    """
    check_new(out, is_file=True)
    missing = hf_class.lacking(dataclasses.replace(model.config, qk_scale=1.0))  # the fork has that one
    if model.tokenizer.pattern != SPLIT_PATTERN:
        missing.append("the tokenizer's split pattern")
    if missing:
        raise UserError(
            f"llama.cpp's forks compute another network: {', '.join(missing)} would be lost; "
            "train with --recipe=portable, or serve this model with python -m scripts.chat_web"
        )
    values = {**_network_values(model, dtype), **_tokenizer_values(model.tokenizer, model.is_chat)}
    if license:
        values["general.license"] = license
    write_container(out, values, _tensors(model, dtype))


def _network_values(model: PortableModel, dtype: str) -> dict[str, Value]:
    config = model.config
    values: dict[str, Value] = {
        "context_length": config.sequence_len,
        "vocab_size": config.vocab_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_kv_head,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": hf_class.RMS_EPS,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_base),
        "final_logit_softcapping": float(config.softcap),
    }
    return {
        "general.architecture": ARCHITECTURE,
        "general.name": f"{model.meta.get('model_tag', 'nanochat')} {model.source}",
        "general.file_type": ENCODINGS[dtype].file_type,
        "general.quantization_version": 2,
        **{f"{ARCHITECTURE}.{key}": value for key, value in values.items()},
    }


def _tokenizer_values(tokenizer: RustBPETokenizer, chat: bool) -> dict[str, Value]:
    special, roles = tokenizer.special_ids, token_roles(chat)
    tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.get_vocab_size() - len(special))]
    try:
        merges = derive_merges(tokens)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be exported: {first_line(error)}") from error
    pairs = [pair for pair in merges.values() if pair]
    if len(pairs) < len(merges):
        raise UserError("--to=gguf: the vocabulary has tokens that merging does not reach, which llama.cpp never uses")
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "nanochat",
        "tokenizer.ggml.tokens": [*map(to_byte_level, tokens), *special],
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + [CONTROL] * len(special),
        "tokenizer.ggml.merges": [f"{to_byte_level(a)} {to_byte_level(b)}" for a, b in pairs],
        "tokenizer.ggml.bos_token_id": special[roles["bos_token"]],
        "tokenizer.ggml.eos_token_id": special[roles["eos_token"]],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    if chat:
        template = resources.files("nanochat.formats") / "gguf_chat.jinja"
        values["tokenizer.chat_template"] = template.read_text("utf-8")
    return values


def _tensors(model: PortableModel, dtype: str) -> dict[str, tuple[torch.Tensor, str]]:
    """Matrices as `dtype`; norms, which have no weights here, as float32 ones, those of q and k times qk_scale."""
    config, state = model.config, model.state
    norm = torch.ones(config.n_embd), "float32"
    head_norm = torch.full((config.head_dim,), config.qk_scale), "float32"
    tensors = {
        "token_embd.weight": (state["transformer.wte.weight"][: config.vocab_size], dtype),
        "token_embd_norm.weight": norm,
        "output.weight": (state["lm_head.weight"][: config.vocab_size], dtype),
        "output_norm.weight": norm,
    }
    matrices = {"attn_q": "attn.c_q", "attn_k": "attn.c_k", "attn_v": "attn.c_v", "attn_output": "attn.c_proj"}
    matrices |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    norms = {"attn_norm": norm, "attn_q_norm": head_norm, "attn_k_norm": head_norm, "ffn_norm": norm}
    for i in range(config.n_layer):
        for name, ours in matrices.items():
            tensors[f"blk.{i}.{name}.weight"] = state[f"transformer.h.{i}.{ours}.weight"], dtype
        tensors |= {f"blk.{i}.{name}.weight": ones for name, ones in norms.items()}
    return tensors
