"""Write a trained model in another program's format: `python -m scripts.export out -i sft`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.common import UserError, get_base_dir, say
from nanochat.formats.card_front import CardOptions
from nanochat.formats.hub import open_push, push
from nanochat.formats.portable import check_new, read_run
from nanochat.reporting.machine import package_version
from nanochat.train.commands import describe_flags
from scripts import _cli


@dataclass
class Config:
    """Export a model."""

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The folder to create, such as out; of --to=gguf the file, such as model.gguf. Nothing is overwritten."""
    to: Literal["hf", "onnx", "gguf", "mlx"] = "hf"
    """hf: a Hugging Face folder, for transformers and what builds on it; onnx: a graph for onnxruntime and browsers;
    gguf: a file for a fork of llama.cpp; mlx: a folder for mlx-lm (gguf and mlx: of --recipe=portable or plain)."""
    source: Annotated[Literal["base", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"
    """Which model: base, sft or rl."""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """Tag of the run; empty takes the latest."""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """Step of its checkpoint; -1 takes the last."""
    dtype: Literal["float32", "bfloat16", "q8_0"] = "float32"
    """Of the weights. float32: exact; bfloat16: half the size (not onnx); q8_0: about a quarter (gguf only)."""
    route: Literal["auto", "class", "code"] = "auto"
    """Of --to=hf. class: transformers' own NanoChat class, for models without the features that it lacks; code: our
    modelling file in the folder, to be loaded with trust_remote_code; auto: class where nothing is lost, else code."""
    int8: bool = False
    """Of --to=onnx: a second graph with weights in int8, about a third of the size."""
    license: str = ""
    """Of the weights: mit, apache-2.0, cc-by-4.0 ...; stated in the model card, of gguf in the file. Not of mlx."""
    push: str = ""
    """USER/NAME: also upload the folder to the Hugging Face hub, as a new commit. Of hf and onnx."""
    private: bool = False
    """With --push: nobody else may see it."""
    existing: bool = False
    """With --push: upload the folder as it is, from an earlier export; nothing is exported, and the flags of an export
    have no effect."""


FORMATS_OF = {  # the values of --to that a flag belongs to; other flags belong to all
    "route": ("hf",),
    "int8": ("onnx",),
    "license": ("hf", "onnx", "gguf"),
    "push": ("hf", "onnx"),
}
DTYPES_OF = {
    "hf": ("float32", "bfloat16"),
    "onnx": ("float32",),  # few of its runtimes compute bfloat16
    "gguf": ("float32", "bfloat16", "q8_0"),
    "mlx": ("float32", "bfloat16"),
}


def main(argv: Sequence[str] | None = None) -> int:
    config = _cli.parse(Config, argv)
    check_flags(config)
    card = CardOptions(config.license, config.push, public_command(config))
    out = Path(config.out)
    if not config.existing:
        check_new(out, is_file=config.to == "gguf")
    hub = open_push(config.push, config.private) if config.push else None  # asked before anything is written
    if not config.existing:
        export(config, out, card)
    if hub:
        message = f"Export by nanochat {package_version() or ''}".strip()
        say(f"the model is at {push(out, hub, message)}")
    return 0


def check_flags(config: Config) -> None:
    """Raise UserError for flags that do not go together."""
    if (config.private or config.existing) and not config.push:
        raise UserError("--private and --existing are for --push=USER/NAME, which is missing")
    if config.push and config.to in ("gguf", "mlx"):
        raise UserError(
            f"--push is for --to=hf and --to=onnx; upload this one with: hf upload {config.push} {config.out}"
        )
    for name, formats in FORMATS_OF.items():
        if config.to not in formats and getattr(config, name) != getattr(Config, name):
            belongs = ", ".join(f"--to={format}" for format in formats)
            raise UserError(f"--{name} belongs to {belongs}; leave it out with --to={config.to}")
    if config.dtype not in DTYPES_OF[config.to]:
        small = "; --int8 is its small form" if config.to == "onnx" else ""
        raise UserError(
            f"--to={config.to} takes --dtype={' or '.join(DTYPES_OF[config.to])}, not {config.dtype}{small}"
        )


def export(config: Config, out: Path, card: CardOptions) -> None:
    """Write the folder or file."""
    model = read_run(get_base_dir(to_write=False), config.source, config.model_tag, config.step)
    say(f"{config.source} model of {model.meta['model_tag']}, step {model.meta['step']}")
    if config.to == "hf":
        from nanochat.formats.hf_folder import write_hf

        write_hf(model, out, config.dtype, config.route, card)
    elif config.to == "mlx":
        from nanochat.formats.mlx_folder import write_mlx

        write_mlx(model, out, config.dtype)
    elif config.to == "onnx":
        from nanochat.formats.onnx_folder import write_onnx

        write_onnx(model, out, config.int8, card)
    else:
        from nanochat.formats.gguf_file import write_gguf

        write_gguf(model, out, config.dtype, config.license)
    say(f"written to {out}" + (f"; {out / 'README.md'} says how to load it" if config.to in ("hf", "onnx") else ""))
    if list(out.glob("modeling_*.py")):
        say("its network is code in that folder: transformers loads it with trust_remote_code=True")


def public_command(config: Config) -> str:
    """The command for the model card, without paths, tags and names."""
    defaults, hidden = vars(Config(out="")), ("out", "model_tag", "push", "private", "existing")
    flags = {name: value for name, value in vars(config).items() if value != defaults[name] and name not in hidden}
    return f"python -m scripts.export {describe_flags({'to': config.to, 'source': config.source, **flags})} out"


if __name__ == "__main__":
    _cli.run(main)
