"""Which earlier model a training stage starts from, and in which folder it works."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folder import list_steps
from nanochat.checkpoint_manager import Checkpoint, find_run, load_model, open_checkpoint, run_dir
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer
from scripts._train import TrainFlags


def open_source(init_from: str, base_dir: Path) -> Checkpoint:
    """What base_train's --init-from names: a run's tag, its folder, or the folder of one of its steps."""
    path = Path(init_from)
    if path.is_dir() and path.name.isdigit() and (path / "manifest.json").exists():
        return open_checkpoint(path.parent, int(path.name))
    return open_checkpoint(path if path.is_dir() else run_dir(base_dir, "base", init_from))


@dataclass
class Start:
    """What a finetuning run inherits."""

    model: GPT
    tokenizer: RustBPETokenizer
    tag: str  # of the run it starts from
    step: int
    recipe: str
    total_batch_tokens: int


def own_run(stage: str, source: str, config: TrainFlags, source_tag: str, base_dir: Path) -> Path:
    """This run's folder: the tag as given, else the latest of its kind when resuming, else named like its source."""
    tag = config.model_tag
    if not tag and not source_tag and (config.resume or config.resume_from_step >= 0):
        with contextlib.suppress(UserError):  # nothing to resume yet
            tag = find_run(base_dir, stage, None).name
    return run_dir(base_dir, stage, tag or find_run(base_dir, source, source_tag or None).name)


def starting_model(source: str, run: Path, tag: str, step: int, runtime: Runtime, base_dir: Path) -> Start:
    """The model to finetune, of stage `source`: the run called `tag`, else the one of this run's name, else the latest.

    `step` -1 takes its last checkpoint.
    """
    known = tag or (run.name if list_steps(run_dir(base_dir, source, run.name)) else None)
    name = find_run(base_dir, source, known).name
    model, tokenizer, meta = load_model(
        source, runtime, base_dir=base_dir, model_tag=name, step=None if step < 0 else step, compute_dtype=runtime.dtype
    )
    return Start(model, tokenizer, name, meta["step"], recipe_of(meta), meta["plan"]["total_batch_tokens"])


def recipe_of(meta: dict[str, Any]) -> str:
    """The recipe of pretraining, which later stages hand on."""
    return meta["base"]["recipe"] if "base" in meta else meta["user_config"].get("recipe", "published")


def resumed_model(checkpoint: Checkpoint, runtime: Runtime) -> Start:
    """A saved run's own model (its weights come later): the run it started from may be gone or have been trained on."""
    meta, base = checkpoint.meta, checkpoint.meta["base"]
    model = GPT.create(GPTConfig.from_dict(meta["model_config"]), runtime.device, runtime.dtype)
    total = meta["plan"]["total_batch_tokens"]
    return Start(model, checkpoint.tokenizer(), base["tag"], base["step"], base["recipe"], total)
