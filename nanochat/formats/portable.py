"""PortableModel: a trained model without a format. Every writer takes one, every reader returns one."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.formats.same_network import check_network
from nanochat.gpt_config import GPTConfig
from nanochat.tokenizer import RustBPETokenizer


@dataclass
class PortableModel:
    """Weights, tokenizer, and what is known about their training."""

    config: GPTConfig
    state: dict[str, torch.Tensor]  # float32, on the CPU, by the names of GPT's parameters
    tokenizer: RustBPETokenizer
    source: str  # the stage: base, sft or rl
    meta: dict[str, Any]  # as a checkpoint's meta.json has it; of an imported model, what its files said

    @property
    def is_chat(self) -> bool:
        """Whether it was finetuned on conversations."""
        return self.source != "base"


def part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside a meta; empty if there is none."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def read_run(base_dir: Path, source: str, model_tag: str = "", step: int = -1) -> PortableModel:
    """The model of a run here; of the latest run without a tag, at its last step for -1. Raises UserError, also if its
    network is not the one that exports compute."""
    model, tokenizer, meta = load_model(source, "cpu", base_dir=base_dir, model_tag=model_tag, step=step)
    check_network(model.config)
    state = {name: p.detach() for name, p in model.named_parameters()}
    return PortableModel(model.config, state, tokenizer, source, dict(meta))


def check_new(out: Path, is_file: bool = False) -> None:
    """Raise UserError if `out` exists: nothing is overwritten. A folder may be there if it is empty."""
    if out.is_symlink() or (out.exists() and (is_file or not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} exists; choose another {'file' if is_file else 'folder'}, or delete it first")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{out} cannot be made: {above} is a file, not a folder")
    if out.absolute() == Path.cwd():  # it is replaced: this program and the shell would be in a folder that is gone
        raise UserError(f"{out} is the current folder; name one inside it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` when the block ends, and disappears if it raises.

    Raises UserError if `out` exists and is not an empty folder, as nothing is overwritten, and while another program
    writes it.
    """
    out = Path(os.path.abspath(out))  # so that it has a name and a parent
    check_new(out)
    unfinished = out.parent / f".{out.name}.export"
    with only_writer(out):
        try:
            if unfinished.is_dir() and not unfinished.is_symlink():  # of an export that was killed
                shutil.rmtree(unfinished)
            make_folder(unfinished)
            yield unfinished
            put_in_place(unfinished, out)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold a lock file beside `out`, which is deleted at the end. Raises UserError if another program holds it."""
    make_folder(out.parent, exist_ok=True)
    path = out.parent / f".{out.name}.export.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another export is writing {out}; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file
            path.unlink()
        lock.release()


def make_folder(path: Path, **options: bool) -> None:
    """path.mkdir with its parents. Raises UserError if something else has its name."""
    try:
        path.mkdir(parents=True, **options)
    except FileExistsError as error:
        raise UserError(f"{path} exists and is no folder; delete it, or choose another name") from error


def put_in_place(unfinished: Path, out: Path) -> None:
    """Rename a folder to `out`, which is missing or empty. Raises UserError if that has changed meanwhile."""
    try:
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{out} was created meanwhile; choose another folder, or delete it first") from error
