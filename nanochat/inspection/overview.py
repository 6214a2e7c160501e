"""All runs of a base folder as rows of a table: `nanochat info` without a path."""

import contextlib
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folder import completed_ns, list_steps, step_path
from nanochat.checkpoint.runs import CHECKPOINT_FOLDERS, find_run
from nanochat.checkpoint_manager import open_checkpoint
from nanochat.common import UserError, format_count
from nanochat.gpt_config import GPTConfig
from nanochat.inspection.describe_rows import is_number, short_list, size
from nanochat.scaling import estimate

COLUMNS = ("stage", "run", "steps", "params", "tokens", "bpb", "disk", "saved (UTC)")


def is_base_dir(path: Path) -> bool:
    """Whether a folder is one that nanochat keeps its runs in."""
    return any((path / folder).is_dir() for folder in CHECKPOINT_FOLDERS.values())


def runs_of(base_dir: Path, tag: str = "") -> list[dict[str, Any]]:
    """Every run, or those named `tag`, in order of stage and name: stage, run, path, steps, saved_at, newest, bytes
    and, of its latest good step, parameters, tokens and val_bpb, or `damaged`."""
    found = list[dict[str, Any]]()
    for stage, name in CHECKPOINT_FOLDERS.items():
        folder = base_dir / name
        for run in sorted(folder.iterdir()) if folder.is_dir() else ():
            if run.is_dir() and not run.name.startswith(".") and tag in ("", run.name) and (steps := list_steps(run)):
                saved = max(completed_ns(step_path(run, step)) for step in steps) / 1e9
                found.append({"stage": stage, "run": run.name, "path": str(run), "steps": steps, "saved_at": saved})
                found[-1] |= {"bytes": bytes_of(run), **facts_of(run)}
    newest = max((entry["saved_at"] for entry in found), default=None)
    for entry in found:
        entry["newest"] = entry["saved_at"] == newest
        entry["saved_at"] = datetime.fromtimestamp(entry["saved_at"], UTC).isoformat(timespec="seconds")
    return found


def find_models(name: str, source: str, base_dir: Path) -> list[Path]:
    """What `name` may mean: with a source the run of this tag, else an existing path, else the runs of this tag, of
    which several stages may have one. Raises UserError if there is none."""
    if source:
        return [find_run(base_dir, source, name)]
    if Path(name).exists() or "/" in name:
        return [Path(name)]
    if named := runs_of(base_dir, name):
        return [Path(run["path"]) for run in named]
    raise UserError(f"{name} is no path, nor a run in {base_dir}; `python -m scripts.info` lists the runs")


def facts_of(run: Path) -> dict[str, Any]:
    """Of the latest good step."""
    try:
        meta = open_checkpoint(run, verify=False).meta
        config = GPTConfig.from_dict(meta["model_config"], run)
    except UserError as error:
        return {"damaged": str(error)}
    progress = meta.get("progress", {})
    known = {key: progress.get(key) for key in ("tokens", "val_bpb")}
    return {"parameters": estimate(config)[1]["total"], **{k: v for k, v in known.items() if v is not None}}


def bytes_of(run: Path) -> int:
    """On disk, of the steps and what lies beside them; links are not followed."""
    total = 0
    for folder, _, names in os.walk(run):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a run prunes its steps meanwhile
                found = os.lstat(os.path.join(folder, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def overview_rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    """The COLUMNS of each run."""
    return [
        [
            entry["stage"],
            entry["run"] + (" *" if entry["newest"] else ""),
            short_list(entry["steps"], 4),
            "damaged" if "damaged" in entry else format_count(entry["parameters"]),
            format_count(entry["tokens"]) if is_number(entry.get("tokens")) else "",
            f"{entry['val_bpb']:.4f}" if is_number(entry.get("val_bpb")) else "",
            size(entry["bytes"]),
            entry["saved_at"][:16].replace("T", " "),
        ]
        for entry in entries
    ]
