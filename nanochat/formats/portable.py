"""PortableModel: a trained model without a format. Every writer takes one, every reader returns one."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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


def read_run(base_dir: Path, source: str, model_tag: str = "", step: int = -1) -> PortableModel:
    """The model of a run here; of the latest run without a tag, at its last step for -1. Raises UserError, also if its
    network is not the one that exports compute."""
    model, tokenizer, meta = load_model(source, "cpu", base_dir=base_dir, model_tag=model_tag, step=step)
    check_network(model.config)
    state = {name: p.detach() for name, p in model.named_parameters()}
    return PortableModel(model.config, state, tokenizer, source, dict(meta))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` when the block ends, and disappears if it raises.

    Raises UserError if `out` exists and is not an empty folder: nothing is overwritten.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists; choose another folder, or delete it first")
    unfinished = out.parent / f".{out.name}.new"
    try:
        if unfinished.exists():  # of an export that was killed
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
