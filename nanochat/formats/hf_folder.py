"""A Hugging Face folder: weights, config, tokenizer, chat template and model card."""

from pathlib import Path

from nanochat.formats.portable import PortableModel, new_folder


def write_hf(model: PortableModel, out: Path, dtype: str) -> None:
    """Create the folder `out`. Raises UserError if it exists."""
    with new_folder(out):
        raise NotImplementedError
