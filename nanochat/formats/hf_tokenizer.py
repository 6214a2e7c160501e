"""A tokenizer in Hugging Face's files: written with the same ids, and read back from them.

tokenizer.json          vocabulary, merges and split pattern, for the `tokenizers` library
tokenizer_config.json   which tokens begin, end and pad a text; the chat template again, for older versions
chat_template.jinja     a conversation as text (chat models)

Text here never encodes to a special token. Hugging Face's tokenizer finds special tokens in any text, a rendered
conversation included, so the template marks `<|` in contents, and a normalizer takes the marks away after the special
tokens have been found.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write, first_line, write_json
from nanochat.formats.bpe_merges import derive_merges, to_byte_level
from nanochat.tokenizer import MAX_WHITESPACE_RUN, SPLIT_PATTERN, RustBPETokenizer

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MARK = "\ufdd0"  # a noncharacter, which text does not contain; a single one after `<` is taken away
# Cuts long runs as nanochat.tokenizer does (Python's \s has four characters more). From a run's beginning or the last
# cut on: a search from every character would take quadratic time.
LONG_WHITESPACE = rf"(?:\G|(?<![\s\x1c-\x1f]))[\s\x1c-\x1f]{{{MAX_WHITESPACE_RUN}}}"


def token_roles(chat: bool) -> dict[str, str]:
    """The special tokens that begin, end and pad a text.

    A base model's documents end where the next one begins. Padding is the end token: generate() takes any other pad
    token that it finds in a prompt for padding, and would mask it.
    """
    end = "<|assistant_end|>" if chat else "<|bos|>"
    return {"bos_token": "<|bos|>", "eos_token": end, "pad_token": end}


def chat_template() -> str:
    """The Jinja template that renders conversations as nanochat.conversation does."""
    text = (resources.files("nanochat.formats") / TEMPLATE_FILE).read_text("utf-8")
    return text.replace("\\ufdd0", MARK)  # as a character: not every Jinja engine knows the escape


def write_tokenizer(tokenizer: RustBPETokenizer, folder: Path, chat: bool, sequence_len: int) -> None:
    """Write the tokenizer's files into `folder`; `chat`: with the chat template.

    Raises UserError if it cannot be written with the same ids.
    """
    write_json(folder / TOKENIZER_FILE, _tokenizer_json(tokenizer))
    template = {"chat_template": chat_template()} if chat else {}
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
    if tokenizer.pattern != SPLIT_PATTERN:
        raise UserError(f"the tokenizer splits text by another pattern than this program's: {tokenizer.pattern!r:.200}")
    specials = tokenizer.special_ids
    tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.get_vocab_size() - len(specials))]
    if taken := set(specials) & {to_byte_level(token) for token in tokens}:
        raise UserError(f"the vocabulary has an ordinary token with the name of the special token {min(taken)}")
    try:
        merges = derive_merges(tokens)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be exported: {first_line(error)}") from error
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in specials.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": f"<{MARK}"}, "content": "<"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                _split(LONG_WHITESPACE, "MergedWithPrevious"),
                _split(tokenizer.pattern, "Isolated"),
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [specials["<|bos|>"]], "tokens": ["<|bos|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
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
            "merges": [list(map(to_byte_level, pair)) for pair in merges.values() if pair],
        },
    }


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
