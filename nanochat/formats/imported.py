"""A model from elsewhere as a checkpoint in the base folder, from which every stage goes on."""

import math
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folder import LOCK
from nanochat.checkpoint.runs import run_dir
from nanochat.checkpoint.saving import save_checkpoint
from nanochat.common import UserError
from nanochat.dataset import HUB_SETS
from nanochat.formats.portable import PortableModel, part
from nanochat.gpt_config import GPTConfig
from nanochat.recipe import RECIPES, get_recipe
from nanochat.scaling import make_plan
from nanochat.tokenizer import FILE_NAME, RustBPETokenizer

KEPT_PROGRESS = ("step", "tokens", "seconds", "val_bpb", "best_val_bpb")  # of Progress
MAX_STEP = 10**9
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")


def write_checkpoint(model: PortableModel, base_dir: Path, tag: str, origin: str) -> Path:
    """Save the model as the run `tag` of its stage and return the step's folder. `origin` is where it came from.

    Raises UserError if there is such a run.
    """
    run = run_dir(base_dir, model.source, tag)
    if run.exists() and {entry.name for entry in run.iterdir()} - {LOCK}:  # of an import that failed the lock stays
        raise UserError(f"{run} exists; choose another name with -g, or delete that run first")
    meta = checkpoint_meta(model, origin)
    return save_checkpoint(run, meta["progress"]["step"], model_state=model.state, meta=meta, tokenizer=model.tokenizer)


def checkpoint_meta(model: PortableModel, origin: str) -> dict[str, Any]:
    """The meta that evaluation, chat and finetuning read. Of the files' meta only numbers and known names are kept: its
    paths are those of another machine."""
    meta, step = model.meta, model.meta.get("step")
    step = step if type(step) is int and 0 <= step <= MAX_STEP else 0
    numbers = {"val_bpb": meta.get("val_bpb"), **part(meta, "progress"), "step": step}
    corpus = meta.get("corpus")
    recipe = recipe_of(model)
    return {
        "stage": model.source,
        "model_config": model.config.to_dict(),
        "recipe": recipe,
        "corpus": corpus if isinstance(corpus, str) and corpus.isalnum() and len(corpus) <= 64 else "unknown",
        "user_config": {"recipe": recipe, "data": data_of(meta), "text_field": "text"},
        "plan": {"num_steps": max(1, step), "total_batch_tokens": batch_of(meta, model.config)},
        "progress": {name: numbers[name] for name in KEPT_PROGRESS if is_number(numbers.get(name))},
        "imported": {"from": origin, "notes": list(meta.get("notes", []))},
    }


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 2**53


def batch_of(meta: dict[str, Any], config: GPTConfig) -> int:
    """Tokens per step: of the run it comes from, else what the scaling rules give a model of this size."""
    saved = part(meta, "plan").get("total_batch_tokens", meta.get("total_batch_tokens"))
    if type(saved) is int and 1 <= saved <= 2**40:
        return saved
    return make_plan(config).total_batch_tokens


def data_of(meta: dict[str, Any]) -> str:
    """The name of the training data, where it is one that every machine knows."""
    data = part(meta, "user_config").get("data")
    return data if isinstance(data, str) and data in ("starter", *HUB_SETS) else ""


def recipe_of(model: PortableModel) -> str:
    """The recipe of its pretraining if the files name one, else the one whose network is the most like it.

    A model of `small` from when that had smear and no n-grams is most like `later`."""
    saved = part(model.meta, "base").get("recipe") or model.meta.get("recipe")
    if isinstance(saved, str):
        try:
            get_recipe(saved)
        except UserError:
            model.meta.setdefault("notes", []).append(f"its recipe {saved[:80]!r} is not known here")
        else:
            return saved
    fields = model.config.to_dict()
    sizes = {name: fields[name] for name in SIZES}

    def differences(name: str) -> int:
        other = get_recipe(name).model(**sizes).to_dict()
        return sum(other[field] != value for field, value in fields.items())

    return min((name for name in RECIPES if name != "default"), key=differences)


def install_tokenizer(tokenizer: RustBPETokenizer, base_dir: Path, tag: str) -> str:
    """Save the tokenizer in the base folder if that has none. Returns a line that says what pretraining will use."""
    folder = base_dir / "tokenizer"
    if not (folder / FILE_NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        return f"its tokenizer is now the base folder's: {tokenizer.save(folder)}"
    if RustBPETokenizer.from_directory(folder).hash == tokenizer.hash:
        return "its tokenizer is the base folder's"
    return (
        f"the base folder has another tokenizer, which stays: the model keeps its own for chat, evaluation and "
        f"finetuning; for base_train --init-from={tag} import it into a base folder of its own (NANOCHAT_BASE_DIR)"
    )
