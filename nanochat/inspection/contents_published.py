"""Contents of a published nanochat checkpoint: model_000100.pt, meta_000100.json and tokenizer.pkl."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint.tensor_file import DTYPE_NAMES, readable
from nanochat.common import UserError
from nanochat.common.files import open_file
from nanochat.formats.published import TABLES, find_published, infer_config, parameter_name, portable_meta, read_meta
from nanochat.formats.read_model import find_tokenizer, read_tokenizer, tokenizer_places
from nanochat.formats.torch_file import TorchFile
from nanochat.inspection.contents import Contents, TensorFacts, sizes_of
from nanochat.inspection.tokenizer_facts import facts_of

FILES = re.compile(r"(?:model_\d{1,9}\.pt|meta_\d{1,9}\.json)")


def is_published(path: Path) -> bool:
    return bool(FILES.fullmatch(path.name))


def read_published(path: Path, step: int = -1, verify: bool = False) -> Contents:
    """Of the folder, or of one of the two files. `verify` changes nothing: no hashes are recorded.

    Raises UserError for files that are something else, or lie about their sizes.
    """
    if path.suffix == ".json":
        path = path.with_name(path.name.replace("meta_", "model_").replace(".json", ".pt"))
    found = find_published(path, step)
    if not found or not found.model.exists():
        raise UserError(f"{path} does not exist: meta_*.json needs its model_*.pt beside it")
    meta = read_meta(found.meta)
    tensors = torch_tensors(found.model)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config, notes = infer_config(meta["model_config"], shapes, {})
    result = Contents(
        "published",
        found.model,
        config=config,
        meta={**portable_meta(found, meta, config, notes), "user_config": meta.get("user_config", {})},
        stage=found.stage or "",
        run=found.model.absolute().parent.name if found.stage else "",
        saved_at=found.model.stat().st_mtime,
        tensors=tensors,
        files=sizes_of([found.model, found.meta]),
        notes=notes,
    )
    result.meta["progress"] = progress(result.meta)
    if file := find_tokenizer(tokenizer_places(found)):
        result.tokenizer = facts_of(read_tokenizer(file))
    else:
        notes.append("its tokenizer is not beside it")
    return result


def progress(meta: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint here has it: steps, tokens and bits per byte."""
    values = {"step": meta["step"], "val_bpb": meta.get("val_bpb")}
    if batch := meta.get("total_batch_tokens"):
        values["tokens"] = meta["step"] * batch
    return values


def torch_tensors(path: Path) -> dict[str, TensorFacts]:
    """The parameters in a file of torch.save, by GPT's names."""
    with open_file(path) as file, readable(path):
        saved = TorchFile(path, file).tensors
    return {
        parameter_name(name): TensorFacts(
            tensor.shape, DTYPE_NAMES[tensor.dtype], partial(read_torch_tensor, path, name)
        )
        for name, tensor in saved.items()
        if parameter_name(name) not in TABLES
    }


def read_torch_tensor(path: Path, name: str) -> torch.Tensor:
    with open_file(path) as file, readable(path):
        return TorchFile(path, file).read(name)
