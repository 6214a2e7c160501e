"""Read a model from any folder or file that holds one in a format known here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.checkpoint.folder import list_steps, run_and_step
from nanochat.checkpoint.manifest import MANIFEST
from nanochat.checkpoint.runs import STAGE_OF_FOLDER
from nanochat.checkpoint_manager import check_shapes, open_checkpoint
from nanochat.common import UserError
from nanochat.formats.hf_folder import CONFIG
from nanochat.formats.hf_import import ADAPTER_CONFIG, read_adapter, read_hf
from nanochat.formats.parameters import parameter_shapes
from nanochat.formats.portable import PortableModel
from nanochat.formats.published import PublishedFiles, find_published, read_published, read_tokenizer_pickle
from nanochat.tokenizer import FILE_NAME, RustBPETokenizer

PICKLE = "tokenizer.pkl"
READABLE = "a Hugging Face folder of a nanochat model, a published checkpoint (model_*.pt), or a run's folder"


@dataclass
class Options:
    """What the files may leave open."""

    source: str = ""  # the stage, where the files do not tell
    step: int = -1
    tokenizer: Path | None = None  # a file, or the folder of one
    assumed: Mapping[str, Any] = field(default_factory=dict)  # see published.ASSUMED
    base: Path | None = None  # folder of the model that an adapter changes


def read_model(path: Path, options: Options | None = None) -> PortableModel:
    """The model at `path`: all parameters of its config, finite, in float32. Its meta has "notes" on what was assumed.

    Raises UserError for what cannot be read, and names what can.
    """
    path, options = Path(path), options or Options()
    if not path.exists():
        raise UserError(f"{path} does not exist")
    model = _read(path, options)
    notes = model.meta.setdefault("notes", [])
    stage = options.source or model.source
    if not stage:
        stage = "base"
        notes.append("the files do not say which stage it is: taken as base; -i sft for a model that chats")
    elif options.source and model.source not in ("", options.source):
        notes.append(f"taken as {options.source}, though its files say {model.source}")
    model.source = stage
    check_state(model, path)
    return model


def _read(path: Path, options: Options) -> PortableModel:
    found = find_published(path, options.step)
    if found and not options.base:
        return read_published(found, published_tokenizer(found, options.tokenizer), options.assumed)
    if options.assumed or options.tokenizer:
        raise UserError("--assume and --tokenizer are for published checkpoints (model_*.pt): other files have both")
    is_adapter = (path / ADAPTER_CONFIG).exists()
    if options.base and not is_adapter:
        raise UserError(f"--base is for the folder of an adapter, with {ADAPTER_CONFIG}; leave it out for {path}")
    if (path / MANIFEST).exists() or list_steps(path):
        return read_own(path, options.step)
    if is_onnx(path):
        raise UserError(f"{path} holds an ONNX graph, which runs and cannot be read back: import an export --to=hf")
    if options.step >= 0:
        raise UserError(f"{path} has no steps to choose from; leave --step out")
    if is_adapter:
        return read_adapter(path, options.base)
    if (path / CONFIG).exists():
        return read_hf(path)
    raise UserError(f"{path} is no model that can be read: give {READABLE}")


def is_onnx(path: Path) -> bool:
    """Whether it is an ONNX graph, or a folder whose only weights are such."""
    graphs = [path] if path.suffix == ".onnx" else [*path.glob("*.onnx"), *path.glob("onnx/*.onnx")]
    return bool(graphs) and not any(path.glob("*.safetensors"))


def check_state(model: PortableModel, path: Path) -> None:
    """Raise UserError unless the state has every parameter of the config in its shape, with finite numbers. Makes all
    of them float32."""
    check_shapes(parameter_shapes(model.config), {n: tuple(t.shape) for n, t in model.state.items()}, path)
    for name, tensor in model.state.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds numbers that are not finite; export or save the model again")
        model.state[name] = tensor.float()


def published_tokenizer(found: PublishedFiles, given: Path | None) -> RustBPETokenizer:
    """The tokenizer of a published checkpoint: as given, else beside it, else in its base folder."""
    places = [given] if given else tokenizer_places(found)
    if path := find_tokenizer(places):
        return read_tokenizer(path)
    looked = ", ".join(map(str, places))
    raise UserError(f"there is no tokenizer.pkl in {looked}; give the one it was trained with: --tokenizer=FILE")


def tokenizer_places(found: PublishedFiles) -> list[Path]:
    """The folders in which a published checkpoint may have its tokenizer."""
    folder = found.model.absolute().parent
    return [folder, folder / "tokenizer", folder.parent.parent / "tokenizer"]


def find_tokenizer(places: Sequence[Path]) -> Path | None:
    """The first file of a tokenizer in these folders, or among these files."""
    paths = [p for place in places for p in ([place] if place.is_file() else [place / PICKLE, place / FILE_NAME])]
    return next((path for path in paths if path.exists()), None)


def read_tokenizer(path: Path) -> RustBPETokenizer:
    """A pickled tokenizer, or one in this nanochat's format."""
    if path.suffix == ".pkl":
        return read_tokenizer_pickle(path)
    if path.name != FILE_NAME:
        raise UserError(f"{path} is neither a tokenizer.pkl nor a {FILE_NAME}")
    return RustBPETokenizer.from_directory(path.parent)


# ---------------------------------------------------------------------------------------------------
# Checkpoints


def read_own(path: Path, step: int) -> PortableModel:
    """A checkpoint of this nanochat, from another base folder: a run's folder, or that of one step."""
    run, number = run_and_step(path, step)
    checkpoint = open_checkpoint(run, number, ("model.safetensors", "tokenizer.json"))
    config, tokenizer = checkpoint.model_config(), checkpoint.tokenizer()
    stage = STAGE_OF_FOLDER.get(run.parent.name) or str(checkpoint.meta.get("stage"))
    meta = dict(checkpoint.meta)
    if any(name.startswith("optimizer") for name in checkpoint.manifest.files):
        meta["notes"] = ["only the model is imported; to resume the run itself, copy its folder"]
    return PortableModel(
        config, checkpoint.model_state(), tokenizer, stage if stage in STAGE_OF_FOLDER.values() else "", meta
    )
