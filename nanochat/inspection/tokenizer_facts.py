"""What a tokenizer's file says: its vocabulary, special tokens and hash, and the tokens themselves to compare."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from nanochat.common import UserError
from nanochat.common.files import check_value, read_json
from nanochat.formats.bpe_merges import from_byte_level
from nanochat.formats.hf_tokenizer import read_tokenizer
from nanochat.formats.portable import part
from nanochat.tokenizer import FORMAT, RustBPETokenizer


@dataclass
class TokenizerFacts:
    """A vocabulary. `hash` is of nanochat's own tokenizers, also where another program's file holds one."""

    kind: str  # nanochat, or the model's name in a Hugging Face file: BPE, Unigram
    vocab_size: int
    special_tokens: list[str]
    hash: str = ""
    tokens: Callable[[], list[bytes | str]] = field(default=list, repr=False)  # in the order of their ids


class AddedToken(TypedDict):
    id: NonNegativeInt
    content: str


class HFModel(TypedDict):
    type: NotRequired[str]  # older files lack it
    vocab: dict[str, NonNegativeInt] | list[tuple[str, float]]


class HFFile(TypedDict):
    """The fields of a Hugging Face tokenizer.json that are read."""

    model: HFModel
    added_tokens: list[AddedToken]


def read_tokenizer_facts(folder: Path) -> TokenizerFacts:
    """Of FOLDER/tokenizer.json, in nanochat's or in Hugging Face's format. Raises UserError."""
    path = folder / "tokenizer.json"
    content = read_json(path, dict[str, Any])
    if content.get("format") == FORMAT:
        return facts_of(RustBPETokenizer.from_directory(folder))
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is neither a tokenizer of nanochat nor one of Hugging Face")
    with contextlib.suppress(UserError):  # another program's file of a tokenizer of ours
        return facts_of(read_tokenizer(folder))
    return foreign_facts(content, path)


def facts_of(tokenizer: RustBPETokenizer) -> TokenizerFacts:
    """Of a tokenizer of ours."""
    ordinary = tokenizer.get_vocab_size() - len(tokenizer.special_ids)

    def tokens() -> list[bytes | str]:
        return [*(tokenizer.decode_bytes([token]) for token in range(ordinary)), *tokenizer.special_ids]

    return TokenizerFacts("nanochat", tokenizer.get_vocab_size(), list(tokenizer.special_ids), tokenizer.hash, tokens)


def foreign_facts(content: dict[str, Any], path: Path) -> TokenizerFacts:
    """Of another program's vocabulary."""
    given = {"added_tokens": content.get("added_tokens") or [], "model": content["model"]}
    saved = check_value(given, path, HFFile, extra="ignore")
    vocab = saved["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {token: index for index, (token, _) in enumerate(vocab)}
    added = {token["content"]: token["id"] for token in saved["added_tokens"]}
    merged = {**ids, **added}
    byte_level = part(content, "decoder").get("type") == "ByteLevel"

    def token_of(name: str) -> bytes | str:
        if byte_level and name not in added:
            with contextlib.suppress(ValueError):
                return from_byte_level(name)
        return name

    def tokens() -> list[bytes | str]:
        return [token_of(name) for name in sorted(merged, key=lambda name: merged[name])]

    return TokenizerFacts(saved["model"].get("type", "unnamed"), len(merged), list(added), tokens=tokens)
