"""Bring a model here: `python -m scripts.import_model PATH -g TAG` writes a checkpoint for all stages to go on from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import get_base_dir, say, visible
from nanochat.formats.imported import install_tokenizer, write_checkpoint
from nanochat.formats.portable import PortableModel
from nanochat.formats.published import parse_assumed
from nanochat.formats.read_model import Options, read_model
from scripts import _cli


@dataclass
class Config:
    """Import a model: an export's folder, a published checkpoint, or a run's folder of another machine."""

    path: tyro.conf.Positional[str]
    """The folder, or a file such as model_000100.pt."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run to create; empty takes the folder's name."""
    source: Annotated[Literal["auto", "base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "auto"
    """Which stage it is; auto asks the files."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Step to take of several; -1 takes the last."""
    tokenizer: str = ""
    """tokenizer.pkl of a published checkpoint, or its folder; empty looks beside it and in its base folder."""
    assume: str = ""
    """Of a published checkpoint, what its files do not say: rope_base=10000,qk_scale=1."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    path = Path(config.path)
    options = Options(
        source="" if config.source == "auto" else config.source,
        step=config.step,
        tokenizer=Path(config.tokenizer) if config.tokenizer else None,
        assumed=parse_assumed(config.assume),
    )
    model = read_model(path, options)
    tag, base_dir = config.model_tag or default_tag(path), get_base_dir()
    folder = write_checkpoint(model, base_dir, tag, config.path)
    for line in describe(model, folder):
        say(visible(line))
    say(visible(install_tokenizer(model.tokenizer, base_dir, tag)))
    return 0


def default_tag(path: Path) -> str:
    """The name of the folder that holds the files."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return folder.parent.name if folder.name.isdigit() else folder.name


def describe(model: PortableModel, folder: Path) -> list[str]:
    """What was imported, and what was assumed about it."""
    config, count = model.config, sum(tensor.numel() for tensor in model.state.values())
    return [
        f"{model.source} model of {count:,} parameters: {config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads ({config.n_kv_head} for keys and values), context {config.sequence_len}, "
        f"vocabulary {config.vocab_size:,}",
        *(f"note: {note}" for note in model.meta["notes"]),
        f"written to {folder}",
    ]


if __name__ == "__main__":
    _cli.run(main)
