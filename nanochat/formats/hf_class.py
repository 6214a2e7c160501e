"""transformers' own NanoChat class (model_type "nanochat", since 5.0): its config and tensor names, both ways.

It computes what GPT does with full attention and without value embeddings, residual scalars, n-grams, smear, backout
and a scale of queries and keys: the recipe plain. It needs no code from us, and runs wherever transformers does.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from nanochat.common import UserError
from nanochat.common.files import check_value
from nanochat.gpt_config import GPTConfig
from nanochat.tokenizer import RustBPETokenizer

MODEL_TYPE = "nanochat"
RMS_EPS = 2.0**-23  # that torch adds to the mean square in float32
RECORD = "nanochat_config"  # our config within config.json, for what the class has no field for

Size = Annotated[int, Field(ge=1, le=2**24)]


class RopeParameters(TypedDict):
    rope_theta: float
    rope_type: NotRequired[str]


class ClassFields(TypedDict):
    """The fields of config.json that decide what is computed, with the class's defaults where they may be missing."""

    model_type: Literal["nanochat"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: NotRequired[Size | None]
    head_dim: NotRequired[Size | None]
    max_position_embeddings: Size
    hidden_act: NotRequired[str]
    attention_bias: NotRequired[bool]
    rms_norm_eps: float
    final_logit_softcapping: float | None
    rope_parameters: NotRequired[RopeParameters | None]
    rope_theta: NotRequired[float]
    rope_scaling: NotRequired[dict[str, Any] | None]
    nanochat_config: NotRequired[dict[str, Any]]


def lacking(config: GPTConfig) -> list[str]:
    """The features of `config` that the class cannot compute, in words; [] if it can be exported to it."""
    features = {
        "short attention windows": config.has_short_windows,
        "value embeddings": config.value_embeds,
        "residual scalars": config.residual_scalars,
        "n-grams": config.ngram_rows > 0,
        "smear": config.smear,
        "backout": config.backout,
        f"a scale of queries and keys (qk_scale={config.qk_scale:g})": config.qk_scale != 1,
    }
    return [name for name, is_there in features.items() if is_there]


def config_json(config: GPTConfig, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """config.json, without what depends on the file of weights."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": MODEL_TYPE,
        **common_fields(config, tokenizer),
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "final_logit_softcapping": config.softcap,
        "hidden_act": "relu2",
        "rms_norm_eps": RMS_EPS,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def common_fields(config: GPTConfig, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """What both classes have in config.json. pad_token_id stays unset: the class would give that token's embedding no
    gradient in finetuning. It is in generation_config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokenizer.get_bos_token_id(),
        "eos_token_id": tokenizer.get_bos_token_id(),
        "pad_token_id": None,
        RECORD: config.to_dict(),
    }


def read_config(values: dict[str, Any], where: object) -> GPTConfig:
    """The config of a NanoChat model from its config.json. Raises UserError, naming `where`, for what GPT does not
    compute exactly."""
    found = check_value(values, where, ClassFields, extra="ignore")
    rope = found.get("rope_parameters") or {"rope_theta": found.get("rope_theta", 10_000.0)}
    expected = {
        "intermediate_size": (found["intermediate_size"], 4 * found["hidden_size"]),
        "head_dim": (found.get("head_dim"), (None, found["hidden_size"] // found["num_attention_heads"])),
        "hidden_act": (found.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (found.get("attention_bias", False), False),
        "rms_norm_eps": (found["rms_norm_eps"], RMS_EPS),
        "rope type": (rope.get("rope_type", "default"), "default"),
        "rope_scaling": (found.get("rope_scaling"), None),
    }
    for name, (value, ours) in expected.items():
        if not (value in ours if isinstance(ours, tuple) else same(value, ours)):
            raise UserError(f"{where}: {name} is {value!r:.40}, nanochat's models have {ours!r}")
    if found["final_logit_softcapping"] is None:
        raise UserError(f"{where}: final_logit_softcapping is null, nanochat's models have a softcap")
    config = with_sizes(
        found,
        where,
        GPTConfig.plain(),
        rope_base=rope["rope_theta"],
        softcap=found["final_logit_softcapping"],
    )
    if features := lacking(config):
        raise UserError(f"{where}: {RECORD} has {', '.join(features)}, which the class NanoChat does not compute")
    return config


def same(value: Any, ours: Any) -> bool:
    """Whether two values are equal, floats within rounding to seven digits."""
    if isinstance(ours, float) and isinstance(value, float):
        return abs(value - ours) <= 1e-6 * abs(ours)
    return bool(value == ours)


def with_sizes(found: Any, where: object, default: GPTConfig, **changes: Any) -> GPTConfig:
    """The recorded config, or `default` if there is none, with the sizes that config.json has, and `changes`."""
    record = found.get(RECORD)
    config = default if record is None else GPTConfig.from_dict(record, f"{where}: {RECORD}")
    return replace(
        config,
        vocab_size=found["vocab_size"],
        n_embd=found["hidden_size"],
        n_layer=found["num_hidden_layers"],
        n_head=found["num_attention_heads"],
        n_kv_head=found.get("num_key_value_heads") or found["num_attention_heads"],
        sequence_len=found["max_position_embeddings"],
        **changes,
    )


def names(config: GPTConfig) -> dict[str, str]:
    """Tensor names of the class by the names of GPT's parameters."""
    parts = {
        "attn.c_q": "self_attn.q_proj",
        "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    found = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            found[f"transformer.h.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return found
