"""Say what a checkpoint, an export or another model's files hold: `python -m scripts.info PATH`.

python -m scripts.info                  # all runs of the base folder
python -m scripts.info cpu -i sft       # a run by its tag
python -m scripts.info out/ --json      # a folder of any program's, for other programs to read
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat.common import UserError, get_base_dir, say
from nanochat.inspection.describe import describe
from nanochat.inspection.describe_rows import rows_of
from nanochat.inspection.overview import COLUMNS, find_models, is_base_dir, overview_rows, runs_of
from nanochat.inspection.read_contents import read_contents
from nanochat.reporting.console import print_facts, print_table
from scripts import _cli


@dataclass
class Config:
    """Say what a checkpoint, an export or another model's files hold, without loading the weights."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")] = ""
    """A run's tag, or a path: of a run, a step, a base folder, a Hugging Face folder, a published checkpoint, a file of
    weights or a tokenizer. Empty: the base folder."""
    source: Annotated[Literal["", "base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = ""
    """Of a tag: which run of this name; alone, the latest of this stage."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Of a run: this step; -1 takes the last."""
    verify: bool = False
    """Read all files of a checkpoint and compare them with their recorded hashes."""
    json: bool = False
    """Print JSON (nanochat/inspection/describe.py lists its keys) instead of a table."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    base_dir = get_base_dir(to_write=False)
    folder = Path(config.path) if config.path else base_dir
    if not config.source and is_base_dir(folder):
        show_runs(config, runs_of(folder), f"runs in {folder}")
        return 0
    if not config.source and not config.path:
        raise UserError(f"there are no runs in {base_dir} yet; give a path, or train: bash runs/runcpu.sh")
    paths = find_models(config.path, config.source, base_dir)
    if len(paths) > 1:
        show_runs(config, runs_of(base_dir, config.path), f"runs named {config.path}: choose one with -i")
        return 0
    facts = describe(read_contents(paths[0], config.step, config.verify))
    if config.json:
        say(json.dumps(facts))
    else:
        print_facts(facts["path"], rows_of(facts))
    return 0


def show_runs(config: Config, entries: list[dict[str, Any]], title: str) -> None:
    if config.verify or config.step >= 0:
        raise UserError("--verify and --step are for one run: name it by its tag and -i STAGE, or give its folder")
    if config.json:
        say(json.dumps({"kind": "runs", "runs": entries}))
    else:
        print_table(title, overview_rows(entries), COLUMNS)
        say("* saved last")


if __name__ == "__main__":
    _cli.run(main)
