"""Whether the network is still the one that exports compute.

An export computes the network a second time, in another program: gpt.py in another language, as decode.c is
(common/fast_path.py). Nothing there notices an edit here, so the parts that define it are listed with the fingerprints
that they had when the exports were written.
"""

from types import ModuleType

import torch
from torch import nn

from nanochat import flash_attention, gpt, gpt_config, loss_head
from nanochat.common import UserError
from nanochat.common.fast_path import in_words, unknown_parts
from nanochat.gpt import GPT, MLP, Block, CausalSelfAttention, Embedding, GPTConfig, Linear
from nanochat.inference.cpu_decoder import expected_shapes

FUNCTIONS: list[tuple[ModuleType, dict[str, str]]] = [
    (
        gpt,
        {
            "GPT.hidden": "95038a48",
            "GPT._smear": "b2fa7b6a",
            "GPT._ngrams": "b3aa4b49",
            "GPT._embed": "74ff5184",
            "GPT._rotary": "c31f33fb",
            "GPT.forward": "1ac1ec2c",
            "GPT.head_weight.fget": "effb3d57",
            "GPT.init_rotary": "69be2daf",
            "Block.forward": "33982092",
            "CausalSelfAttention.forward": "47e81de0",
            "MLP.forward": "ee964089",
            "Linear.forward": "8f413056",
            "linear": "0ad23a94",
            "norm": "95f9edc2",
            "mix": "60102a94",
            "normed_rotary": "f381e780",
            "relu_squared": "cf51e9e4",
        },
    ),
    (loss_head, {"head_logits": "e5f0966d", "softcap_": "c2210eb3"}),
    (flash_attention, {"attend_at_positions": "0b5cc82c", "block_softmax_": "92f31ea6"}),
    (
        gpt_config,
        {
            "GPTConfig.short_window.fget": "d2f4cf7f",
            "GPTConfig.window_sizes": "87b4ba8a",
            "GPTConfig.has_value_embed": "e928f0da",
        },
    ),
]
MODULES = (GPT, Block, CausalSelfAttention, MLP, Linear, Embedding, nn.ModuleDict, nn.ModuleList)
FIELDS = (
    *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern", "init"),
    *("short_window_divisor", "rope_base", "qk_scale", "softcap", "residual_scalars", "smear", "smear_channels"),
    *("value_embeds", "value_gate_channels", "value_gate_scale", "backout", "ngram_rows", "ngram_dim"),
)


def differences(config: GPTConfig) -> list[str]:
    """The functions, modules, config fields and parameters of this network that exports do not compute; usually []."""
    return unknown_parts(
        GPT.allocate(config, "meta", torch.float32), FUNCTIONS, MODULES, FIELDS, expected_shapes(config)
    )


def check_network(config: GPTConfig) -> None:
    """Raise UserError if exports would compute another network than GPT does."""
    if parts := differences(config):
        raise UserError(
            f"the network has changed ({in_words(parts)}), and an export would compute the old one: make "
            "nanochat/formats compute the same, and record it in nanochat/formats/same_network.py"
        )
