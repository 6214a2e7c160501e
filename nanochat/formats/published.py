"""Checkpoints of the published nanochat: model_000100.pt and meta_000100.json, and the tokenizer in tokenizer.pkl.

The tensors have the names of GPT's parameters. The files say which sizes the model has, and only in part which form:
some of what a version computed is in its code alone. What follows from neither names, shapes nor meta is assumed to be
as in the version that had these tensors, and said.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, get_type_hints

import torch
from pydantic import Field
from typing_extensions import TypedDict

from nanochat.checkpoint.runs import STAGE_OF_FOLDER
from nanochat.checkpoint_manager import check_shapes
from nanochat.common import SPECIAL_TOKENS, UserError, first_line
from nanochat.common.files import check_value, open_file, read_file, read_json
from nanochat.formats.parameters import pad, padded_shape, parameter_shapes
from nanochat.formats.pickle_data import MAX_BYTES, Call, read_pickle
from nanochat.formats.portable import PortableModel
from nanochat.formats.torch_file import TorchFile
from nanochat.gpt_config import GPTConfig
from nanochat.tokenizer import RustBPETokenizer

MODEL_FILE = re.compile(r"model_(\d{1,9})\.pt")
STAGES = {**STAGE_OF_FOLDER, "mid_checkpoints": "sft"}
TABLES = {"cos", "sin"}  # of rotations, which are computed here
LATER_CHANNELS = 12  # of the value gates, before 32
ROPE_BASES = (10_000.0, 100_000.0)
TABLE_TOLERANCE = 0.02  # rotations were saved in bfloat16, and two bases differ by far more
ASSUMED = ("rope_base", "qk_scale", "softcap", "short_window_divisor", "value_gate_scale", "window_pattern")
"""Fields of GPTConfig that --assume may set."""

Count = Annotated[int, Field(ge=1, le=2**40)]


class SavedConfig(TypedDict):
    sequence_len: Count
    vocab_size: Count
    n_layer: Count
    n_head: Count
    n_kv_head: Count
    n_embd: Count
    window_pattern: NotRequired[str]


class SavedMeta(TypedDict):
    """meta_000100.json; its other fields are about training."""

    model_config: SavedConfig
    step: NotRequired[Annotated[int, Field(ge=0, le=2**40)]]
    val_bpb: NotRequired[float | None]
    total_batch_size: NotRequired[int]
    user_config: NotRequired[dict[str, Any]]


@dataclass
class PublishedFiles:
    """A checkpoint's files, as far as their names tell."""

    model: Path
    meta: Path
    step: int
    stage: str | None  # by the folder it is in


# ---------------------------------------------------------------------------------------------------
# Files


def find_published(path: Path, step: int = -1) -> PublishedFiles | None:
    """The checkpoint that a .pt file or the folder of a run names, at its last step for -1; None if there is none.

    Raises UserError if there are only other steps.
    """
    folder = path if path.is_dir() else path.parent
    names = [entry.name for entry in folder.iterdir()] if path.is_dir() else [path.name]
    steps = {int(match[1]): match[0] for name in names if (match := MODEL_FILE.fullmatch(name))}
    if not steps:
        return None
    if step >= 0 and step not in steps:
        raise UserError(f"{folder} has no step {step}; it has: {', '.join(map(str, sorted(steps)))}")
    chosen = step if step >= 0 else max(steps)
    name = steps[chosen]
    meta = folder / name.replace("model_", "meta_").replace(".pt", ".json")
    return PublishedFiles(folder / name, meta, chosen, STAGES.get(folder.absolute().parent.name))


def read_published(found: PublishedFiles, tokenizer: RustBPETokenizer, assumed: Mapping[str, Any]) -> PortableModel:
    """The model in these files. Its meta has the notes on what was assumed.

    `assumed` are fields of GPTConfig (ASSUMED) that override. Raises UserError for files that are something else.
    """
    meta = read_meta(found.meta)
    with open_file(found.model) as file:
        saved = TorchFile(found.model, file)
        names = {parameter_name(name): name for name in saved.tensors}
        shapes = {name: saved.tensors[old].shape for name, old in names.items()}
        config, notes = infer_config(meta["model_config"], shapes, assumed)
        expected = parameter_shapes(config)
        tables = TABLES & set(names)
        after = {name: padded_shape(name, shape, config) for name, shape in shapes.items() if name not in tables}
        filled = {name: (config.n_layer,) for name in ("resid_lambdas", "x0_lambdas") if name in expected}
        check_shapes(expected, filled | after, found.model)
        for table in sorted(tables):
            check_table(saved, names[table], table, config, found.model)
        state = {name: pad(saved.read(names[name]).float(), after[name]) for name in after}
    for name in filled.keys() - state.keys():
        state[name] = torch.full((config.n_layer,), 1.0 if name == "resid_lambdas" else 0.0)
        notes.append(f"{name} is missing and taken as {state[name][0]:g}, as the published code does")
    return PortableModel(config, state, tokenizer, found.stage or "", portable_meta(found, meta, config, notes))


def parameter_name(saved: str) -> str:
    """The name of a saved tensor without what torch.compile puts before it."""
    return saved.removeprefix("_orig_mod.")


def portable_meta(found: PublishedFiles, meta: SavedMeta, config: GPTConfig, notes: list[str]) -> dict[str, Any]:
    """What a checkpoint's meta needs of it; sizes of the run only where the files have them."""
    user = meta.get("user_config", {})
    batch = meta.get("total_batch_size") or user.get("total_batch_size")
    others = [entry.name for entry in found.model.parent.glob(f"optim_{found.step:06d}*.pt")]
    if others:
        notes.append(f"the optimizer's state is not imported ({', '.join(sorted(others)[:3])})")
    result: dict[str, Any] = {"model_config": config.to_dict(), "step": found.step, "notes": notes}
    if math.isfinite(meta.get("val_bpb") or math.nan):
        result["val_bpb"] = meta["val_bpb"]
    if isinstance(batch, int) and 1 <= batch <= 2**40:
        result["total_batch_tokens"] = batch
    result["recipe"] = "later" if config.init == "later" else "published" if config.value_embeds else "plain"
    return result


def read_meta(path: Path) -> SavedMeta:
    """The fields of a meta file. A field of the config that no published version had is an error: such a model computes
    something else."""
    content = read_json(path, dict[str, Any])
    check_value(content.get("model_config"), f"{path}: model_config", SavedConfig, extra="forbid")
    return check_value(content, path, SavedMeta, extra="ignore")


# ---------------------------------------------------------------------------------------------------
# Config


def infer_config(
    saved: SavedConfig, shapes: Mapping[str, tuple[int, ...]], assumed: Mapping[str, Any]
) -> tuple[GPTConfig, list[str]]:
    """(config, notes) of the version that had tensors of these names and shapes."""
    gates = [shape for name, shape in shapes.items() if name.endswith(".ve_gate.weight") and len(shape) == 2]
    channels = gates[0][1] if gates else 32
    smear = shapes.get("smear_gate.weight", ())
    later = bool(smear) or "backout_lambda" in shapes or channels == LATER_CHANNELS
    values: dict[str, Any] = {
        **saved,
        "window_pattern": saved.get("window_pattern", "L"),
        "value_embeds": any(name.startswith("value_embeds.") for name in shapes),
        "value_gate_channels": channels,
        "value_gate_scale": 3.0 if later else 2.0,
        "residual_scalars": not {"resid_lambdas", "x0_lambdas"}.isdisjoint(shapes),
        "smear": bool(smear),
        "smear_channels": smear[1] if len(smear) == 2 else 24,
        "backout": "backout_lambda" in shapes,
        "short_window_divisor": 4 if later else 2,
        "rope_base": ROPE_BASES[later],
        "qk_scale": 1.2 if later else 1.0,
        "init": "later" if later else "published",
    }
    values |= assumed
    try:
        config = GPTConfig(**values)
    except (UserError, TypeError) as error:
        raise UserError(f"the checkpoint's sizes are not those of a model: {first_line(error)}") from error
    return config, assumptions(config, saved, assumed)


def assumptions(config: GPTConfig, saved: SavedConfig, assumed: Mapping[str, Any]) -> list[str]:
    """What the files do not say, in words."""
    version = "later" if config.init == "later" else "published" if config.value_embeds else "first"
    unsure = {"rope_base": f"RoPE base {config.rope_base:,.0f}", "qk_scale": f"scale of q and k {config.qk_scale:g}"}
    if "S" in config.window_pattern.upper():
        unsure["short_window_divisor"] = f"short window {config.short_window} tokens"
    if config.value_embeds:
        unsure["value_gate_scale"] = f"value gate's factor {config.value_gate_scale:g}"
    values = [words for name, words in unsure.items() if name not in assumed]
    notes = [f"taken as of the {version} version, which the files do not say: {', '.join(values)}"] if values else []
    if "window_pattern" not in saved and "window_pattern" not in assumed:
        notes.append("no window pattern was saved: full attention, as the published code reads such files")
    if config.init == "later" and not (config.smear and config.backout):
        notes.append(
            "it has some of the later version's tensors and lacks others: compare its bits per byte with what was "
            "reported, and try --assume=rope_base=10000,qk_scale=1 if they are far off"
        )
    return notes


def parse_assumed(text: str) -> dict[str, Any]:
    """The fields of --assume=rope_base=10000,qk_scale=1. Raises UserError for another field or value."""
    types, values = get_type_hints(GPTConfig), dict[str, Any]()
    for part in text.split(",") if text else ():
        name, _, value = part.strip().partition("=")
        if name not in ASSUMED:
            raise UserError(f"--assume takes {', '.join(ASSUMED)}, as in rope_base=10000; got {part.strip()!r}")
        try:
            values[name] = types[name](value)
        except ValueError:
            raise UserError(f"--assume: {name} takes a {types[name].__name__}, got {value!r}") from None
    return values


def check_table(saved: TorchFile, name: str, table: str, config: GPTConfig, path: Path) -> None:
    """Raise UserError unless a saved table of rotations, (T, D/2), is that of `config`."""
    half, shape = config.head_dim // 2, saved.tensors[name].shape
    if not shape or shape[-1] != half:
        raise UserError(f"{path}: {name} is no table of rotations for heads of {config.head_dim}")
    rows = saved.read(name).float().reshape(-1, half)
    rates = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(len(rows), dtype=torch.float32), rates)
    expected = angles.cos() if table == "cos" else angles.sin()
    if not (rows - expected).abs().max() <= TABLE_TOLERANCE:
        raise UserError(
            f"{path}: {name} is not of the RoPE base {config.rope_base:,.0f}; give the model's own with "
            f"--assume=rope_base={next(base for base in ROPE_BASES if base != config.rope_base):.0f} or another"
        )


# ---------------------------------------------------------------------------------------------------
# Tokenizer


def read_tokenizer_pickle(path: Path) -> RustBPETokenizer:
    """The tokenizer in a pickled tiktoken.Encoding. Raises UserError for any other, and for other special tokens."""
    value = read_pickle(read_file(path, MAX_BYTES), path, {"tiktoken.core.Encoding", "_codecs.encode"})
    if not isinstance(value, Call) or not isinstance(value.state, dict):
        raise UserError(f"{path} holds no tokenizer's vocabulary; give the tokenizer.pkl of nanochat's tok_train")
    pattern, ranks, special = (value.state.get(key) for key in ("pat_str", "mergeable_ranks", "special_tokens"))
    if not isinstance(pattern, str) or not 0 < len(pattern) <= 1000:
        raise UserError(f"{path}: its split pattern is no text, or too long")
    tokens = in_order(ranks, bytes, 0, path)
    names = in_order(special, str, len(tokens), path)
    if [name for name in names if name in SPECIAL_TOKENS] != list(SPECIAL_TOKENS):
        raise UserError(f"{path}: its special tokens are {' '.join(names)[:200]}, not {' '.join(SPECIAL_TOKENS)}")
    try:
        tokenizer = RustBPETokenizer(pattern, tokens, names)
        tokenizer.check_pattern()
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    return tokenizer


def in_order(ids: Any, kind: type, first: int, path: Path) -> list[Any]:
    """The keys of a mapping from `kind` to ids, which count from `first`."""
    if not isinstance(ids, dict) or not all(type(key) is kind and type(i) is int for key, i in ids.items()):
        raise UserError(f"{path}: its vocabulary is no mapping from tokens to ids")
    ordered = sorted(ids, key=ids.__getitem__)
    if [ids[key] for key in ordered] != list(range(first, first + len(ids))):
        raise UserError(f"{path}: its ids do not count from {first:,}, special tokens after the merges")
    if kind is str and not all(len(key) <= 100 and key.isprintable() for key in ordered):
        raise UserError(f"{path}: a special token's name is not printable, or too long")
    return ordered
