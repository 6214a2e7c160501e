"""Grammars: finite languages against a list of their words, random JSON schemas against an independent validator, and
grammars that would take a server down."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_helpers import make_model
from schema_helpers import FORMATS, SchemaMaker
from serve_helpers import TOKENIZER
from stubs import PYTHON, Scripted, stir

from nanochat.common import UserError
from nanochat.conversation import end_tokens
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference.grammar import choice_grammar, grammar_compiler, json_grammar, regex_grammar
from nanochat.inference.request import GenerationRequest, TokenSequence
from nanochat.inference.sampling import SamplingParams
from nanochat.tokenizer import RustBPETokenizer

jsonschema = pytest.importorskip("jsonschema")
MODEL = make_model(vocab_size=265)
NUM_SCHEMAS = 500


@pytest.fixture(scope="module")
def merged() -> RustBPETokenizer:
    """A vocabulary with long tokens."""
    texts = [json.dumps(SchemaMaker(i).make(), indent=i % 3 or None, ensure_ascii=False) for i in range(300)]
    return RustBPETokenizer.train_from_iterator([*texts, "yes no yesterday nobody é日本"] * 2, 600)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------
# The mask


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (choice_grammar(["yes", "no", "yesterday", "é日本"]), ["yes", "no", "yesterday", "é日本"]),
        (choice_grammar(['q"\\\n', "<|bos|>", "a/b|c"]), ['q"\\\n', "<|bos|>", "a/b|c"]),
        (
            regex_grammar("(ab|b){0,2}c?"),
            [w + c for w in ("", "ab", "b", "abab", "abb", "bab", "bb") for c in ("", "c")],
        ),
        (regex_grammar("(?i)no"), ["no", "No", "nO", "NO"]),
        (json_grammar({"enum": ["a", "b", None, 10]}), ['"a"', '"b"', "null", "10"]),
    ],
)
@pytest.mark.parametrize("vocabulary", ["bytes", "merged"])
def test_allowed_tokens_are_those_of_the_words(
    grammar: str, words: list[str], vocabulary: str, merged: RustBPETokenizer
) -> None:
    """At every prefix: a token is allowed if some word goes on with it, the end tokens if the prefix is a word."""
    tokenizer: Any = TOKENIZER if vocabulary == "bytes" else merged
    texts = [tokenizer.decode_bytes([i]) for i in range(tokenizer.get_vocab_size())]
    language, ends, special = {word.encode() for word in words}, end_tokens(tokenizer), len(texts) - 9
    prefixes: list[tuple[int, ...]] = [()]
    for ids in prefixes:
        guide = grammar_compiler(tokenizer).guide(grammar)
        assert all(guide.advance(i) for i in ids)
        prefix = b"".join(texts[i] for i in ids)
        allowed = set(guide.allowed.tolist())
        going_on = {i for i in range(special) if any(word.startswith(prefix + texts[i]) for word in language)}
        expected = going_on | (ends if prefix in language else set())
        if (
            len(going_on) == len(expected)
            and len({word[len(prefix) :] for word in language if word.startswith(prefix)}) == 1
        ):
            assert allowed and allowed <= expected  # one text is left: it may be written in its usual tokens only
        else:
            assert allowed == expected, prefix
        prefixes += [(*ids, i) for i in allowed - ends]
    assert len(prefixes) >= len(words)


def follow(tokenizer: Any, grammar: str, ids: list[int]) -> bool:
    """Whether the tokens are allowed one after the other, and then the end."""
    guide = grammar_compiler(tokenizer).guide(grammar)
    return all(guide.bias[i] == 0 and guide.advance(i) for i in ids) and guide.bias[min(end_tokens(tokenizer))] == 0


def test_usual_json_is_allowed(merged: RustBPETokenizer) -> None:
    value = {"a": [1, 2.5e-3, None, True], "b c": {"é": 'q"\\\n日本'}, "c": {}}
    for text in (json.dumps(value, indent=indent, ensure_ascii=False) for indent in (None, 2, 4)):
        assert follow(merged, json_grammar({"type": "object"}), merged.encode(text))
    assert not follow(merged, json_grammar({"type": "object"}), merged.encode("[]"))


# ---------------------------------------------------------------------------------------------------
# Random schemas


def test_answers_match_random_schemas(merged: RustBPETokenizer, one_thread: None) -> None:
    """A model that knows nothing writes what its schema says, or runs out of tokens. jsonschema is the judge."""
    schemas = [SchemaMaker(seed).make() for seed in range(NUM_SCHEMAS)]
    config = GPTConfig(
        sequence_len=192, vocab_size=merged.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=1, n_embd=16
    )
    bos = merged.get_bos_token_id()
    requests = [
        GenerationRequest([bos], 150, SamplingParams(1.0, seed=seed), grammar=json_grammar(schema))
        for seed, schema in enumerate(schemas)
    ]
    sequences = Engine(stir(GPT.create(config, seed=3)), merged).complete(requests, batch_size=128)
    checker, ended, texts = jsonschema.FormatChecker(FORMATS), 0, set()
    for schema, sequence in zip(schemas, sequences):
        if sequence.end is None:
            assert sequence.room == 0
            continue
        text = merged.decode(sequence.tokens)
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
        ended += 1
        texts.add(text)
    assert ended > 0.75 * NUM_SCHEMAS and len(texts) > 0.5 * NUM_SCHEMAS


# ---------------------------------------------------------------------------------------------------
# In a batch


GRAMMARS = [None, regex_grammar("[a-z]{4,9}"), choice_grammar(["yes", "no"]), None, json_grammar({"type": "integer"})]


def requests(**changes: Any) -> list[GenerationRequest]:
    return [
        GenerationRequest([256, *b"abc"[: 1 + i % 3]], 12, SamplingParams(0.9, seed=i), 2, grammar=grammar, **changes)
        for i, grammar in enumerate(GRAMMARS * 2)
    ]


def answers(sequences: list[TokenSequence]) -> list[tuple[list[int], int | None]]:
    return [(sequence.tokens, sequence.end) for sequence in sequences]


def test_an_answer_is_the_same_alone_and_in_a_batch() -> None:
    engine = Engine(MODEL, TOKENIZER)
    together = answers(engine.complete(requests(), batch_size=7))
    assert together == [found for request in requests() for found in answers(engine.complete([request], 1))]
    assert {TOKENIZER.decode(tokens) for tokens, _ in together[4:6]} <= {"yes", "no"}


def test_free_answers_do_not_change_beside_guided_ones() -> None:
    engine = Engine(MODEL, TOKENIZER)
    free = [request for request in requests() if request.grammar is None]
    mixed = [s for s in engine.complete(requests(), 32) if s.request.grammar is None]
    assert answers(mixed) == answers(engine.complete(free, 32))


def test_log_probabilities_are_those_of_the_free_model() -> None:
    engine = Engine(MODEL, TOKENIZER)
    prompt = [256, *b"abc"]
    request = GenerationRequest(prompt, 8, SamplingParams(seed=1), top_logprobs=0, grammar=regex_grammar("[a-z]+"))
    (sequence,) = engine.complete([request])
    tokens = sequence.tokens + ([sequence.end] if sequence.end else [])
    logits = MODEL(torch.tensor([prompt + sequence.tokens]))[0].float()
    expected = sum(logits[len(prompt) - 1 + i].log_softmax(-1)[token].item() for i, token in enumerate(tokens))
    assert sequence.logprob == pytest.approx(expected, abs=1e-3)


def test_no_tool_is_called_within_a_grammar() -> None:
    model: Any = Scripted({ord("a"): PYTHON})
    engine = Engine(model, TOKENIZER)
    request = GenerationRequest([256, ord("a")], 8, SamplingParams(0.0), grammar=regex_grammar("[b-d]{3}"))
    (sequence,) = engine.complete([request])
    assert sequence.mask == [1, 1, 1] and set(sequence.tokens) <= set(b"bcd") and sequence.end is not None
    (free,) = engine.complete([GenerationRequest([256, ord("a")], 8, SamplingParams(0.0))])
    assert free.tokens[0] == PYTHON


def test_a_model_with_more_ids_than_the_tokenizer() -> None:
    engine = Engine(make_model(vocab_size=300), TOKENIZER)
    request = GenerationRequest([256], 8, SamplingParams(1.0, seed=3), 20, grammar=regex_grammar("[ab]{4}"))
    assert all(set(s.tokens) <= set(b"ab") and s.end is not None for s in engine.complete([request]))


# ---------------------------------------------------------------------------------------------------
# What cannot be followed


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"items": {"not": {"type": "string"}}}}}, "'not' at #/properties/a/items"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "string", "minLenght": 3}, "minLenght"),  # misspelt
        ({"nullable": True, "type": "string"}, "nullable"),
        ({"x-guidance": {"lenient": True}, "type": "string"}, "x-guidance"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"type": "strng"}, "strng"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "number", "exclusiveMinimum": 4, "maximum": 4.5}, "exclusiveMinimum"),
        ({"type": "number", "minimum": -4.5, "exclusiveMaximum": -4.0}, "exclusiveMaximum"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"$ref": "#"}, "nothing"),
        ({"enum": []}, "empty"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "look"),
        (False, "false"),
        ({"type": "number", "minimum": 1e999}, "number"),
        ({"type": "number", "minimum": float("nan")}, "number"),
        ({"type": "integer", "multipleOf": 10**400}, "number"),
        ({"type": "number", "exclusiveMinimum": 10**400, "maximum": 0.5}, "number"),
        ({"type": "integer", "minimum": 10**30, "maximum": 10**30 + 2}, "number"),
        ({"const": {"a": [2**53 + 1]}}, "number"),
        ({"type": "string", "pattern": "a?" * 6000}, "10,000"),
        ({"type": "object", "patternProperties": {"a?" * 6000: {}}}, "10,000"),
        ({"patternProperties": 5}, "object"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        grammar_compiler(TOKENIZER).guide(json_grammar(schema))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "[", "a{2}{", r"[^\s\S]", "\ud800"])
def test_wrong_regular_expressions(pattern: str) -> None:
    with pytest.raises(UserError):
        grammar_compiler(TOKENIZER).guide(regex_grammar(pattern))


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "many choices": lambda: choice_grammar([f"{i}" for i in range(5000)]),
    "enum": lambda: json_grammar({"enum": [f"value number {i * 7919}" for i in range(100_000)]}),
    "long": lambda: json_grammar({"type": "string", "minLength": 10**9, "maxLength": 10**15}),
    "items": lambda: json_grammar({"type": "array", "minItems": 10**15}),
    "deep": lambda: json_grammar(nested(400)),
    "properties": lambda: json_grammar({"type": "object", "properties": {f"{i}": True for i in range(10_000)}}),
    "some properties": lambda: json_grammar({"type": "object", "properties": {f"{i}": True for i in range(3000)}}),
    "references": lambda: json_grammar(
        {
            "$defs": {f"{i}": {"properties": {x: {"$ref": f"#/$defs/{i + 1}"} for x in "ab"}} for i in range(30)}
            | {"30": {}},
            "$ref": "#/$defs/0",
        }
    ),
    "product": lambda: json_grammar(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "string"}}} for j in "abc"]} for i in range(14)]}
    ),
    "multiple": lambda: json_grammar({"type": "integer", "multipleOf": 99_999_989}),
    "multiples": lambda: json_grammar({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
    "repetition": lambda: regex_grammar("x{1000}{1000}"),
    "later repetition": lambda: regex_grammar("[a-z]((x{100}){100}){100}"),
    "backtracking": lambda: regex_grammar("(a+)+b"),
    "alternatives": lambda: regex_grammar("(a|aa|aaa){1000}c"),
    "automaton": lambda: regex_grammar("(.*a.{15}){3}"),
    "classes": lambda: regex_grammar(r"\p{L}{1,5000}"),
    "optional classes": lambda: regex_grammar(r"(\p{L}|\d)?" * 800),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_quick(name: str, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused, or followed in short steps; one that turns out too complex ends the answer early."""
    started = time.process_time()
    try:
        grammar = HOSTILE[name]()
        grammar_compiler(TOKENIZER).guide(grammar)
    except UserError:
        grammar = None
    assert time.process_time() - started < 5
    if grammar is not None:
        started = time.process_time()
        (sequence,) = Engine(MODEL, TOKENIZER).complete([GenerationRequest([256], 50, grammar=grammar)])
        assert time.process_time() - started < 5
        assert sequence.end is not None or sequence.room == 0 or "too complex" in capsys.readouterr().err
        refused = name in ("enum", "deep", "properties", "product", "multiple", "multiples", "repetition")
        assert not refused
