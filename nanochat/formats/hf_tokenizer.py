"""A tokenizer in Hugging Face's files: written with the same ids, and read back from them.

tokenizer.json          vocabulary, merges and split pattern, for the `tokenizers` library
tokenizer_config.json   which tokens begin, end and pad a text; the chat template again, for older versions
chat_template.jinja     a conversation as text (chat models)

Text here never encodes to a special token. Hugging Face's tokenizer finds special tokens in any text, a rendered
conversation included, so the template marks their names in contents, and a normalizer takes the marks away after the
special tokens have been found.
"""

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import FailFast, Field
from typing_extensions import TypedDict

from nanochat.common import UserError, atomic_write, first_line, write_json
from nanochat.common.files import read_json
from nanochat.formats.bpe_merges import derive_merges, from_byte_level, to_byte_level
from nanochat.tokenizer import MAX_WHITESPACE_RUN, SPLIT_PATTERN, RustBPETokenizer

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MARK = "\ufdd0"  # a noncharacter, which text does not contain; a single one after `<` is taken away
# Cuts long runs as nanochat.tokenizer does (Python's \s has four characters more). From a run's beginning or the last
# cut on: a search from every character would take quadratic time.
LONG_WHITESPACE = rf"(?:\G|(?<![\s\x1c-\x1f]))[\s\x1c-\x1f]{{{MAX_WHITESPACE_RUN}}}"


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


UNMARK = {"type": "Replace", "pattern": {"String": f"<{MARK}"}, "content": "<"}
CUT_WHITESPACE = _split(LONG_WHITESPACE, "MergedWithPrevious")


def is_known_pattern(pattern: str) -> bool:
    """Whether Hugging Face's regex engine is known to split alike: this program's pattern, with digits in groups of
    any size."""
    return re.sub(r"\\p\{N\}(\{1,[1-9]\})?\|", lambda _: r"\p{N}{1,2}|", pattern) == SPLIT_PATTERN


def token_roles(chat: bool) -> dict[str, str]:
    """The special tokens that begin, end and pad a text.

    A base model's documents end where the next one begins. Padding is the end token: generate() takes any other pad
    token that it finds in a prompt for padding, and would mask it.
    """
    end = "<|assistant_end|>" if chat else "<|bos|>"
    return {"bos_token": "<|bos|>", "eos_token": end, "pad_token": end}


def chat_template(tokenizer: RustBPETokenizer) -> str:
    """The Jinja template that renders conversations as nanochat.conversation does.

    Raises UserError if a special token cannot be marked in contents.
    """
    names = list(tokenizer.special_ids)
    if other := [name for name in names if not name.startswith("<")]:
        raise UserError(f"the special token {other[0]!r:.60} does not begin with '<', as the chat template needs it to")
    text = (resources.files("nanochat.formats") / TEMPLATE_FILE).read_text("utf-8")
    values = {
        "mark = MARK": f'mark = "{MARK}"',
        "special_tokens = SPECIAL_TOKENS": f"special_tokens = {json.dumps(names)}",
    }
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def write_tokenizer(tokenizer: RustBPETokenizer, folder: Path, chat: bool, sequence_len: int) -> None:
    """Write the tokenizer's files into `folder`; `chat`: with the chat template.

    Raises UserError if it cannot be written with the same ids.
    """
    write_json(folder / TOKENIZER_FILE, _tokenizer_json(tokenizer))
    template = {"chat_template": chat_template(tokenizer)} if chat else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **token_roles(chat),
        "extra_special_tokens": {},
        "model_max_length": sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **template,
    }
    write_json(folder / CONFIG_FILE, config)
    if chat:
        with atomic_write(folder / TEMPLATE_FILE, "w") as file:
            file.write(template["chat_template"])


def _tokenizer_json(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    if not is_known_pattern(tokenizer.pattern):
        raise UserError(f"no export is known for a tokenizer with this split pattern: {tokenizer.pattern!r:.200}")
    specials = tokenizer.special_ids
    tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.get_vocab_size() - len(specials))]
    if taken := set(specials) & {to_byte_level(token) for token in tokens}:
        raise UserError(f"the vocabulary has an ordinary token with the name of the special token {min(taken)}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in specials.items()],
        "normalizer": UNMARK,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [CUT_WHITESPACE, _split(tokenizer.pattern, "Isolated"), byte_level],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [specials["<|bos|>"]], "tokens": ["<|bos|>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, also where merging does not reach it
            "vocab": {to_byte_level(token): rank for rank, token in enumerate(tokens)},
            "merges": _merges(tokens),
        },
    }


def _merges(tokens: Sequence[bytes]) -> list[list[str]]:
    try:
        return [list(map(to_byte_level, pair)) for pair in derive_merges(tokens).values() if pair]
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be exported: {first_line(error)}") from error


# ---------------------------------------------------------------------------------------------------
# Reading


class AddedToken(TypedDict):
    id: int
    content: Annotated[str, Field(max_length=1000)]
    special: bool


class Model(TypedDict):
    type: Literal["BPE"]
    vocab: Annotated[dict[str, int], FailFast()]
    merges: Annotated[list[str | tuple[str, str]], FailFast()]
    dropout: NotRequired[float | None]
    continuing_subword_prefix: NotRequired[str | None]
    end_of_word_suffix: NotRequired[str | None]
    byte_fallback: NotRequired[bool]
    ignore_merges: NotRequired[bool]


class FileContent(TypedDict):
    """The fields that ids depend on. Padding, truncation and what is put around a text are the caller's choice here."""

    added_tokens: Annotated[list[AddedToken], Field(max_length=1000), FailFast()]
    normalizer: Any
    pre_tokenizer: Any
    decoder: Any
    model: Model


def read_tokenizer(folder: Path) -> RustBPETokenizer:
    """The tokenizer of `folder`'s tokenizer.json, which another program may have written.

    Raises UserError, with the reason, unless this program gives the same ids with the same vocabulary.
    """
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: copy the tokenizer's files there from the folder the model was made from")
    content: FileContent = read_json(path, FileContent)
    try:
        pattern, model = _split_pattern(content), content["model"]
        if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
            raise ValueError("its model has dropout, a prefix or a suffix")
        specials = sorted(content["added_tokens"], key=lambda token: token["id"])
        names = [token["content"] for token in specials]
        if not all(token["special"] for token in specials):
            raise ValueError("it has added tokens that are not special")
        ids = {name: id for name, id in model["vocab"].items() if name not in set(names)}
        tokens = [from_byte_level(name) for name in sorted(ids, key=ids.__getitem__)]
        if sorted([*ids.values(), *(token["id"] for token in specials)]) != list(
            range(len(tokens) + len(specials))
        ) or (specials and specials[0]["id"] != len(tokens)):
            raise ValueError("the ids have holes, or special tokens stand among the others")
        _check_merges(model, tokens)
        return RustBPETokenizer(pattern, tokens, names)
    except ValueError as error:
        raise UserError(f"{path} has a tokenizer that this program does not have: {first_line(error)}") from error


def _split_pattern(content: FileContent) -> str:
    """The pattern by which text is split. Raises ValueError if anything else happens to text before it is merged."""
    if any(step != UNMARK for step in _steps(content["normalizer"], "normalizers")):
        raise ValueError("it normalizes text")
    steps = [step for step in _steps(content["pre_tokenizer"], "pretokenizers") if step != CUT_WHITESPACE]
    try:
        split, to_bytes = steps
        pattern = split["pattern"]["Regex"]
        byte_level = to_bytes["type"] == "ByteLevel" and not to_bytes["add_prefix_space"] and not to_bytes["use_regex"]
        if split != _split(pattern, "Isolated") or not byte_level or content["decoder"]["type"] != "ByteLevel":
            raise ValueError
        if not is_known_pattern(pattern):
            raise ValueError(f"it splits text by {pattern!r:.60}")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            str(error) if "splits" in str(error) else "it is no byte-level BPE split by a pattern"
        ) from None
    return pattern


def _steps(value: Any, key: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if value is None:
        return []
    inner = value.get(key) if isinstance(value, dict) and value.get("type") == "Sequence" else None
    return inner if isinstance(inner, list) else [value]


def _check_merges(model: Model, tokens: Sequence[bytes]) -> None:
    """Raise ValueError unless the merges give the ids that the ranks of `tokens` give.

    They must have each token's last merge, in the order of ranks. Others may stand beside it (some converters write
    every pair that makes up a token): no such pair ever meets.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    left_out = {token: pair for token, pair in derive_merges(tokens).items() if pair or not model.get("ignore_merges")}
    last = -1
    for merge in model["merges"]:
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        pair = from_byte_level(left), from_byte_level(right)
        rank = ranks.get(pair[0] + pair[1], -1)
        if rank < last or rank < 0 or pair[0] not in ranks or pair[1] not in ranks:
            raise ValueError(f"the merge {left!r:.40} {right!r:.40} does not follow from the vocabulary")
        last = rank
        if left_out.get(tokens[rank]) == pair:
            del left_out[tokens[rank]]
    if left_out:
        raise ValueError(f"there is no merge for the token {to_byte_level(next(iter(left_out)))!r:.40}")
