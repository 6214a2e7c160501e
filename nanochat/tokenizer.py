"""Byte-pair encoding: trained with rustbpe, encoded with tiktoken, saved as readable JSON.

All 256 single bytes are tokens, so every text of any language encodes. The ids of special tokens follow those of the
merges, and only code writes them: text that spells a special token is ordinary text.
"""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, overload

import rustbpe
import tiktoken
from pydantic import FailFast, Field
from typing_extensions import TypedDict

from nanochat.common import SPECIAL_TOKENS, UserError, atomic_write, first_line, get_base_dir, warn
from nanochat.common.files import check_value, read_json
from nanochat.conversation import Conversation, Rendered, render, render_prompt

# GPT-4's split pattern, with digits in groups of at most two: a small vocabulary has no room for a thousand
# three-digit tokens.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
FILE_NAME = "tokenizer.json"
FORMAT, VERSION = "nanochat-tokenizer", 1

# The pattern backtracks once per character of a run of white space, and the regex engine's stack overflows somewhere
# below a million: longer runs are split before it sees them.
MAX_WHITESPACE_RUN = 20_000
# Given to a thread at a time: single documents would cost more to hand over than they gain, and with large groups the
# threads would not end together.
GROUP_CHARS, MIN_GROUP_CHARS, GROUPS_PER_THREAD = 64_000, 8_000, 4
LONG_WHITESPACE = re.compile(rf"\s{{{MAX_WHITESPACE_RUN}}}")


class FileContent(TypedDict):
    """The fields of the file that are read by themselves; the others follow from them."""

    pattern: Annotated[str, Field(max_length=1000)]
    special_tokens: Annotated[list[str], Field(max_length=1000)]
    tokens: Annotated[list[tuple[str, int, str | None]], FailFast()]  # base64, bytes, text


class RustBPETokenizer:
    """A byte-pair vocabulary with its special tokens. Immutable and thread-safe."""

    def __init__(self, pattern: str, tokens: Sequence[bytes], special_tokens: Sequence[str] = SPECIAL_TOKENS):
        """`pattern` splits text before merging; `tokens` are the raw bytes of each token, in rank order.

        Raises ValueError if these are not a vocabulary.
        """
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise ValueError("a token appears twice")
        if not all(bytes([value]) in ranks for value in range(256)) or b"" in ranks:
            raise ValueError("the tokens must include all 256 single bytes, and no empty one")
        if len(set(special_tokens)) != len(special_tokens) or not set(SPECIAL_TOKENS) <= set(special_tokens):
            raise ValueError(f"the special tokens must be distinct and include {' '.join(SPECIAL_TOKENS)}")
        self.pattern = pattern
        self.special_ids = {name: len(tokens) + index for index, name in enumerate(special_tokens)}
        self.token_bytes = [len(token) for token in tokens] + [0] * len(special_tokens)
        self.hash = _content_hash(pattern, tokens, special_tokens)
        self._tokens = list(tokens)
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> "RustBPETokenizer":
        """Train a vocabulary of vocab_size tokens, special tokens included, on texts.

        A corpus with too few distinct words gives a smaller vocabulary, with a warning. The result depends on the texts
        alone, not on their order or the number of threads. Raises UserError if vocab_size is too small or there is no
        text.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"--vocab-size must be at least {MIN_VOCAB_SIZE} (256 bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens), got {vocab_size}"
            )
        seen_text = False

        def pieces() -> Iterator[str]:
            nonlocal seen_text
            for text in text_iterator:
                seen_text = seen_text or bool(text)
                yield from encodable_pieces(text)

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(pieces(), vocab_size - len(SPECIAL_TOKENS), buffer_size=1024, pattern=SPLIT_PATTERN)
        if not seen_text:
            raise UserError("there is no text to train the tokenizer on; check --data")
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        tokenizer = cls(SPLIT_PATTERN, [bytes(token) for token, _ in by_rank])
        if tokenizer.get_vocab_size() < vocab_size:
            warn(
                f"the corpus has too few words for {vocab_size:,} tokens; the vocabulary has "
                f"{tokenizer.get_vocab_size():,}"
            )
        return tokenizer

    # -----------------------------------------------------------------------------------------------
    # Files

    @classmethod
    def from_directory(cls, directory: Path | str) -> "RustBPETokenizer":
        """Load DIRECTORY/tokenizer.json. Raises UserError if it is missing, damaged or of another version."""
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise UserError(f"{path} does not exist; train a tokenizer first: python -m scripts.tok_train")
        content = read_json(path, dict[str, Any])
        if content.get("format") != FORMAT:
            raise UserError(f"{path} is not a nanochat tokenizer; train one with python -m scripts.tok_train")
        if content.get("version") != VERSION:
            raise UserError(
                f"{path} has version {content.get('version')!r:.40}, this program reads version {VERSION}; "
                "train the tokenizer again, or use the program that wrote it"
            )
        saved = check_value(content, path, FileContent)
        try:
            tokens = [base64.b64decode(text, validate=True) for text, _, _ in saved["tokens"]]
            tokenizer = cls(saved["pattern"], tokens, saved["special_tokens"])
            tokenizer.check_pattern()
            expected = {**tokenizer._head(), "tokens": [_row(token) for token in tokens]}
        except ValueError as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); restore it or train it again") from error
        if content != expected:
            raise UserError(f"{path} is damaged: its contents do not match its hash; restore it or train it again")
        return tokenizer

    def save(self, directory: Path | str) -> Path:
        """Write DIRECTORY/tokenizer.json atomically, one token a line; returns its path."""
        path = Path(directory) / FILE_NAME
        with atomic_write(path, "w") as file:
            file.write(json.dumps(self._head(), indent=1).removesuffix("\n}"))
            file.write(',\n "tokens": [\n  ' + ",\n  ".join(map(_row_line, self._tokens)) + "\n ]\n}\n")
        return path

    def check_pattern(self) -> None:
        """Raise ValueError if the pattern loses text; if it matches nothing at all, tiktoken panics."""
        text = "The 2nd line's\n\n  end: naïve!"
        try:
            kept = self.decode(self.encode(text)) == text
        except BaseException as error:
            if isinstance(error, Exception | KeyboardInterrupt | SystemExit):
                raise
            kept = False
        if not kept:
            raise ValueError("its pattern loses text")

    def _head(self) -> dict[str, Any]:
        """The file's fields before the tokens."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "hash": self.hash,
            "vocab_size": self.get_vocab_size(),
            "pattern": self.pattern,
            "special_tokens": list(self.special_ids),
            "columns": ["base64", "bytes", "text"],
        }

    # -----------------------------------------------------------------------------------------------
    # Text to ids and back

    @overload
    def encode(
        self, text: str, prepend: str | int | None = None, append: str | int | None = None, num_threads: int = 2
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: list[str], prepend: str | int | None = None, append: str | int | None = None, num_threads: int = 2
    ) -> list[list[int]]: ...
    def encode(
        self,
        text: str | list[str],
        prepend: str | int | None = None,
        append: str | int | None = None,
        num_threads: int = 2,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or of each text of a list (on num_threads threads).

        `prepend`, `append`: special tokens, by name or id, added to each. The text itself never encodes to a special
        token. A lone surrogate, which is not valid Unicode, becomes U+FFFD.
        """
        before, after = (
            [] if token is None else [self.encode_special(token) if isinstance(token, str) else token]
            for token in (prepend, append)
        )

        def encode_all(texts: list[str]) -> list[list[int]]:
            return [[*before, *self._encode_ordinary(one), *after] for one in texts]

        if isinstance(text, str):
            return encode_all([text])[0]
        if num_threads <= 1:
            return encode_all(text)
        share = sum(map(len, text)) // (GROUPS_PER_THREAD * num_threads)
        groups = list(grouped(text, min(max(share, MIN_GROUP_CHARS), GROUP_CHARS)))
        if len(groups) <= 1:
            return encode_all(text)
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken releases the GIL while it works
            return [ids for group in pool.map(encode_all, groups) for ids in group]

    __call__ = encode

    def _encode_ordinary(self, text: str) -> list[int]:
        if len(text) < MAX_WHITESPACE_RUN:
            return self._encoding.encode_ordinary(text)
        return [token for piece in encodable_pieces(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_special(self, name: str) -> int:
        """The id of a special token such as <|bos|>. Raises ValueError for an unknown name."""
        if name not in self.special_ids:
            raise ValueError(f"{name!r} is not a special token; there are {' '.join(self.special_ids)}")
        return self.special_ids[name]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by name; invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Raw bytes of ids, for streaming: they may end inside a character.

        Raises ValueError for an id outside the vocabulary.
        """
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError) as error:
            last = len(self.token_bytes) - 1
            unknown = next(token for token in ids if not 0 <= token <= last)
            raise ValueError(f"there is no token {unknown}; ids run from 0 to {last}") from error

    # -----------------------------------------------------------------------------------------------
    # Sizes and special ids

    def get_vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.token_bytes)

    def get_bos_token_id(self) -> int:
        """The id of <|bos|>, the first token of every document and conversation."""
        return self.special_ids["<|bos|>"]

    # -----------------------------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation: Conversation, max_tokens: int = 2048) -> Rendered:
        """Ids and mask of a conversation, cut at max_tokens; see conversation.render."""
        return render(self, conversation, max_tokens)

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Prompt ids for the conversation's last answer, which is left out; see conversation.render_prompt."""
        return render_prompt(self, conversation["messages"])


def get_tokenizer(directory: Path | str | None = None) -> RustBPETokenizer:
    """The tokenizer in `directory`, by default the base folder's."""
    return RustBPETokenizer.from_directory(directory or get_base_dir(to_write=False) / "tokenizer")


def grouped(texts: list[str], chars: int) -> Iterator[list[str]]:
    """Consecutive texts in groups of about `chars` characters, or of one longer text."""
    ends = itertools.accumulate(map(len, texts))
    for _, group in itertools.groupby(zip(texts, ends), key=lambda text_end: text_end[1] // chars):
        yield [text for text, _ in group]


def encodable_pieces(text: str) -> Iterator[str]:
    """`text` in pieces that the regex engine can take, nearly always just one.

    A lone surrogate, which has no UTF-8, becomes U+FFFD.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    cuts = (run.end() for run in LONG_WHITESPACE.finditer(text)) if len(text) >= MAX_WHITESPACE_RUN else ()
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        yield text[start:end]


def _row(token: bytes) -> list[Any]:
    """A token's columns in the file: base64, length in bytes, and text if it is valid UTF-8."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    return [base64.b64encode(token).decode("ascii"), len(token), text]


def _row_line(token: bytes) -> str:
    row = _row(token)
    return json.dumps(row, ensure_ascii=not (row[2] or "").isprintable())  # no stray line breaks or controls


def _content_hash(pattern: str, tokens: Sequence[bytes], special_tokens: Sequence[str]) -> str:
    """SHA-256 (hex) of everything that determines the encoding."""
    content = [pattern, [base64.b64encode(token).decode("ascii") for token in tokens], list(special_tokens)]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()
