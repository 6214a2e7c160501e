"""The earlier model that a training stage starts from, and the folder the stage's own run is in."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint.folder import list_steps, run_and_step
from nanochat.checkpoint.runs import find_run, run_dir
from nanochat.checkpoint_manager import Checkpoint, load_model, read_checkpoint
from nanochat.common import UserError, get_base_dir
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.config import TrainConfig


def read_source(
    init_from: str, base_dir: Path, tokenizer: RustBPETokenizer, max_seq_len: int, runtime: Runtime
) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """The checkpoint that base_train's --init-from names (a run's tag, its folder, or the folder of one step), and its
    weights. Collective.

    Raises UserError if a pretraining run cannot start from it: another tokenizer, another context.
    """
    path = Path(init_from)
    run, step = run_and_step(path) if path.is_dir() else (run_dir(base_dir, "base", init_from), None)

    def read(source: Checkpoint) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
        if source.tokenizer().hash != tokenizer.hash:
            raise UserError(f"--init-from: {source.path} was trained with another tokenizer")
        context = source.model_config().sequence_len
        if max_seq_len not in (-1, context):
            raise UserError(
                f"--init-from: that model's context is {context}, not {max_seq_len}; leave --max-seq-len out"
            )
        return source, source.model_state(runtime.device)

    return read_checkpoint(run, step, read, ("model.safetensors", "tokenizer.json"), runtime)


@dataclass
class StartingModel:
    """What a finetuning run inherits."""

    model: GPT
    tokenizer: RustBPETokenizer
    base: dict[str, Any]  # source, tag and step of the run it starts from, and the recipe of pretraining; kept in meta
    total_batch_tokens: int


def finetuning_dir(stage: str, source: str, config: TrainConfig, source_tag: str, runtime: Runtime) -> Path:
    """The run's folder: named by --model-tag, else (resuming) the latest of its stage, else named like its source.

    Collective: the main rank chooses, as another run may save meanwhile.
    """
    base_dir = get_base_dir()

    def choose() -> str:
        if not source_tag and (config.resume or config.resume_from_step >= 0):
            with contextlib.suppress(UserError):  # nothing to resume yet
                return find_run(base_dir, stage).name
        return find_run(base_dir, source, source_tag).name

    return run_dir(base_dir, stage, config.model_tag or runtime.broadcast(choose, "choosing a run"))


def open_starting_model(
    checkpoint: Checkpoint | None, source: str, run: Path, tag: str, step: int, runtime: Runtime
) -> StartingModel:
    """The model of stage `source` to finetune: the run `tag`, else the one named like `run`, else the latest.

    Prints what it found. `step` -1 takes its last checkpoint. A run resumed from `checkpoint` needs no other: its model
    is in there, to be restored later, and the run it started from may be gone by now.
    """
    if checkpoint:
        meta, tokenizer, base = checkpoint.meta, checkpoint.tokenizer(), checkpoint.meta["base"]
        model = GPT.create(checkpoint.model_config(), runtime.device, runtime.dtype)
    else:
        base_dir = get_base_dir()
        tag = tag or (run.name if list_steps(run_dir(base_dir, source, run.name)) else "")
        name = runtime.broadcast(lambda: find_run(base_dir, source, tag).name, "choosing a model")
        model, tokenizer, meta = load_model(source, runtime, model_tag=name, step=step)
        saved = meta["base"]["recipe"] if "base" in meta else meta.get("recipe")
        recipe = saved or meta["user_config"].get("recipe", "published")
        base = {"source": source, "tag": name, "step": meta["step"], "recipe": recipe}
    runtime.print0(f"{runtime.describe()}\n{source} model: {base['tag']}, step {base['step']}; run folder: {run}")
    return StartingModel(model, tokenizer, base, meta["plan"]["total_batch_tokens"])
