"""Checkpoints that are complete or not there: written aside, checksummed, renamed last; verified when read.

<base>/{base,chatsft,chatrl}_checkpoints/TAG/000120/
    model.safetensors  optimizer.safetensors  loader.safetensors  rng.safetensors
    meta.json  tokenizer.json  manifest.json (see checkpoint/folder.py, which also survives the crashes)

Of N processes each writes a share of the optimizer's and the loader's state: optimizer-00001-of-0000N.safetensors
and so on. Any number of processes can go on from any of them.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    VERSION,
    DamagedCheckpoint,
    check_hash,
    check_size,
    check_version,
    file_record,
    fsync,
    list_steps,
    new_step,
    read_manifest,
    step_path,
    verify_file,
    write_manifest,
    written_ns,
)
from nanochat.checkpoint.optimizer_shards import parse_piece
from nanochat.checkpoint.tensor_file import read_tensors, tensor_chunks, write_file
from nanochat.common import UserError, get_base_dir, read_json, warn
from nanochat.distributed.collectives import BackgroundGroup
from nanochat.distributed.rank_checks import non_finite
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

CHECKPOINT_FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


# ---------------------------------------------------------------------------------------------------
# Where checkpoints are


def run_dir(base_dir: Path, source: str, tag: str) -> Path:
    """The folder of one run's checkpoints. Raises UserError for an unknown source or a tag that is no folder name."""
    if source not in CHECKPOINT_FOLDERS:
        raise UserError(f"the source must be one of {', '.join(CHECKPOINT_FOLDERS)}, got {source!r}")
    if not tag or tag.startswith(".") or re.search(r"[/\\\0\ud800-\udfff]", tag):
        raise UserError(f"the model tag must be a plain folder name (no slashes, no leading dot), got {tag!r}")
    if len(tag.encode()) > 200:
        raise UserError(f"the model tag is too long for a folder's name: {tag[:40]}…")
    return Path(base_dir) / CHECKPOINT_FOLDERS[source] / tag


def find_run(base_dir: Path, source: str, tag: str | None) -> Path:
    """The run `tag` of `source`; without a tag the most recently written one. Only runs with a complete step count.

    Raises UserError that names the runs there are.
    """
    folder = run_dir(base_dir, source, tag or "any").parent
    written = {}  # run -> when its last complete step was written
    for run in sorted(folder.iterdir()) if folder.is_dir() else ():
        if run.is_dir() and (steps := list_steps(run)):
            written[run] = max(written_ns(step_path(run, step)) for step in steps)
    if tag is not None and folder / tag in written:
        return folder / tag
    if tag is None and written:
        return max(written, key=lambda run: written[run])
    stage = {"base": "base_train", "sft": "chat_sft", "rl": "chat_rl"}[source]
    none = f"there is none yet: make one with `python -m scripts.{stage}`"
    there = f"there are: {', '.join(run.name for run in written)}" if written else none
    wanted = f"no complete {source} checkpoint" + (f" with the model tag {tag!r}" if tag else "")
    raise UserError(f"{wanted} in {folder}; {there}")


def has_run(base_dir: Path, source: str, tag: str) -> bool:
    """Whether the run has a complete step."""
    return bool(list_steps(run_dir(base_dir, source, tag)))


# ---------------------------------------------------------------------------------------------------
# Writing


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
    """Write step `step` of `run` and return its folder; any thread may, on tensors that nobody changes meanwhile.

    `meta` holds "model_config" and whatever the caller wants back. Tensors may be views, strided, on any device.
    A step saved before is replaced once the new one is complete; then, with `keep_last` N > 0, steps older than
    the newest N are deleted. Raises OSError (disk full, no permission) with everything older as it was.

    Of several ranks all call it, into a folder that all see. Each writes its own share of the optimizer's and the
    loader's state, the first one the rest, and the manifest once all shares are on the disk. What fails on one
    fails on all.
    """
    assert step >= 0 and "model_config" in meta and meta.get("tokenizer_hash", tokenizer.hash) == tokenizer.hash
    run, group = Path(run), group or BackgroundGroup()
    folder, main = step_path(run, step, "new"), group.rank == 0
    own: dict[str, Mapping[str, Any] | None] = {
        share_name("optimizer", group): optimizer_state and optimizer_state[0],
        share_name("loader", group): loader_state,
    }
    if main:
        own |= {"model": model_state, "rng": rng_state}

    def write_share() -> dict[str, Any]:
        files = {
            f"{name}.safetensors": write_file(folder / f"{name}.safetensors", tensor_chunks(tensors))
            for name, tensors in own.items()
            if tensors is not None
        }
        return {"files": files, "optimizer_steps": optimizer_state and optimizer_state[1]}

    with contextlib.ExitStack() as stack:
        group.run_on_all(
            "opening a checkpoint", lambda: main and not stack.enter_context(new_step(run, step, keep_last))
        )
        shares = group.run_on_all("writing a checkpoint", write_share)

        def complete() -> None:
            if main:
                write_rest(folder, step, meta, tokenizer, shares)
                stack.close()  # the step appears

        group.run_on_all("completing a checkpoint", complete)
    return step_path(run, step)


def share_name(stem: str, group: BackgroundGroup) -> str:
    """`optimizer`, or `optimizer-00002-of-00004` where there are four processes."""
    return stem if group.world_size == 1 else f"{stem}-{group.rank + 1:05d}-of-{group.world_size:05d}"


def write_rest(folder: Path, step: int, meta: dict[str, Any], tokenizer: Any, shares: list[dict[str, Any]]) -> None:
    """What a step holds once, and last its manifest; `shares` tells of the files that are there."""
    meta = {**meta, "format": FORMAT, "version": VERSION, "step": step, "tokenizer_hash": tokenizer.hash}
    if shares[0]["optimizer_steps"] is not None:
        meta["optimizer_steps"] = {name: count for s in shares for name, count in s["optimizer_steps"].items()}
    files = {name: record for share in shares for name, record in share["files"].items()}
    text = json.dumps(meta, ensure_ascii=False, indent=1) + "\n"
    files["meta.json"] = write_file(folder / "meta.json", [text.encode()])
    tokenizer.save(folder)
    fsync(folder / "tokenizer.json")
    files["tokenizer.json"] = file_record(folder / "tokenizer.json")
    write_manifest(folder, files)


# ---------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Checkpoint:
    """One complete step. The methods read their file when called and compare its hash with the manifest."""

    path: Path
    step: int
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(repr=False)  # name -> {"sha256", "bytes"}

    def model_state(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """The model's parameters by name."""
        return self._tensors("model.safetensors", device)

    def optimizer_pieces(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state as its processes named it (see MuonAdamW.named_state), one file in memory at a time."""
        for name in self._shares("optimizer"):
            yield from self._tensors(name).items()

    def optimizer_state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Tensors keyed "<state>.<parameter name>", and the step count per parameter name.

        Of a tensor that was split among processes, the whole of its flat form.
        """
        parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for piece, tensor in self.optimizer_pieces():
            name, start = parse_piece(piece)
            parts.setdefault(name, []).append((start, tensor))
        tensors = {}
        for name, pieces in parts.items():
            in_order = [tensor for _, tensor in sorted(pieces, key=itemgetter(0))]
            tensors[name] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
        return tensors, self.meta["optimizer_steps"]

    def loader_state(self) -> dict[str, np.ndarray]:
        """The data loader's position, of all processes."""
        shares = [self._tensors(name) for name in self._shares("loader")]
        return {name: tensor.numpy() for share in shares for name, tensor in share.items()}

    def rng_state(self) -> dict[str, torch.Tensor]:
        """The random generators' states."""
        return self._tensors("rng.safetensors")

    def tokenizer(self) -> RustBPETokenizer:
        """The tokenizer the model was trained with. Raises UserError if it is another one."""
        verify_file(self.path, "tokenizer.json", self.files)
        tokenizer = RustBPETokenizer.from_directory(self.path)
        if tokenizer.hash != self.meta["tokenizer_hash"]:
            raise UserError(
                f"the tokenizer in {self.path} is not the one its model was trained with "
                f"(hash {tokenizer.hash[:12]}, expected {self.meta['tokenizer_hash'][:12]}); use another checkpoint"
            )
        return tokenizer

    def _shares(self, stem: str) -> list[str]:
        """The files of something that each process saved its share of."""
        shares = [name for name in self.files if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name)]
        return sorted(shares) or [f"{stem}.safetensors"]

    def _tensors(self, name: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        if name not in self.files:
            raise UserError(f"{self.path} was saved without {name}; choose another step or start fresh")
        check_size(self.path, name, self.files)
        try:
            tensors, found = read_tensors(self.path / name, device)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DamagedCheckpoint(f"{self.path / name} is damaged ({error}); choose another step") from error
        check_hash(self.path, name, self.files, found)
        return tensors


def open_checkpoint(run: Path, step: int | None = None, verify: bool = True) -> Checkpoint:
    """Step `step` of `run`, or None for the latest good one: damaged ones are skipped with a warning.

    `verify` hashes every file now; without it only sizes and meta.json are checked, the rest when it is read.
    Raises UserError: no such run or step (naming what exists), damage (naming the file), unknown version.
    """
    return _open(Path(run), step, None if verify else ())


def _open(run: Path, step: int | None, verify: Collection[str] | None) -> Checkpoint:
    """open_checkpoint that hashes only the files named in `verify` (None: all)."""
    steps = list_steps(run)
    if step is not None and step in steps:
        return _open_step(run, step, verify)
    if step is not None or not steps:
        there = f"it has: {', '.join(str(s) for s in steps)}" if steps else "it has no complete step"
        what = f"step {step}" if step is not None else "a checkpoint"
        if step is not None and step_path(run, step).is_dir():
            raise DamagedCheckpoint(f"{step_path(run, step)} has no {MANIFEST}, so it was never completed; {there}")
        raise UserError(f"{run} does not have {what}: {there if run.is_dir() else 'there is no such folder'}")
    damage = []
    for candidate in reversed(steps):
        try:
            return _open_step(run, candidate, verify)
        except DamagedCheckpoint as error:
            warn(f"skipping step {candidate}: {error}")
            damage.append(error)
    raise DamagedCheckpoint(f"every checkpoint in {run} is damaged; the latest: {damage[0]}")


def _open_step(run: Path, step: int, verify: Collection[str] | None) -> Checkpoint:
    path = step_path(run, step)
    files = read_manifest(path)["files"]
    for name in files:
        check_size(path, name, files)
        if verify is None or name in verify or name == "meta.json":
            verify_file(path, name, files)
    meta = read_json(path / "meta.json")
    check_version(path / "meta.json", meta)
    return Checkpoint(path, step, meta, files)


# ---------------------------------------------------------------------------------------------------
# Into a model


def load_model(
    source: str,
    runtime_or_device: Runtime | torch.device | str,
    *,
    base_dir: Path | None = None,
    model_tag: str | None = None,
    step: int | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """The model in eval mode, its tokenizer and its meta. No tag: the latest run; no step: its latest good one.

    Raises UserError as open_checkpoint and load_model_state do.
    """
    device = runtime_or_device.device if isinstance(runtime_or_device, Runtime) else torch.device(runtime_or_device)
    run = find_run(base_dir or get_base_dir(), source, model_tag)
    checkpoint = _open(run, step, ("model.safetensors", "tokenizer.json"))
    model = GPT.allocate(GPTConfig.from_dict(checkpoint.meta["model_config"]), device, compute_dtype)
    model.init_rotary()  # computed, never saved
    load_model_state(model, checkpoint.model_state(), checkpoint.path)
    return model.eval(), checkpoint.tokenizer(), checkpoint.meta


def load_model_state(model: torch.nn.Module, state: dict[str, torch.Tensor], where: Path | str) -> None:
    """Copy `state` into every parameter of `model`. Raises UserError if one is missing, extra, of another shape, or
    holds what is no number."""
    parameters = dict(model.named_parameters())
    problems = [f"{name} is missing" for name in parameters if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in parameters]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model's has {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in state and state[name].shape != p.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights in {where} do not fit the model: {'; '.join(problems[:3])}{more}; "
            "was it saved with other sizes?"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])
    if spoilt := non_finite(model):
        raise UserError(
            f"the weights in {where} are not finite ({', '.join(spoilt[:3])}): that run diverged, or the "
            "file was made by something that did; take an earlier step, if there is one"
        )
