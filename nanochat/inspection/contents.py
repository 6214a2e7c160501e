"""Contents: what a folder or a file with a model holds, from its headers and small files alone.

read_contents.py makes them; describe.py and differences.py say what is in them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint.tensor_file import read_entries, read_tensor
from nanochat.common import UserError
from nanochat.gpt_config import GPTConfig
from nanochat.inspection.tokenizer_facts import TokenizerFacts

MAX_FILES = 10_000  # of a folder that are looked at


@dataclass
class TensorFacts:
    """One tensor of a file. `read` reads it, and nothing else, into memory."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors files name it: F32, BF16
    read: Callable[[], torch.Tensor] = field(repr=False)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Contents:
    """A model, or a part of one, with what its files say about it."""

    kind: str  # a key of KINDS
    path: Path
    config: GPTConfig | None = None  # of a network that nanochat can build
    settings: dict[str, Any] = field(default_factory=dict)  # config.json of another program's model
    meta: dict[str, Any] = field(default_factory=dict)  # as in a checkpoint's meta.json
    stage: str = ""  # base, sft or rl
    run: str = ""
    steps: list[int] = field(default_factory=list)  # of the run, ascending
    saved_at: float | None = None  # seconds since 1970
    tensors: dict[str, TensorFacts] = field(default_factory=dict)  # by GPT's names if there is a config
    tokenizer: TokenizerFacts | None = None
    files: dict[str, int] = field(default_factory=dict)  # bytes by name
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 by name, as recorded
    verified: bool = False  # whether all files were hashed and agree
    route: str = ""  # of a Hugging Face folder that nanochat wrote or can read: class or code
    notes: list[str] = field(default_factory=list)


KINDS = {
    "checkpoint": "nanochat checkpoint",
    "huggingface": "Hugging Face folder",
    "published": "published nanochat checkpoint",
    "weights": "file of weights",
    "tokenizer": "tokenizer",
}


def tensors_of(path: Path, follow_links: bool = False) -> dict[str, TensorFacts]:
    """The tensors of a safetensors file."""
    return {
        name: TensorFacts(tuple(entry["shape"]), entry["dtype"], partial(read_tensor, path, name, follow_links))
        for name, entry in read_entries(path, follow_links).items()
    }


def sizes_of(paths: list[Path]) -> dict[str, int]:
    """Bytes of those that are files, by name; links count as what they point to."""
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, sorted, without hidden ones. Raises UserError if there are too many to look at."""
    found = []
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.is_file():
            found.append(path)
        if len(found) > MAX_FILES:
            raise UserError(f"{folder} holds more than {MAX_FILES:,} files; name one of them")
    return sorted(found)


def weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder."""
    return [file for file in files_in(folder) if file.suffix in (".safetensors", ".gguf", ".onnx")]
