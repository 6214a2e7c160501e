"""Bring a model here: `python -m scripts.import_model PATH -g TAG` writes a checkpoint for all stages to go on from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import UserError, get_base_dir, say, visible, warn
from nanochat.common.fast_path import in_words
from nanochat.formats.imported import install_tokenizer, write_checkpoint
from nanochat.formats.portable import PortableModel
from nanochat.formats.published import parse_assumed
from nanochat.formats.read_model import Options, read_model
from nanochat.formats.same_network import differences
from scripts import _cli

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Config:
    """Import a model: a Hugging Face folder, a published checkpoint, or a run's folder of another machine."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """The folder, a file such as model_000100.pt, or a name on the hub: ORG/NAME."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run to create; empty takes the folder's name."""
    source: Annotated[Literal["auto", "base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "auto"
    """Which stage it is; auto asks the files."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Step to take of several; -1 takes the last."""
    tokenizer: str = ""
    """Of a published checkpoint: tokenizer.pkl, or its folder; empty looks beside it and in its base folder."""
    base: str = ""
    """Folder of the model that a LoRA adapter belongs to: they are merged."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    assume: str = ""
    """Of a published checkpoint, what its files do not say: rope_base=10000,qk_scale=1."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    path = find(config.path, config.revision)
    options = Options(
        source="" if config.source == "auto" else config.source,
        step=config.step,
        tokenizer=Path(config.tokenizer) if config.tokenizer else None,
        assumed=parse_assumed(config.assume),
        base=Path(config.base) if config.base else None,
    )
    tag, base_dir = config.model_tag or default_tag(config.path), get_base_dir()
    model = read_model(path, options)
    origin = config.path if Path(config.path).exists() else f"hub:{config.path}@{path.name}"  # pull names it by commit
    folder = write_checkpoint(model, base_dir, tag, origin)
    for line in describe(model, folder):
        say(visible(line))
    if parts := differences(model.config):
        warn(f"the network here has changed ({in_words(parts)}): this model computes something else than it did there")
    say(visible(install_tokenizer(model.tokenizer, base_dir, tag)))
    return 0


def find(path: str, revision: str) -> Path:
    """The path itself, or the folder that a name on the hub was downloaded to."""
    if Path(path).exists() or not HUB_NAME.fullmatch(path):
        if revision != Config.revision:
            raise UserError(f"--revision is for a model on the hub; {path} is a path")
        return Path(path)
    from nanochat.formats.hub import pull

    return pull(path, get_base_dir(), revision)


def default_tag(path: str) -> str:
    """The name of the folder that holds the files, or of the model on the hub."""
    folder = Path(path).absolute() if not Path(path).is_file() else Path(path).absolute().parent
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
