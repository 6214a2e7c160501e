"""Write a trained model in another program's format: `python -m scripts.export --to=hf -i sft out/`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import UserError, get_base_dir, say
from nanochat.formats.card_front import CardOptions
from nanochat.formats.hub import open_push, push
from nanochat.formats.portable import read_run
from nanochat.reporting.machine import package_version
from nanochat.train.commands import describe_flags
from scripts import _cli


@dataclass
class Config:
    """Export a model."""

    out: tyro.conf.Positional[str]
    """The folder to create; of gguf the file."""
    to: Literal["hf", "onnx", "gguf", "mlx"] = "hf"
    """hf: a Hugging Face folder, for transformers and whatever builds on it; onnx: a graph for onnxruntime, in browsers
    too; gguf: a file for a fork of llama.cpp; mlx: a folder for mlx-lm (both: --recipe=plain only)."""
    source: Annotated[Literal["base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: base, sft or rl."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Step of its checkpoint; -1 takes the last."""
    dtype: Literal["float32", "bfloat16", "q8_0"] = "float32"
    """Of the weights: float32 is exact, bfloat16 half the size; q8_0, of gguf, about a quarter."""
    route: Literal["auto", "class", "code"] = "auto"
    """Of --to=hf. class: transformers' own NanoChat class, for models without the features that it lacks; code: our
    modelling file in the folder, to be loaded with trust_remote_code; auto: class where nothing is lost, else code."""
    int8: bool = False
    """Of --to=onnx: a second graph with weights in int8, about a third of the size."""
    license: str = ""
    """Of the weights, for the model card: mit, apache-2.0, cc-by-4.0 ...; empty: the card says that none is stated."""
    push: str = ""
    """USER/NAME: also upload the folder to the Hugging Face hub, as a new commit."""
    private: bool = False
    """With --push: nobody else may see it."""
    existing: bool = False
    """With --push: upload the folder as it is, from an earlier export; nothing is exported."""


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    if (config.private or config.existing) and not config.push:
        raise UserError("--private and --existing are for --push=USER/NAME, which is missing")
    hub = open_push(config.push, config.private) if config.push else None  # asked before anything is written
    if not config.existing:
        export(config)
    if hub:
        message = f"Export by nanochat {package_version() or ''}".strip()
        say(f"the model is at {push(Path(config.out), hub, message)}")
    return 0


def export(config: Config) -> None:
    """Write the folder or file."""
    for name, kind in (("route", "hf"), ("int8", "onnx")):
        if config.to != kind and getattr(config, name) != getattr(Config, name):
            raise UserError(f"--{name} belongs to --to={kind}; leave it out with --to={config.to}")
    if config.to in ("gguf", "mlx") and config.push:
        raise UserError(
            f"--push is for --to=hf and --to=onnx; upload this one with: hf upload {config.push} {config.out}"
        )
    if config.to != "gguf" and config.dtype == "q8_0":
        raise UserError(f"--dtype=q8_0 belongs to --to=gguf; choose float32 or bfloat16 with --to={config.to}")
    model = read_run(get_base_dir(to_write=False), config.source, config.model_tag, config.step)
    card = CardOptions(config.license, config.push, public_command(config))
    if config.to == "hf":
        from nanochat.formats.hf_folder import write_hf

        write_hf(model, Path(config.out), config.dtype, config.route, card)
    elif config.to == "mlx":
        from nanochat.formats.mlx_folder import write_mlx

        write_mlx(model, Path(config.out), config.dtype)
    elif config.to == "onnx":
        from nanochat.formats.onnx_folder import write_onnx

        write_onnx(model, Path(config.out), config.dtype, config.int8, card)
    else:
        from nanochat.formats.gguf_file import write_gguf

        write_gguf(model, Path(config.out), config.dtype, config.license)
    say(f"{config.source} model of {model.meta['model_tag']}, step {model.meta['step']}: written to {config.out}")


def public_command(config: Config) -> str:
    """The command for the model card: without names of this machine."""
    defaults, hidden = vars(Config(out="")), ("out", "model_tag", "push", "private", "existing")
    flags = {name: value for name, value in vars(config).items() if value != defaults[name] and name not in hidden}
    return f"python -m scripts.export {describe_flags({'to': config.to, 'source': config.source, **flags})} out"


if __name__ == "__main__":
    _cli.run(main)
