"""Grammars: which tokens may come next so that the whole answer matches a JSON schema, a regular expression or one of
several choices.

A grammar is a string that travels with a GenerationRequest; `json_grammar`, `regex_grammar` and `choice_grammar` make
one. A sequence follows it with a Guide: llguidance gives a mask of the vocabulary for every token (5 to 400 µs). The
end token is allowed exactly where the text so far matches; other special tokens, which have no text, never are.

Whatever a client sends must compile in about a second and keep a step short: see LIMITS and the checks of a schema.
Shapes: V vocabulary.
"""

import functools
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch

from nanochat.common import SPECIAL_TOKENS, UserError
from nanochat.conversation import Tokenizer, end_tokens

MAX_GRAMMAR_CHARS = 50_000  # the time to compile grows with the square of an object's properties
MAX_REGEX_CHARS = 10_000  # that time grows with the square of its length: `(a)?` written 10,000 times takes seconds
MAX_MULTIPLE = 100_000  # least common multiple of all multipleOf: llguidance builds an automaton of as many states
MAX_NUMBER = 2**53  # larger ones would be rounded, or cut off at 2**63
CACHED_GRAMMARS = 64  # compiled
LIMITS = {  # of the work for a grammar and for a token; beyond them a grammar is refused, or ends the answer
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 20_000,  # about 10 ms
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,  # of 1 to 2 KB each
    "max_grammar_size": 60_000,
    "verbose_errors": False,
}
BIASES_OF_BYTE = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
BIASES_OF_BYTE = BIASES_OF_BYTE.astype(np.float32)  # (256, 8) of a byte of a bit mask
WHITESPACE = r" |\n {0,20}"  # between the elements of JSON; without a bound small models write nothing but blanks

CONSTRAINTS = """anyOf oneOf allOf $ref const enum type items additionalItems prefixItems minItems maxItems properties
additionalProperties patternProperties required minProperties maxProperties minLength maxLength pattern format minimum
maximum exclusiveMinimum exclusiveMaximum multipleOf"""  # that llguidance implements; it refuses what it does in part
ANNOTATIONS = """$anchor $defs definitions $schema $id id $comment title description default readOnly writeOnly
deprecated example examples contentMediaType contentEncoding discriminator"""  # say nothing about validity
KEYWORDS = frozenset([*CONSTRAINTS.split(), *ANNOTATIONS.split()])  # of schemas


# ---------------------------------------------------------------------------------------------------
# Making grammars


def json_grammar(schema: dict[str, Any] | bool) -> str:
    """The grammar of JSON values that match a schema. Raises UserError for a keyword that cannot be followed."""
    from llguidance import LLMatcher

    if schema is False:
        raise UserError("the schema false matches nothing")
    schema = {} if schema is True else schema
    check_schema(schema)
    text = _checked(json.dumps(schema), "schema")
    overrides: Any = {"lenient": False, "coerce_one_of": False, "whitespace_pattern": WHITESPACE}
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=overrides)
    except ValueError as error:
        raise UserError(f"the schema cannot be followed: {_first_line(str(error))}") from error


def regex_grammar(pattern: str) -> str:
    """The grammar of texts that match a regular expression (Rust's syntax) from beginning to end."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(_checked(pattern, "regular expression", MAX_REGEX_CHARS))


def choice_grammar(choices: Sequence[str]) -> str:
    """The grammar of these texts."""
    from llguidance import LLMatcher

    alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return LLMatcher.grammar_from_lark(_checked(f"start: {alternatives}", "list of choices"))


def check_schema(schema: dict[str, Any]) -> None:
    """Raise UserError for what llguidance would ignore, get wrong or need too long for."""
    if not all(abs(number) <= MAX_NUMBER for number in numbers(schema)):
        raise UserError("the schema has a number beyond 2**53, which is not supported")
    multiple = 1
    for path, part in subschemas(schema):
        for keyword in part:
            vendor = keyword.startswith("x-") and keyword != "x-guidance"  # the latter would set llguidance's options
            if keyword not in KEYWORDS and not vendor:
                raise UserError(f"the schema keyword {keyword!r} at {path} is not supported")
        named = part.get("patternProperties")
        for pattern in (part.get("pattern"), *(named if isinstance(named, dict) else ())):
            if isinstance(pattern, str):
                _checked(pattern, f"pattern at {path}", MAX_REGEX_CHARS)
        least, required = part.get("minProperties"), part.get("required")
        # Names that the schema does not list may be written twice, which counts once.
        if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
            raise UserError(f"the schema keyword 'minProperties' at {path} is supported up to the number of 'required'")
        if narrow := narrow_exclusive_bound(part):
            raise UserError(f"the schema keyword {narrow!r} at {path} is not supported for bounds less than 1 apart")
        multiple = math.lcm(multiple, _coefficient(part.get("multipleOf")))
    if multiple > MAX_MULTIPLE:
        raise UserError(f"the schema keyword 'multipleOf' is supported up to {MAX_MULTIPLE:,}, for all values together")


def narrow_exclusive_bound(part: dict[str, Any]) -> str | None:
    """A keyword that llguidance takes as inclusive: an exclusive whole bound with the other bound less than 1 away."""
    for exclusive, others in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
    ):
        bound: Any = part.get(exclusive)
        near = (_is_number(part.get(name)) and 0 < abs(part[name] - bound) < 1 for name in others)
        if _is_number(bound) and bound == int(bound) and any(near):
            return exclusive
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value of JSON. Not recursive, as a client chooses the depth."""
    stack = [value]
    while stack:
        part = stack.pop()
        if _is_number(part):
            yield part
        elif isinstance(part, dict | list):
            stack += part.values() if isinstance(part, dict) else part


def _coefficient(number: Any) -> int:
    """The digits of a positive number without its power of ten."""
    if not _is_number(number) or number <= 0:
        return 1  # llguidance refuses it
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits)))


def subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of a schema and of all within it. Not recursive, as a client chooses the depth."""
    stack: list[tuple[str, Any]] = [("#", schema)]
    while stack:
        path, part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield path, part
        for keyword, value in part.items():
            here = f"{path}/{keyword}"
            if keyword in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
                stack += [(f"{here}/{name}", each) for name, each in value.items()]
            elif keyword in ("anyOf", "oneOf", "allOf", "prefixItems", "items") and isinstance(value, list):
                stack += [(f"{here}/{index}", each) for index, each in enumerate(value)]
            elif keyword in ("items", "additionalItems", "additionalProperties"):
                stack.append((here, value))


def _checked(text: str, name: str, max_chars: int = MAX_GRAMMAR_CHARS) -> str:
    if len(text) > max_chars:
        raise UserError(f"the {name} has {len(text):,} characters, at most {max_chars:,} are supported")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(f"the {name} has half a surrogate pair, which is no text")
    return text


def _first_line(error: str) -> str:
    """The line of an error that says what is wrong: those of regular expressions show the expression first."""
    lines = error.splitlines() or ["unknown error"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])[:300]


# ---------------------------------------------------------------------------------------------------
# Following grammars


def _error(matcher: Any) -> str:
    return _first_line(matcher.get_error()) if matcher.is_error() else ""


class _Vocabulary:
    """A tokenizer as llguidance takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.encode_special("<|assistant_end|>")
        self.special_token_ids = [tokenizer.encode_special(name) for name in SPECIAL_TOKENS]
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.get_vocab_size())]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


class Guide:
    """The position of one sequence in its grammar. `bias` (V): what is added to the logits of the next token, 0 or, for
    a token that must not come, -inf."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._compute()

    def advance(self, token: int) -> bool:
        """Follow a token. False if llguidance's limits were reached, so that the grammar cannot be followed on."""
        self._matcher.consume_token(token)
        self._compute()
        return not self.error

    @property
    def allowed(self) -> torch.Tensor:
        """Ids of the tokens that may come next."""
        return (self.bias == 0).nonzero().flatten()

    def _compute(self) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self.bias = torch.from_numpy(BIASES_OF_BYTE[bits].reshape(-1)[: self._vocab_size])
        self.error = _error(self._matcher) or ("" if bits.any() else "no token may come next")


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLParserLimits, LLTokenizer

        vocabulary: Any = _Vocabulary(tokenizer)
        self._ends, self._vocab_size = end_tokens(tokenizer), tokenizer.get_vocab_size()
        self._tokenizer = LLTokenizer(vocabulary, eos_token=sorted(self._ends))
        self._limits = LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, grammar: str) -> Guide:
        """A guide at the beginning of the grammar. Raises UserError if it cannot be followed."""
        with self._lock:
            if matcher := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return Guide(matcher.deep_copy(), self._vocab_size)
        matcher = self._compile(grammar)  # not under the lock, it may take a second
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
            return Guide(matcher.deep_copy(), self._vocab_size)

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        error = _error(matcher)
        if not error:  # llguidance works lazily: try the first token
            guide = Guide(matcher.deep_copy(), self._vocab_size)
            first = int(guide.allowed[0])  # an end token if there is no other, also after an error
            error = guide.error or (first not in self._ends and not guide.advance(first) and guide.error) or ""
        if error == "NoExtensionBias":
            raise UserError("nothing matches the grammar")
        if error:
            raise UserError(f"the grammar cannot be followed: {error}")
        return matcher


@functools.lru_cache(maxsize=4)
def _compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def grammar_compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    """The compiler of a tokenizer, shared by all who have the tokenizer."""
    shared: Any = tokenizer
    return _compiler(shared)
