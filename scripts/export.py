"""Write a trained model in another program's format: `python -m scripts.export --to=hf -i sft out/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import get_base_dir
from nanochat.formats.portable import read_run
from scripts import _cli


@dataclass
class Config:
    """Export a model."""

    out: tyro.conf.Positional[str]
    """The folder to create."""
    to: Literal["hf"] = "hf"
    """hf: a Hugging Face folder, for transformers and whatever builds on it."""
    source: Annotated[Literal["base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: base, sft or rl."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Step of its checkpoint; -1 takes the last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights: float32 is exact, bfloat16 half the size."""
    route: Literal["auto", "class", "code"] = "auto"
    """Of --to=hf. class: transformers' own NanoChat class, for models without the features that it lacks; code: our
    modelling file in the folder, to be loaded with trust_remote_code; auto: class where nothing is lost, else code."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    model = read_run(get_base_dir(to_write=False), config.source, config.model_tag, config.step)
    if config.to == "hf":
        from nanochat.formats.hf_folder import write_hf

        write_hf(model, Path(config.out), config.dtype, config.route)
    print(f"{config.source} model of {model.meta['model_tag']}, step {model.meta['step']}: written to {config.out}")
    return 0


if __name__ == "__main__":
    _cli.run(main)
