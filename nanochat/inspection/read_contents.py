"""Read Contents from whatever is at a path: no weights are loaded.

Checkpoints here (a run's folder or one step's), Hugging Face folders, published nanochat checkpoints, single files of
weights, tokenizers. All of it may be hostile: nothing is executed, and no path that a file names is followed.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folder import list_steps, run_and_step
from nanochat.checkpoint.manifest import MANIFEST
from nanochat.checkpoint.runs import STAGE_OF_FOLDER
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError
from nanochat.common.files import open_file
from nanochat.formats.hf_folder import read_about
from nanochat.inspection.contents import Contents, files_in, sizes_of, tensors_of, weights_in
from nanochat.inspection.contents_hf import is_huggingface, read_huggingface, use_about
from nanochat.inspection.contents_published import is_published, read_published
from nanochat.inspection.tokenizer_facts import read_tokenizer_facts


def read_contents(path: Path, step: int = -1, verify: bool = False) -> Contents:
    """What is at `path`; of a run's folder its step `step`, or the latest good one for -1.

    `verify` hashes all files that have a recorded hash. Raises UserError if nothing known is there, or it is damaged.
    """
    if path.is_dir():
        for belongs, read in FOLDERS:
            if belongs(path):
                if step >= 0 and read not in (read_checkpoint, read_published):
                    raise UserError(f"{path} has no steps to choose from; leave --step out")
                if verify and read is not read_checkpoint:
                    raise UserError(f"{path} has no recorded hashes to verify; leave --verify out")
                return read(path, step, verify)
        raise UserError(
            f"{path} holds no model that is known here: no steps of a run, config.json, model_*.pt, weights "
            "(safetensors, gguf, onnx) or tokenizer.json"
        )
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if step >= 0:
        raise UserError(f"{path} is a file and has no steps to choose from; leave --step out")
    if verify:
        raise UserError(f"{path} is a file and has no recorded hash to verify; leave --verify out")
    if path.name == "tokenizer.json":
        return read_tokenizer_folder(path)
    if path.suffix in (".safetensors", ".gguf", ".onnx"):
        return read_weights(path)
    if is_published(path):
        return read_published(path, step)
    raise UserError(
        f"{path} is no file that is known here: expected .safetensors, .gguf, .onnx, tokenizer.json, model_*.pt or "
        "meta_*.json"
    )


# ---------------------------------------------------------------------------------------------------
# Checkpoints of ours


def is_run(path: Path) -> bool:
    """A run's folder, or one step's; also of one whose manifest is missing."""
    named = re.fullmatch(r"\d{6,}", path.name) and (path / "meta.json").exists()
    return (path / MANIFEST).exists() or bool(named) or bool(list_steps(path))


def read_checkpoint(path: Path, step: int, verify: bool) -> Contents:
    """A step: the folder itself, or one of a run's."""
    run, number = run_and_step(path, step)
    checkpoint = open_checkpoint(run, number, verify)
    meta, manifest = checkpoint.meta, checkpoint.manifest
    found = Contents(
        "checkpoint",
        checkpoint.path,
        meta=meta,
        stage=str(meta.get("stage") or STAGE_OF_FOLDER.get(run.parent.name, "")),
        run=run.name,
        steps=list_steps(run),
        saved_at=(checkpoint.path / MANIFEST).stat().st_mtime,
        files={name: record["bytes"] for name, record in manifest.files.items()},
        hashes={name: record["sha256"] for name, record in manifest.files.items()},
        verified=verify,
    )
    if "model.safetensors" in manifest.files:
        found.config = checkpoint.model_config()
        found.tensors = tensors_of(checkpoint.path / "model.safetensors")
    if "tokenizer.json" in manifest.files:
        found.tokenizer = read_tokenizer_facts(checkpoint.path)
    return found


# ---------------------------------------------------------------------------------------------------
# Single files


def read_weights(path: Path) -> Contents:
    """A single file: safetensors with its tensors, gguf and onnx by their size."""
    found = Contents("weights", path, files=sizes_of([path]))
    if path.suffix == ".safetensors":
        found.tensors = tensors_of(path, follow_links=True)
    elif path.suffix == ".gguf":
        with open_file(path) as file:
            head = file.read(24)
        if head[:4] != b"GGUF" or len(head) < 24:
            raise UserError(f"{path} is not a GGUF file")
        version, count = (int.from_bytes(head[a:b], "little") for a, b in ((4, 8), (8, 16)))
        found.notes.append(f"GGUF version {version}, {count:,} tensors")
    beside = path.parent.parent if path.parent.name == "onnx" else path.parent
    if path.suffix != ".safetensors" and (about := read_about(beside)):
        use_about(found, about)
    return found


def read_tokenizer_folder(path: Path, step: int = -1, verify: bool = False) -> Contents:
    """tokenizer.json, or the folder with it."""
    file = path if path.is_file() else path / "tokenizer.json"
    return Contents("tokenizer", file, tokenizer=read_tokenizer_facts(file.parent), files=sizes_of([file]))


def read_only_file(path: Path, step: int = -1, verify: bool = False) -> Contents:
    """The one file of weights in a folder without a config."""
    weights = weights_in(path)
    if len(weights) > 1:
        raise UserError(f"{path} holds several files of weights; name one: {', '.join(p.name for p in weights[:5])}")
    return read_weights(weights[0])


FOLDERS: list[tuple[Callable[[Path], Any], Callable[[Path, int, bool], Contents]]] = [
    (is_run, read_checkpoint),
    (is_huggingface, read_huggingface),
    (lambda path: any(map(is_published, files_in(path))), read_published),
    (weights_in, read_only_file),
    (lambda path: (path / "tokenizer.json").exists(), read_tokenizer_folder),
]
"""What a folder is, in the order asked, and its reader."""
