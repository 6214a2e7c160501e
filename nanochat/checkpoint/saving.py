"""How all ranks write one checkpoint together."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.checkpoint.folder import new_step, step_path
from nanochat.checkpoint.manifest import FORMAT, VERSION, Manifest, file_record
from nanochat.checkpoint.tensor_file import tensor_chunks, write_file
from nanochat.common import fsync
from nanochat.distributed.collectives import BackgroundGroup


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model_state: dict[str, torch.Tensor],
    meta: dict[str, Any],
    tokenizer: Any,
    optimizer_state: tuple[dict[str, torch.Tensor], dict[str, int]] | None = None,
    loader_state: dict[str, np.ndarray] | None = None,
    rng_state: dict[str, torch.Tensor] | None = None,
    keep_last: int = 0,
    group: BackgroundGroup | None = None,
) -> Path:
    """Write step `step` of `run` and return its folder. Collective: every rank of `group` must call it.

    `meta` holds "model_config" and anything else the caller wants back. Tensors may be views, strided, on any device;
    they must not change meanwhile. A step saved before is replaced once the new one is complete; then, with
    `keep_last` N > 0, steps older than the newest N are deleted. Raises OSError (disk full, no permission) with
    everything older unchanged; a failure on one rank is raised on all.

    `run` is one folder that all ranks see. Each rank writes its share of the optimizer's and the loader's state, rank 0
    the rest, and the manifest once all shares are on the disk.
    """
    assert step >= 0 and "model_config" in meta and meta.get("tokenizer_hash", tokenizer.hash) == tokenizer.hash
    run, group = Path(run), group or BackgroundGroup()
    folder = step_path(run, step, "new")
    share = "" if group.world_size == 1 else f"-{group.rank + 1:05d}-of-{group.world_size:05d}"
    own: dict[str, Mapping[str, Any] | None] = {
        f"optimizer{share}": optimizer_state and optimizer_state[0],
        f"loader{share}": loader_state,
    }
    if group.rank == 0:
        own |= {"model": model_state, "rng": rng_state}

    with contextlib.ExitStack() as opened:

        def open_folder() -> None:
            if group.rank == 0:
                opened.enter_context(new_step(run, step, keep_last))

        def complete() -> None:
            if group.rank == 0:
                _write_rest(folder, step, meta, tokenizer, shares)
                opened.close()  # publishes the step

        group.run_on_all("opening a checkpoint", open_folder)
        steps = optimizer_state and optimizer_state[1]
        shares = group.run_on_all(
            "writing a checkpoint", lambda: {"files": _write_tensors(folder, own), "optimizer_steps": steps}
        )
        group.run_on_all("completing a checkpoint", complete)
    return step_path(run, step)


def _write_tensors(folder: Path, states: dict[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Write each state that is not None to a file; returns the files' records for the manifest."""
    names = {f"{name}.safetensors": tensors for name, tensors in states.items() if tensors is not None}
    return {name: write_file(folder / name, tensor_chunks(tensors)) for name, tensors in names.items()}


def _write_rest(folder: Path, step: int, meta: dict[str, Any], tokenizer: Any, shares: list[dict[str, Any]]) -> None:
    """Write what a step holds once, and last its manifest. `shares` are the ranks' answers in save_checkpoint."""
    meta = {**meta, "format": FORMAT, "version": VERSION, "step": step, "tokenizer_hash": tokenizer.hash}
    if shares[0]["optimizer_steps"] is not None:
        meta["optimizer_steps"] = {name: count for s in shares for name, count in s["optimizer_steps"].items()}
    files = {name: record for share in shares for name, record in share["files"].items()}
    text = json.dumps(meta, ensure_ascii=False, indent=1) + "\n"
    files["meta.json"] = write_file(folder / "meta.json", [text.encode()])
    tokenizer.save(folder)
    fsync(folder / "tokenizer.json")
    files["tokenizer.json"] = file_record(folder / "tokenizer.json")
    Manifest(folder, files, step).write()
