"""Say what differs between two models: `python -m scripts.diff A B`.

A and B are what scripts.info takes: paths, or tags of runs. Exit code 0: the same model (network, weights and
tokenizer, as far as both have them), 1: not, 2: they cannot be compared.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from nanochat.common import UserError, get_base_dir, say, visible
from nanochat.common.output import ProgressLine
from nanochat.inspection.contents import Contents
from nanochat.inspection.difference_rows import TENSOR_COLUMNS, rows_of, tensor_rows
from nanochat.inspection.differences import compare
from nanochat.inspection.overview import find_models
from nanochat.inspection.read_contents import read_contents
from nanochat.report import to_json
from nanochat.reporting.console import print_table
from scripts import _cli


@dataclass
class Config:
    """Say what differs between two models. Exit code 0: the same model, 1: not, 2: they cannot be compared."""

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
    """A path, or the tag of a run; see python -m scripts.info --help."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B")]
    """The same of the other model."""
    source: Annotated[Literal["", "base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = ""
    """A and B are tags of runs, of this stage."""
    values: bool = True
    """Compare the weights' values, one tensor at a time; --no-values: only their names, shapes and dtypes."""
    tensors: bool = False
    """List every tensor that differs, not only their groups."""
    json: bool = False
    """Print JSON (nanochat/inspection/differences.py lists its keys) instead of tables."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    a, b = (open_model(name, config.source) for name in (config.a, config.b))
    found = compare_with_progress(a, b, config.values)
    if config.json:
        say(json.dumps(to_json(found)))
    else:
        show(found, config.tensors)
    return 0 if found["same"] else 1


def open_model(name: str, source: str) -> Contents:
    """A path, or a run by its tag."""
    paths = find_models(name, source, get_base_dir(to_write=False))
    if len(paths) > 1:
        raise UserError(f"several stages have a run named {name}: choose one with -i, or give its folder")
    return read_contents(paths[0])


def compare_with_progress(a: Contents, b: Contents, values: bool) -> dict[str, Any]:
    """The differences; on a terminal a line says how far it is, where it takes long."""
    done = [0, 1]
    line = ProgressLine(lambda: f"comparing tensor {done[0] + 1} of {done[1]}")

    def progress(number: int, total: int) -> None:
        done[:] = number, total
        if line.live:
            line.show()

    found = compare(a, b, values, progress)
    if line.shown:
        say("\r\x1b[K", end="")
    return found


def show(found: dict[str, Any], every_tensor: bool) -> None:
    say(visible(found["verdict"]))
    for side in ("a", "b"):
        say(visible(f"{side.upper()}: {found[side]['what']} ({found[side]['path']})"))
    if rows := rows_of(found):
        print_table("", rows, ("", "A", "B"))
    if tensors := tensor_rows(found["weights"], every_tensor):
        print_table("", tensors, TENSOR_COLUMNS)


if __name__ == "__main__":
    _cli.run(main)
