"""The fields of POST /v1/responses, and the GenerationRequest that they become."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from nanochat.inference.request import GenerationRequest
from nanochat.serve.api import Api
from nanochat.serve.errors import ApiError, FieldError
from nanochat.serve.known_fields import HARMLESS, NEUTRAL, Body, KnownFields
from nanochat.serve.messages import MAX_MESSAGES, Content, Message, PromptEnding, chat_request
from nanochat.serve.request_models import MAX_CHARS, GenerationBody, MaxTokens
from nanochat.serve.structured_output import JsonSchemaFormat, ResponseFormat

LOGPROBS = "message.output_text.logprobs"  # in `include`


def as_text_parts(value: Any) -> Any:
    """Parts with their types in /v1/chat/completions."""
    texts = ("input_text", "output_text")
    if not isinstance(value, list):
        return value
    return [{**p, "type": "text"} if isinstance(p, dict) and p.get("type") in texts else p for p in value]


class ItemPart(Body):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None


ItemContent = Annotated[Content, BeforeValidator(as_text_parts, json_schema_input_type=str | list[ItemPart] | None)]


class Item(KnownFields):
    """A message, a call of a tool, its output, or the id of an answer. Reasoning is another model's: skipped."""

    harmless = Message.harmless | {"namespace", "internal_chat_message_metadata_passthrough"}
    neutral: ClassVar = Message.neutral

    type: Literal["message", "function_call", "function_call_output", "item_reference", "reasoning"] = "message"
    id: Annotated[str, Field(max_length=200)] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: ItemContent = None
    call_id: Annotated[str, Field(max_length=200)] = ""
    name: Annotated[str, Field(max_length=200)] = ""
    arguments: str = ""
    output: ItemContent = None

    @model_validator(mode="before")
    @classmethod
    def _skip_reasoning(cls, value: Any) -> Any:
        return {"type": "reasoning"} if isinstance(value, dict) and value.get("type") == "reasoning" else value

    @model_validator(mode="after")
    def _check_fields(self) -> "Item":
        if self.type == "message" and (self.role is None or self.content is None):
            raise ValueError("a message needs a role and content")
        if self.type == "function_call" and not self.name:
            raise ValueError("a function_call needs a name")
        if isinstance(self.output, list) or (isinstance(self.content, list) and self.role != "assistant"):
            raise ValueError("only an assistant message has parts other than text")
        return self

    @property
    def message(self) -> Message:
        if self.type == "function_call":
            call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
            return Message.model_validate({"role": "assistant", "tool_calls": [call]})
        if self.type == "function_call_output":
            return Message.model_validate({"role": "tool", "tool_call_id": self.call_id, "content": self.output})
        return Message.model_validate({"role": self.role, "content": self.content})


def as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextFormat(KnownFields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=200)
    description: str | None = Field(None, max_length=MAX_CHARS)
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(KnownFields):
    harmless = frozenset(["verbosity"])

    format: TextFormat | None = None


class ResponsesRequest(GenerationBody, PromptEnding):
    """POST /v1/responses."""

    harmless = HARMLESS | {"max_tool_calls", "client_metadata"}
    neutral: ClassVar = {
        **NEUTRAL,
        "background": (False,),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
    }

    input: Annotated[
        list[Item],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(as_items, json_schema_input_type=str | list[Item]),
    ]
    instructions: str | None = Field(None, max_length=MAX_CHARS)
    max_output_tokens: MaxTokens = None
    text: TextOptions | None = None
    store: bool | None = None
    include: Annotated[list[str], Field(max_length=20)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None  # only "disabled" refuses what has no room

    @model_validator(mode="after")
    def _format(self) -> "ResponsesRequest":
        if self.n != 1:
            raise FieldError("n", "a response has one answer")
        if self.response_format:
            raise FieldError("response_format", "is text.format here")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise FieldError("top_logprobs", f"needs include: [{LOGPROBS!r}]")
        if self.text and self.text.format:
            form = self.text.format
            if form.type == "json_schema" and form.json_schema is None:
                raise FieldError("text.format.schema", "json_schema needs a schema")
            schema = JsonSchemaFormat(schema=form.json_schema) if form.json_schema is not None else None
            self.response_format = ResponseFormat(type=form.type, json_schema=schema)
        return self

    def messages(self, answers: Mapping[str, str]) -> tuple[list[Message], list[str]]:
        """The instructions and the input as messages, and for each its place in the request. `answers`: texts by id.
        Raises ApiError."""
        found, places = [], []
        if self.instructions:
            found.append(Message.model_validate({"role": "system", "content": self.instructions}))
            places.append("instructions")
        for number, item in enumerate(self.input):
            place = f"input.{number}"
            if item.type == "item_reference":
                text = answers.get(item.id or "")
                if text is None:
                    hint = "send its text instead (AI SDK: the option store: false)"
                    raise ApiError(400, f"{place}: {item.id!r} is not known (any more); {hint}", param=place)
                item = Item(role="assistant", content=text)
            if item.type == "function_call" and found and found[-1].role == "assistant":  # several calls of one turn
                found[-1].tool_calls = [*(found[-1].tool_calls or ()), *(item.message.tool_calls or ())]
            elif item.type != "reasoning":
                found.append(item.message)
                places.append(place)
        return found, places


def generation_request(api: Api, body: ResponsesRequest) -> GenerationRequest:
    """Raises ApiError."""
    messages, places = body.messages(api.recent_answers)
    if not messages:
        raise ApiError(400, "input: there is no message", param="input")
    top_logprobs = (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None
    try:
        request = chat_request(
            api,
            body,
            messages,
            api.limit_tokens(body.max_output_tokens),
            continue_last=body.continue_last,
            top_logprobs=top_logprobs,
        )
    except ApiError as error:
        names = {"messages": "input", "response_format": "text.format"}
        names |= {f"messages.{number}": place for number, place in enumerate(places)}
        raise error.renamed(names) from error
    if request.dropped_messages and body.truncation == "disabled":
        message = f"the input is too long: this model's maximum context length is {api.max_context} tokens"
        raise ApiError(400, message, param="input", code="context_length_exceeded")
    return request
