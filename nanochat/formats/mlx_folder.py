"""A folder for mlx-lm: the plain architecture, with the tensor names that its module `nanochat` has, which are ours.

mlx-lm reads sizes and the base of rotary positions from config.json. The cap of logits is fixed there, and so is the
epsilon of its norms, 1e-5, 84 times ours.
"""

from pathlib import Path

from nanochat.checkpoint.tensor_file import write_file
from nanochat.common import UserError, write_json
from nanochat.formats import hf_class
from nanochat.formats.hf_folder import CONFIG, DTYPES, WEIGHTS, generation_config, weights
from nanochat.formats.hf_tokenizer import write_tokenizer
from nanochat.formats.portable import PortableModel, new_folder
from nanochat.gpt_config import GPTConfig

SOFTCAP = 15.0


def lacking(config: GPTConfig) -> list[str]:
    """The features of `config` that mlx-lm does not compute; [] if it can be exported."""
    cap = [] if config.softcap == SOFTCAP else [f"a softcap of {config.softcap:g} instead of {SOFTCAP:g}"]
    return hf_class.lacking(config) + cap


def write_mlx(model: PortableModel, out: Path, dtype: str) -> None:
    """Create the folder `out`. Raises UserError if it exists, or if the model has features that would be lost."""
    config = model.config
    if features := lacking(config):
        raise UserError(
            f"this model has {', '.join(features)}, which mlx-lm does not compute; train with --recipe=portable, "
            "or export this model with --to=hf or --to=onnx"
        )
    fields = hf_class.config_json(config, model.tokenizer)
    with new_folder(out) as folder:
        write_file(folder / WEIGHTS, weights(config, model.state, {n: n for n in model.state}, DTYPES[dtype]))
        write_json(folder / CONFIG, {**fields, "rope_theta": config.rope_base, "dtype": dtype})
        write_json(folder / "generation_config.json", generation_config(model))
        write_tokenizer(model.tokenizer, folder, model.is_chat, config.sequence_len)
