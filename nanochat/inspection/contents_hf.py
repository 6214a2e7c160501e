"""Contents of a Hugging Face folder: an export of nanochat, or another program's model."""

from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.common.files import read_json
from nanochat.formats.hf_folder import ABOUT, CONFIG, ROUTE_OF, ROUTES, NanochatFile, read_about
from nanochat.formats.hf_import import ADAPTER_CONFIG
from nanochat.formats.hf_tokenizer import read_tokenizer
from nanochat.formats.parameters import padded_shape, parameter_shapes
from nanochat.gpt_config import GPTConfig
from nanochat.inspection.contents import Contents, TensorFacts, files_in, sizes_of, tensors_of
from nanochat.inspection.tokenizer_facts import TokenizerFacts, read_tokenizer_facts

KINDS_OF_WEIGHTS = (".safetensors", ".bin", ".gguf", ".onnx", ".onnx_data", ".pt", ".pth")
SMALL_FILES = (".json", ".jinja", ".py", ".md", ".model", ".txt")


def is_huggingface(path: Path) -> bool:
    return (path / CONFIG).exists() or (path / ADAPTER_CONFIG).exists()


def read_huggingface(path: Path, step: int = -1, verify: bool = False) -> Contents:
    """Of a folder. `step` and `verify` change nothing: it has one model, and no recorded hashes.

    Raises UserError if one of its files is damaged.
    """
    adapter = not (path / CONFIG).exists()
    settings = read_json(path / (ADAPTER_CONFIG if adapter else CONFIG), dict[str, Any])
    files = files_in(path)
    graphs = files_in(path / "onnx") if (path / "onnx").is_dir() else []
    found = Contents("huggingface", path, settings=settings)
    found.files = sizes_of([file for file in [*files, *graphs] if file.suffix in KINDS_OF_WEIGHTS + SMALL_FILES])
    found.tensors = weights_of(files)
    if adapter:
        base, rank = settings.get("base_model_name_or_path"), settings.get("r")
        found.notes.append(f"an adapter of PEFT (rank {rank!s:.20}) for {base!s:.200}; it holds no model of its own")
    elif unread := [file.name for file in files if file.suffix in (".bin", ".pt", ".pth")]:
        found.notes.append(f"not read, as pickles may run code: {', '.join(unread[:5])}")
    about = read_about(path)
    if about:
        found.route = str(about["route"])
        use_about(found, about)
    else:
        found.route = ROUTE_OF.get(str(settings.get("model_type")), "")
    if found.route in ROUTES:
        read_ours(found, path, about)
    if (path / "tokenizer.json").exists():
        found.tokenizer = tokenizer_of(path, found)
    return found


def tokenizer_of(path: Path, found: Contents) -> TokenizerFacts:
    """The folder's tokenizer; where its model is one of ours and the tokenizer is not, with a note."""
    facts = read_tokenizer_facts(path)
    if found.route and not facts.hash:
        try:
            read_tokenizer(path)
        except UserError as error:
            found.notes.append(f"nanochat cannot use its tokenizer: {error}")
    return facts


def weights_of(files: list[Path]) -> dict[str, TensorFacts]:
    """The tensors of all safetensors files, which may be shards. Links are followed: the hub's cache has them."""
    found: dict[str, TensorFacts] = {}
    for file in files:
        if file.suffix == ".safetensors":
            for name, tensor in tensors_of(file, follow_links=True).items():
                if name in found:
                    raise UserError(f"{file.parent} has {name} in two files; delete the one that does not belong to it")
                found[name] = tensor
    return found


def read_ours(found: Contents, path: Path, about: NanochatFile | None) -> None:
    """Fill in what is known of a network that nanochat can build: its config, and its tensors under GPT's names."""
    kind = ROUTES[found.route]
    try:
        config = kind.read_config(found.settings, path / CONFIG)
    except UserError as error:
        if about:  # it was written here, so it is damaged
            raise
        found.notes.append(f"nanochat cannot import it: {error}")
        found.route = ""
        return
    found.config = config
    ours = {theirs: name for name, theirs in kind.names(config).items()}
    found.tensors = {ours.get(name, name): tensor for name, tensor in found.tensors.items()}
    if found.tensors and (problems := misfits(found)):
        found.notes.append(f"the weights do not fit config.json: {'; '.join(problems[:3])}")


def use_about(found: Contents, about: NanochatFile) -> None:
    """Fill in what nanochat.json says: the network and its training."""
    found.config = GPTConfig.from_dict(about["model_config"], found.path / ABOUT)
    found.stage, found.meta = about["source"], dict(about.get("meta", {}))
    found.meta["tokenizer_hash"] = about["tokenizer_hash"]
    found.run = str(found.meta.get("model_tag", ""))


def misfits(found: Contents) -> list[str]:
    """Parameters that are missing, extra, or of another shape than the config's network has."""
    assert found.config
    parameters = parameter_shapes(found.config)
    problems = [f"{name} is missing" for name in parameters if name not in found.tensors]
    for name, tensor in found.tensors.items():
        shape = parameters.get(name)
        if shape is None:
            problems.append(f"{name} is not in the model")
        elif padded_shape(name, tensor.shape, found.config) != shape:
            problems.append(f"{name} has shape {tensor.shape}, the model's has {shape}")
    return problems
