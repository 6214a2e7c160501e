"""Structured output: the fields that say what an answer must match, as a grammar (nanochat/inference/grammar.py).

response_format             OpenAI's: text, json_object, json_schema; with `schema` beside `type`, llama.cpp's
regex, choice               our own
structured_outputs, guided_*  vLLM's, of today and of before
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from nanochat.common import UserError
from nanochat.conversation import Tokenizer
from nanochat.inference.grammar import choice_grammar, grammar_compiler, json_grammar, regex_grammar
from nanochat.serve.errors import ApiError
from nanochat.serve.known_fields import KnownFields

JSON_OBJECT = {"type": "object"}

Schema = dict[str, Any] | bool | str  # or its JSON
Pattern = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=5000)]


class JsonSchemaFormat(KnownFields):
    """`strict` may be anything: a schema is always followed."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(KnownFields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    object_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class StructuredOutputs(KnownFields):
    json_value: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Pattern | None = None
    choice: Choices | None = None


class StructuredFields(KnownFields):
    """The fields of a request that say what its answer must match: at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    regex: Pattern | None = None
    choice: Choices | None = None


def answer_grammar(tokenizer: Tokenizer, body: StructuredFields) -> str | None:
    """The grammar of the answer, compiled; None for free text. Raises ApiError. May take a second: not for the event
    loop."""
    found = [(name, kind, value) for name, kind, value in _given(body) if value is not None]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(name for name, _, _ in found)
        raise ApiError(400, f"{names}: an answer follows one of them; leave the others out", param=found[1][0])
    ((name, kind, value),) = found
    try:
        grammar = MAKERS[kind](value)
        grammar_compiler(tokenizer).guide(grammar)
    except UserError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from error
    return grammar


def _given(body: StructuredFields) -> list[tuple[str, str, Any]]:
    """(field, what it is, its value) of all fields; the value is None where the request has none."""
    vllm = body.structured_outputs or StructuredOutputs()
    return [
        ("response_format", "json", _format_schema(body.response_format)),
        ("structured_outputs.json", "json", vllm.json_value),
        ("structured_outputs.json_object", "json", JSON_OBJECT if vllm.json_object else None),
        ("structured_outputs.regex", "regex", vllm.regex),
        ("structured_outputs.choice", "choice", vllm.choice),
        ("guided_json", "json", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("regex", "regex", body.regex),
        ("choice", "choice", body.choice),
    ]


def _format_schema(form: ResponseFormat | None) -> Any:
    if form is None:
        return None
    given = [form.object_schema, form.json_schema and form.json_schema.json_schema]
    schemas: list[Any] = [schema for schema in given if schema is not None]
    if len(schemas) > (form.type != "text"):
        raise ApiError(400, "response_format: it has a schema too many", param="response_format")
    if form.type == "json_schema" and not schemas:
        raise ApiError(400, "response_format: json_schema needs a schema", param="response_format.json_schema")
    return schemas[0] if schemas else JSON_OBJECT if form.type == "json_object" else None


def _json_grammar(schema: Any) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the schema is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise UserError("a schema is an object, true or false")
    return json_grammar(schema)


MAKERS: dict[str, Any] = {"json": _json_grammar, "regex": regex_grammar, "choice": choice_grammar}
