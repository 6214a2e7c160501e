"""Read a Hugging Face folder: an export of nanochat's, what another program made of it, or a LoRA adapter on top."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict

from nanochat.checkpoint.manifest import PlainName
from nanochat.checkpoint.tensor_file import Name, read_shapes, read_tensors
from nanochat.checkpoint_manager import check_shapes
from nanochat.common import UserError
from nanochat.common.files import read_json
from nanochat.formats import hf_code
from nanochat.formats.hf_folder import CONFIG, ROUTE_OF, ROUTES, WEIGHTS, read_about
from nanochat.formats.hf_tokenizer import read_tokenizer
from nanochat.formats.parameters import has_row_per_token, pad, padded_shape, parameter_shapes
from nanochat.formats.portable import PortableModel
from nanochat.gpt_config import GPTConfig
from nanochat.reporting.machine import memory_bytes

INDEX, ADAPTER_CONFIG, ADAPTER = "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"
MAX_FILES = 1000
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


class Index(TypedDict):
    weight_map: dict[Name, PlainName]


class Adapter(TypedDict):
    """adapter_config.json: what decides how the weights change."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=2**16)]
    lora_alpha: Annotated[float, Field(ge=-1e6, le=1e6)]
    use_rslora: NotRequired[bool]


NEUTRAL = (
    *("use_dora", "use_qalora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("layer_replication", "alora_invocation_tokens"),
)
"""Settings of an adapter that must be unset, as other formulas belong to them."""

KEEP_BASE = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
"""Values of settings with which the base model stays as it is; others, such as pissa, change its weights."""


def read_hf(folder: Path) -> PortableModel:
    """The model in a folder with config.json and safetensors; its source is "" if the folder does not tell the stage.

    Raises UserError for another architecture, and for tensors that do not fit the config, before any is read.
    """
    values = read_json(folder / CONFIG, dict[str, Any], follow_links=False)
    route = ROUTE_OF.get(str(values.get("model_type")))
    if route is None:
        raise UserError(
            f"{folder / CONFIG} has the model type {values.get('model_type')!r:.60}; models that can be read have "
            f"{' or '.join(ROUTE_OF)}"
        )
    kind = ROUTES[route]
    config = kind.read_config(values, folder / CONFIG)
    tied = values.get("tie_word_embeddings") is True
    state = read_state(folder, config, kind.names(config), tied)
    tokenizer = read_tokenizer(folder)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.get_vocab_size():,} tokens, its model {config.vocab_size:,}; "
            "export them together"
        )
    source, meta = about(folder)
    if tied:
        meta["notes"].append("embedding and head were one matrix, and are two from here on")
    if meta.get("tokenizer_hash", tokenizer.hash) != tokenizer.hash:
        meta["notes"].append("its tokenizer is not the one that it was exported with")
    return PortableModel(config, state, tokenizer, source, meta)


def about(folder: Path) -> tuple[str, dict[str, Any]]:
    """(stage, meta) from nanochat.json; ("", without more than notes) if another program has written the folder."""
    content = read_about(folder, follow_links=False)
    if content is None:
        return "", {"notes": []}
    source = content["source"] if content["source"] in ("base", "sft", "rl") else ""
    notes = []
    if content["dtype"] != "float32":
        notes.append(f"its weights were exported in {content['dtype']}, so they are rounded")
    return source, {**content.get("meta", {}), "notes": notes}


# ---------------------------------------------------------------------------------------------------
# Weights


def read_state(folder: Path, config: GPTConfig, names: Mapping[str, str], tied: bool) -> dict[str, torch.Tensor]:
    """The parameters by our names, float32, the vocabulary padded. `names` are the folder's by ours; tensors may also
    have ours, as in an export for MLX."""
    files = weight_files(folder)
    if sum((folder / name).lstat().st_size for name in files) > memory_bytes():
        raise UserError(f"the weights in {folder} are larger than this machine's memory")
    ours = {theirs: name for name, theirs in names.items()}
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        shapes = {key: tuple(shape) for key, shape in read_shapes(folder / name).items()}
        if files[name] is not None and files[name] != set(shapes):
            raise UserError(f"{folder / name} does not hold the tensors that {INDEX} says")
        for key, shape in shapes.items():
            parameter = ours.get(key, key)
            if parameter in found:
                raise UserError(f"{folder} has {parameter} twice; delete the file that does not belong to it")
            found[parameter] = padded_shape(parameter, shape, config)
    if tied and HEAD not in found:
        found[HEAD] = found.get(EMBEDDING, ())
    check_shapes(parameter_shapes(config), found, folder)
    state = {}
    for name in files:
        for key, tensor in read_tensors(folder / name)[0].items():
            if not tensor.is_floating_point():
                raise UserError(f"{folder / name}: {key} is quantized ({tensor.dtype}); save it again in float32")
            parameter = ours.get(key, key)
            state[parameter] = pad(tensor.float(), found[parameter])
    if tied:
        state[HEAD] = state[EMBEDDING].clone()
    return state


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The files of weights, and the tensors that the index says each has (None: there is no index)."""
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, Index, follow_links=False, extra="ignore")["weight_map"]
        files: dict[str, set[str] | None] = {}
        for tensor, name in index.items():
            if not name.endswith(".safetensors"):
                raise UserError(f"{folder / INDEX} names {name}, which is no safetensors file")
            known = files.setdefault(name, set())
            assert known is not None
            known.add(tensor)
        if not 0 < len(files) <= MAX_FILES:
            raise UserError(f"{folder / INDEX} names {len(files):,} files")
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise UserError(f"{folder} is incomplete: {missing[0]} is missing; copy it again")
        return files
    if (folder / WEIGHTS).exists():
        return {WEIGHTS: None}
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights in {pickled[0]}, which may run code when it is read; save it again as "
            "safetensors: model.save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise UserError(f"{folder} has a {CONFIG}, but neither {WEIGHTS} nor {INDEX}; copy it again")


# ---------------------------------------------------------------------------------------------------
# LoRA


def read_adapter(folder: Path, base: Path | None) -> PortableModel:
    """The model in the folder `base` with the LoRA adapter in `folder` merged into it: W + scale * B @ A."""
    if base is None:
        raise UserError(
            f"{folder} is an adapter alone; give the folder of the model it was trained on as --base=FOLDER (or merge "
            "them where it was trained: model.merge_and_unload().save_pretrained(FOLDER))"
        )
    where = folder / ADAPTER_CONFIG
    raw = read_json(where, dict[str, Any], follow_links=False)
    settings = read_json(where, Adapter, follow_links=False, extra="ignore")
    other = [name for name in NEUTRAL if raw.get(name)]
    other += [
        f"{name}={raw[name]!s:.40}" for name, known in KEEP_BASE.items() if name in raw and raw[name] not in known
    ]
    if other:
        raise UserError(f"{where}: {other[0]} is set, so merge it where it was trained: model.merge_and_unload()")
    model = read_hf(base)
    ours = {theirs: name for name, theirs in hf_code.names(model.config).items()}  # the other class's are among them
    rank = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    tensors = read_tensors(folder / ADAPTER)[0]
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    if set(tensors) != {f"{module}.lora_{part}.weight" for module in modules for part in "AB"} or not modules:
        raise UserError(f"{folder / ADAPTER} holds more than LoRA's matrices; merge it where it was trained")
    for module in sorted(modules):
        name = ours.get(f"{module.removeprefix('base_model.model.')}.weight", "")
        a, b = (tensors[f"{module}.lora_{part}.weight"].float() for part in "AB")
        weight = model.state.get(name)
        if weight is None or has_row_per_token(name) or a.dim() != 2 or b.dim() != 2:
            raise UserError(f"{folder / ADAPTER}: {module} is no matrix of the model in {base}")
        if (b.size(0), a.size(1)) != weight.shape or a.size(0) != rank or b.size(1) != rank:
            raise UserError(f"{folder / ADAPTER}: {module} does not fit the model in {base}")
        weight += scale * (b @ a)
    model.meta["notes"].append(f"the adapter {folder} is merged: rank {rank}, {len(modules)} matrices")
    return model
