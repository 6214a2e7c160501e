"""A Hugging Face folder: weights, config, tokenizer, chat template and model card.

out/
  model.safetensors  config.json  generation_config.json
  tokenizer.json  tokenizer_config.json  ...           hf_tokenizer.py
  configuration_nanochat_gpt.py  modeling_nanochat_gpt.py   only on the route "code"
  README.md  curves-base.png  ...                      model_card.py
  nanochat.json                                        NanochatFile: what we know and transformers does not ask
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from typing_extensions import TypedDict

from nanochat.checkpoint.tensor_file import tensor_chunks, write_file
from nanochat.common import UserError, write_json
from nanochat.common.files import read_json
from nanochat.formats import hf_class, hf_code
from nanochat.formats.card_front import CardOptions
from nanochat.formats.hf_tokenizer import write_tokenizer
from nanochat.formats.model_card import write_card
from nanochat.formats.parameters import has_row_per_token
from nanochat.formats.portable import PortableModel, new_folder
from nanochat.formats.training_data import public_flags
from nanochat.gpt_config import GPTConfig

Route = Literal["auto", "class", "code"]
ROUTES = {"class": hf_class, "code": hf_code}
ROUTE_OF = {hf_class.MODEL_TYPE: "class", hf_code.MODEL_TYPE: "code"}  # by model_type in config.json
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS, CONFIG, ABOUT = "model.safetensors", "config.json", "nanochat.json"


class About(TypedDict, total=False):
    """The parts of a checkpoint's meta.json that an export keeps; each as meta.json has it, and missing if it is there.

    `progress` has tokens, losses and bits per byte; `user_config` the flags of the run that may be published, of which
    `data` decides the licence of the text.
    """

    model_tag: str
    step: int
    recipe: str
    progress: dict[str, Any]
    plan: dict[str, Any]
    user_config: dict[str, Any]
    tokenizer_hash: str
    base: dict[str, Any]
    before: dict[str, Any]


class NanochatFile(TypedDict):
    """nanochat.json of an export: read by import, info, diff and the model card."""

    format: Literal["nanochat-export"]
    version: Literal[1]
    route: Literal["class", "code", "onnx"]
    dtype: str
    source: str  # the stage: base, sft or rl
    model_config: dict[str, Any]  # of GPTConfig
    tokenizer_hash: str
    meta: NotRequired[About]


def choose_route(config: GPTConfig, route: Route) -> Literal["class", "code"]:
    """The route itself; for auto, transformers' own class where nothing is lost. Raises UserError where it would be."""
    if route == "auto":
        route = "code" if hf_class.lacking(config) else "class"
    if features := ROUTES[route].lacking(config):
        advice = "; leave out --route=class, and the model is exported with its own code" if route == "class" else ""
        raise UserError(f"this model has {', '.join(features)}, which --route={route} cannot express{advice}")
    return route


def write_hf(
    model: PortableModel, out: Path, dtype: str, route: Route = "auto", card: CardOptions | None = None
) -> None:
    """Create the folder `out`. Raises UserError if it exists, or if `route` would lose a feature of the model."""
    chosen = choose_route(model.config, route)
    kind, config = ROUTES[chosen], model.config
    with new_folder(out) as folder:
        write_file(folder / WEIGHTS, weights(config, model.state, kind.names(config), DTYPES[dtype]))
        write_json(folder / CONFIG, {**kind.config_json(config, model.tokenizer), "dtype": dtype})
        write_json(folder / "generation_config.json", generation_config(model))
        write_json(folder / ABOUT, about(model, chosen, dtype))
        for name in hf_code.CODE_FILES if chosen == "code" else ():
            write_file(folder / name, [(hf_code.CODE / name).read_bytes()])
        write_tokenizer(model.tokenizer, folder, model.is_chat, config.sequence_len)
        write_card(model, folder, chosen, dtype, card or CardOptions())


def weights(
    config: GPTConfig, state: Mapping[str, torch.Tensor], names: Mapping[str, str], dtype: torch.dtype
) -> Iterator[Any]:
    """The file of weights in chunks. Vocabularies are cropped to the tokens that there are."""
    assert set(state) == set(names), f"parameters without a name outside: {set(state) ^ set(names)}"
    tensors = {}
    for name, tensor in state.items():
        tensors[names[name]] = (tensor[: config.vocab_size] if has_row_per_token(name) else tensor).to(dtype)
    return tensor_chunks(tensors, {"format": "pt"})


def generation_config(model: PortableModel) -> dict[str, Any]:
    """generation_config.json: where an answer ends, and how chat_cli samples.

    Padding is a token that ends texts: generate takes any other that it finds in a prompt for padding, and masks it.
    """
    bos, end = model.tokenizer.get_bos_token_id(), model.tokenizer.encode_special("<|assistant_end|>")
    ends = [end, bos] if model.is_chat else [bos]
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 50, "min_p": 0.1}
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": ends[0], **sampling}


def about(model: PortableModel, route: Literal["class", "code", "onnx"], dtype: str) -> NanochatFile:
    """nanochat.json."""
    kept: Any = {name: model.meta[name] for name in About.__annotations__ if model.meta.get(name) is not None}
    if "user_config" in kept:
        kept["user_config"] = public_flags(model.source, kept["user_config"])
    return {
        "format": "nanochat-export",
        "version": 1,
        "route": route,
        "dtype": dtype,
        "source": model.source,
        "model_config": model.config.to_dict(),
        "tokenizer_hash": model.tokenizer.hash,
        "meta": kept,
    }


def read_about(folder: Path, follow_links: bool = True) -> NanochatFile | None:
    """nanochat.json of an export; None if the folder has none. Raises UserError if it is damaged."""
    if not (folder / ABOUT).exists():
        return None
    return read_json(folder / ABOUT, NanochatFile, follow_links=follow_links, extra="ignore")
