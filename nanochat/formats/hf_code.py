"""Our own class for transformers (model_type "nanochat_gpt"): its config and tensor names, both ways.

Its code, remote_code/*.py, is copied into the exported folder and used with `trust_remote_code=True`. It computes all
that GPT does.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from nanochat.common import UserError
from nanochat.common.files import check_value
from nanochat.formats import hf_class
from nanochat.formats.hf_class import Size
from nanochat.gpt_config import GPTConfig
from nanochat.tokenizer import RustBPETokenizer

CODE = Path(__file__).parent / "remote_code"
CODE_FILES = ("configuration_nanochat_gpt.py", "modeling_nanochat_gpt.py")
MODEL_TYPE = "nanochat_gpt"
SAME_NAMES = (
    "qk_scale",
    "rope_base",
    "value_gate_channels",
    "value_gate_scale",
    "residual_scalars",
    "smear",
    "smear_channels",
    "ngram_rows",
    "ngram_dim",
    "backout",
)
"""Fields that config.json has under the names of GPTConfig."""


class CodeFields(TypedDict):
    """The fields of config.json that decide what is computed."""

    model_type: Literal["nanochat_gpt"]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: Size
    num_key_value_heads: NotRequired[Size | None]
    max_position_embeddings: Size
    layer_types: list[Literal["sliding_attention", "full_attention"]]
    sliding_window: int | None
    value_embeds: list[int]
    qk_scale: float
    final_logit_softcapping: float
    rope_base: float
    value_gate_channels: Size
    value_gate_scale: float
    residual_scalars: bool
    smear: bool
    smear_channels: Size
    ngram_rows: NotRequired[Annotated[int, Field(ge=0, le=2**26)]]
    ngram_dim: NotRequired[Size]
    backout: bool
    nanochat_config: dict[str, Any]


def lacking(config: GPTConfig) -> list[str]:
    """The features of `config` that the code does not compute: transformers' caches know no window of one token."""
    return ["short windows without any earlier token"] if config.short_window == 0 and config.has_short_windows else []


def config_json(config: GPTConfig, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """config.json, without what depends on the file of weights."""
    configuration, modeling = (name.removesuffix(".py") for name in CODE_FILES)
    return {
        "architectures": ["NanochatGPTForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{configuration}.NanochatGPTConfig",
            "AutoModel": f"{modeling}.NanochatGPTModel",
            "AutoModelForCausalLM": f"{modeling}.NanochatGPTForCausalLM",
        },
        **hf_class.common_fields(config, tokenizer),
        **layers(config),
        **{name: getattr(config, name) for name in SAME_NAMES},
        "final_logit_softcapping": config.softcap,
    }


def layers(config: GPTConfig) -> dict[str, Any]:
    """The fields about single layers, of which transformers reads `layer_types` and `sliding_window`."""
    is_short = [left < config.sequence_len for left, _ in config.window_sizes()]
    return {
        "layer_types": ["sliding_attention" if short else "full_attention" for short in is_short],
        # transformers counts the position itself; GPT counts the earlier ones.
        "sliding_window": config.short_window + 1 if any(is_short) else None,
        "value_embeds": [i for i in range(config.n_layer) if config.has_value_embed(i)],
    }


def read_config(values: dict[str, Any], where: object) -> GPTConfig:
    """The config of a model with our code from its config.json. Raises UserError, naming `where`, if its fields
    contradict each other."""
    found = check_value(values, where, CodeFields, extra="ignore")
    same = {name: found[name] for name in SAME_NAMES if name in found}  # exports before n-grams have none
    config = hf_class.with_sizes(found, where, GPTConfig(), softcap=found["final_logit_softcapping"], **same)
    for name, expected in layers(config).items():
        if found[name] != expected:
            raise UserError(f"{where}: {name} does not agree with {hf_class.RECORD}; export the model again")
    return config


def names(config: GPTConfig) -> dict[str, str]:
    """Tensor names of our class by the names of GPT's parameters: those of transformers' class, and those of the
    features that it lacks."""
    found = hf_class.names(config)
    for i in range(config.n_layer):
        if config.has_value_embed(i):
            found[f"value_embeds.{i}.weight"] = f"model.value_embeds.{i}.weight"
            found[f"transformer.h.{i}.attn.ve_gate.weight"] = f"model.layers.{i}.self_attn.value_gate.weight"
    features = {
        "resid_lambdas": config.residual_scalars,
        "x0_lambdas": config.residual_scalars,
        "ngram_embed.weight": config.ngram_rows,
        "ngram_proj.weight": config.ngram_rows,
        "smear_gate.weight": config.smear,
        "smear_lambda": config.smear,
        "backout_lambda": config.backout,
    }
    return found | {name: f"model.{name}" for name, is_there in features.items() if is_there}
