"""The folders of runs: by stage and tag, and which of them was saved last."""

import re
from pathlib import Path

from nanochat.checkpoint.folder import completed_ns, list_steps, step_path
from nanochat.common import UserError

CHECKPOINT_FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
STAGE_OF_FOLDER = {folder: stage for stage, folder in CHECKPOINT_FOLDERS.items()}
STAGES = {"base": "base_train", "sft": "chat_sft", "rl": "chat_rl"}


def run_dir(base_dir: Path, source: str, tag: str) -> Path:
    """The folder of one run's checkpoints. Raises UserError for an unknown source or a tag that is no folder name."""
    if source not in CHECKPOINT_FOLDERS:
        raise UserError(f"the source must be one of {', '.join(CHECKPOINT_FOLDERS)}, got {source!r}")
    if not tag or tag.startswith(".") or re.search(r"[/\\\0\ud800-\udfff]", tag):
        raise UserError(f"the model tag must be a plain folder name (no slashes, no leading dot), got {tag!r}")
    if len(tag.encode()) > 200:
        raise UserError(f"the model tag is too long for a folder's name: {tag[:40]}…")
    return Path(base_dir) / CHECKPOINT_FOLDERS[source] / tag


def find_run(base_dir: Path, source: str, tag: str = "") -> Path:
    """The run `tag` of `source`, or without a tag the most recently saved one. Only runs with a complete step count.

    Raises UserError that names the existing runs.
    """
    folder = run_dir(base_dir, source, tag or "any").parent
    saved = {}  # run -> when its last complete step was saved
    for run in sorted(folder.iterdir()) if folder.is_dir() else ():
        if run.is_dir() and (steps := list_steps(run)):
            saved[run] = max(completed_ns(step_path(run, step)) for step in steps)
    if tag and folder / tag in saved:
        return folder / tag
    if not tag and saved:
        return max(saved, key=lambda run: saved[run])
    make = f"make one with `python -m scripts.{STAGES[source]}` (`bash runs/runcpu.sh` runs all stages)"
    existing = f"there are: {', '.join(run.name for run in saved)}" if saved else f"there is none yet: {make}"
    requested = f"no complete {source} checkpoint" + (f" with the model tag {tag!r}" if tag else "")
    raise UserError(f"{requested} in {folder}; {existing}")
