"""What a checkpoint holds, and how it is opened and loaded. How all ranks save one: nanochat/checkpoint/saving.py.

<base>/{base,chatsft,chatrl}_checkpoints/TAG/000120/
    model.safetensors  optimizer.safetensors  loader.safetensors  rng.safetensors
    meta.json  tokenizer.json  manifest.json

With N > 1 ranks each writes its share of the optimizer's and the loader's state: optimizer-00001-of-0000N.safetensors
and so on. A run can be resumed at any world size from any of them. A step is complete or does not exist, and every file
is verified when it is read: nanochat/checkpoint/.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nanochat.checkpoint.folder import list_steps, step_path
from nanochat.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, check_step, damaged
from nanochat.checkpoint.meta import Meta
from nanochat.checkpoint.runs import find_run
from nanochat.checkpoint.tensor_file import read_shapes, read_tensors
from nanochat.common import UserError, get_base_dir, warn
from nanochat.distributed.rank_checks import non_finite
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

Result = TypeVar("Result")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Checkpoint:
    """One complete step. The methods read their files when called, and verify them against the manifest."""

    path: Path
    step: int
    meta: dict[str, Any]  # a Meta
    manifest: Manifest = field(repr=False)

    def model_config(self) -> GPTConfig:
        """The network, checked against the shapes of the saved weights before there is memory for any."""
        config = GPTConfig.from_dict(self.meta["model_config"], self.path / "meta.json")
        expected = {name: tuple(p.shape) for name, p in GPT.allocate(config, "meta", torch.float32).named_parameters()}
        self._check("model.safetensors")
        with damaged():
            found = {name: tuple(shape) for name, shape in read_shapes(self.path / "model.safetensors").items()}
        check_shapes(expected, found, self.path)
        return config

    def model_state(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """The model's parameters by name."""
        return self._read("model.safetensors", device)

    def optimizer_state(self) -> tuple[Iterator[tuple[str, torch.Tensor]], dict[str, int]]:
        """The optimizer's state as its ranks named it, and step counts: arguments of MuonAdamW.load_named_state.

        The tensors come one file at a time, so that only one is in memory.
        """
        tensors = (item for name in self._shares("optimizer") for item in self._read(name).items())
        return tensors, self.meta.get("optimizer_steps", {})

    def loader_state(self) -> dict[str, np.ndarray]:
        """The data loader's position, of all ranks."""
        shares = [self._read(name) for name in self._shares("loader")]
        with damaged():
            try:
                return {name: tensor.numpy() for share in shares for name, tensor in share.items()}
            except TypeError as error:  # bfloat16, say
                raise UserError(f"{self.path} is damaged: the loader's state is no array ({error})") from error

    def rng_state(self) -> dict[str, torch.Tensor]:
        """The random generators' states."""
        return self._read("rng.safetensors")

    def tokenizer(self) -> RustBPETokenizer:
        """The tokenizer the model was trained with. Raises UserError if the file holds another one."""
        self._check("tokenizer.json")
        self.manifest.check_hash("tokenizer.json")
        tokenizer = RustBPETokenizer.from_directory(self.path)
        if tokenizer.hash != self.meta["tokenizer_hash"]:
            raise UserError(
                f"the tokenizer in {self.path} is not the one its model was trained with "
                f"(hash {tokenizer.hash[:12]}, expected {self.meta['tokenizer_hash'][:12]}); use another checkpoint"
            )
        size = tokenizer.get_vocab_size()
        if self.meta["model_config"].get("vocab_size", size) != size:
            raise UserError(
                f"the tokenizer in {self.path} has {size:,} tokens, its model "
                f"{self.meta['model_config']['vocab_size']:,}; use another checkpoint"
            )
        return tokenizer

    def _shares(self, stem: str) -> list[str]:
        """The files of a state of which each rank saved its share."""
        shares = [name for name in self.manifest.files if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name)]
        return sorted(shares) or [f"{stem}.safetensors"]

    def _check(self, name: str) -> None:
        """Raise UserError unless the step has this file, in its size."""
        if name not in self.manifest.files:
            raise UserError(f"{self.path} was saved without {name}; choose another step or start fresh")
        self.manifest.check_size(name)

    def _read(self, name: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        self._check(name)
        with damaged():
            tensors, sha256 = read_tensors(self.path / name, device)
        self.manifest.check_hash(name, sha256)
        return tensors


def open_checkpoint(run: Path, step: int | None = None, verify: bool | Collection[str] = True) -> Checkpoint:
    """Step `step` of `run`, or None for the latest good one: damaged ones are skipped with a warning.

    `verify` says which files to hash now: all, none, or those named; the others are when they are read. Sizes and
    meta.json are always checked. Raises UserError: no such run or step (naming what exists), damage (naming the file),
    unknown version.
    """
    run, steps = Path(run), list_steps(run)
    damage: list[DamagedCheckpoint] = []
    for found in [known for known in reversed(steps) if step in (None, known)]:
        try:
            return _open_step(run, found, verify)
        except UserError as error:
            if step is not None:
                raise
            if not step_path(run, found).exists():  # the run deleted it meanwhile, and has saved a newer one
                return open_checkpoint(run, None, verify)
            if not isinstance(error, DamagedCheckpoint):
                raise
            warn(f"skipping step {found}: {error}")
            damage.append(error)
    if damage:
        raise DamagedCheckpoint(f"every checkpoint in {run} is damaged; the latest: {damage[0]}")
    existing = f"it has: {', '.join(map(str, steps))}" if steps else "it has no complete step"
    if step is not None and step_path(run, step).is_dir():
        raise DamagedCheckpoint(f"{step_path(run, step)} has no {MANIFEST}, so it was never completed; {existing}")
    requested = f"step {step}" if step is not None else "a checkpoint"
    raise UserError(f"{run} does not have {requested}: {existing if run.is_dir() else 'there is no such folder'}")


def read_checkpoint(
    run: Path,
    step: int | None,
    read: Callable[[Checkpoint], Result],
    verify: bool | Collection[str],
    runtime: Runtime,
) -> Result:
    """read(checkpoint) of step `step` of `run`, or None for the latest good one, the same on all ranks. Collective.

    If a run in progress deletes that one meanwhile (--keep-last), `read` is called again with the newer one. `verify`
    and errors are as in open_checkpoint.
    """
    while True:
        chosen = runtime.broadcast(lambda: open_checkpoint(run, step, verify).step, "choosing a checkpoint")
        result = None
        try:
            result = read(open_checkpoint(run, chosen, verify=False))
        except UserError:
            if step is not None or step_path(run, chosen).exists():
                raise
        if not runtime.all_reduce_max(float(result is None), "reading a checkpoint"):
            assert result is not None
            return result


def _open_step(run: Path, step: int, verify: bool | Collection[str]) -> Checkpoint:
    path = step_path(run, step)
    manifest = Manifest.read(path)
    for name in {**manifest.files, "meta.json": None}:
        manifest.check_size(name)
        if name == "meta.json" or (verify if isinstance(verify, bool) else name in verify):
            manifest.check_hash(name)
    meta = Meta.read(path / "meta.json")
    check_step(path, meta["step"])
    return Checkpoint(path, step, meta, manifest)


# ---------------------------------------------------------------------------------------------------
# Into a model


def load_model(
    source: str,
    runtime_or_device: Runtime | torch.device | str,
    *,
    base_dir: Path | None = None,
    model_tag: str = "",
    step: int = -1,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """Load (model in eval mode, tokenizer, meta): of the latest run without a tag, its latest good step for -1.

    With a Runtime, which has its own dtype, collective: all ranks load the same step. meta gets "model_tag", and as
    "weights" the hash of the parameters' file. Raises UserError as find_run, open_checkpoint and load_model_state do.
    """
    runtime = runtime_or_device
    if not isinstance(runtime, Runtime):
        runtime = Runtime(torch.device(runtime), compute_dtype, "", seed=0)

    def read(checkpoint: Checkpoint) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
        model = GPT.allocate(checkpoint.model_config(), runtime.device, runtime.dtype)
        model.init_rotary()  # computed, never saved
        load_model_state(model, checkpoint.model_state(), checkpoint.path)
        checkpoint.meta |= {"model_tag": run.name, "weights": checkpoint.manifest.files["model.safetensors"]["sha256"]}
        return model.eval(), checkpoint.tokenizer(), checkpoint.meta

    run = find_run(base_dir or get_base_dir(to_write=False), source, model_tag)
    return read_checkpoint(run, None if step < 0 else step, read, ("model.safetensors", "tokenizer.json"), runtime)


def load_model_state(model: torch.nn.Module, state: dict[str, torch.Tensor], where: Path | str) -> None:
    """Copy `state` into every parameter of `model`. `where` names it in errors.

    Raises UserError if a parameter is missing, extra, of another shape, or not finite.
    """
    parameters = dict(model.named_parameters())
    expected, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (parameters, state))
    check_shapes(expected, found, where)
    if other := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise UserError(f"the weights in {where} are not floating-point numbers: {other[0]}")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])
    if bad := non_finite(model):
        raise UserError(
            f"the weights in {where} are not finite ({', '.join(bad[:3])}): that run diverged; "
            "use an earlier step, if there is one"
        )


def check_shapes(expected: Shapes, found: Shapes, where: Path | str) -> None:
    """Raise UserError if a parameter is missing in `found`, extra, or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, the model's has {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights in {where} do not fit the model: {'; '.join(problems[:3])}{more}; "
            "they were saved with another model config"
        )
