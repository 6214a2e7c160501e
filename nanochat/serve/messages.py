"""The messages of a chat as clients send them, and the GenerationRequest that they become.

system, developer  joined into the system message, wherever they stand
user               neighbours are joined; names are written before the text where there are several
assistant          `tool_calls` and `function_call` become the parts that this model calls its tools with
tool, function     the output after the call that they answer
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, model_validator

from nanochat.conversation import PART_TOKENS, merge_messages, plain_text
from nanochat.inference.chat_prompt import fit_prompt
from nanochat.inference.request import ContextExceeded, GenerationRequest
from nanochat.inference.tools import WITH_PYTHON
from nanochat.serve.api import Api
from nanochat.serve.errors import ApiError
from nanochat.serve.known_fields import Body, KnownFields
from nanochat.serve.request_models import MAX_CHARS, Flag, GenerationBody, null_means

MAX_MESSAGES = 2000
MAX_CALLS = 1000  # of tools, in all messages
OWN_TOOLS = {tool.name for tool in WITH_PYTHON}  # called with a text; other functions have named arguments
PARTS = {"refusal": "refusal"} | dict.fromkeys(PART_TOKENS, "text")  # types of parts, and where their text is
NOTES = """tools annotations reasoning reasoning_content reasoning_details thinking thinking_blocks cache_control
provider_specific_fields provider_metadata provider_options providerOptions id status phase timestamp created_at
createdAt model usage weight metadata additional_kwargs response_metadata is_error"""  # that clients leave in messages

# ---------------------------------------------------------------------------------------------------
# The request's fields


def check_parts(value: Any) -> Any:
    """The text of a list of parts, or its parts as conversation.py has them if some are tool calls. Reports the first
    wrong part only: pydantic would write an error or two for each of a million."""
    if not isinstance(value, list):
        return value
    texts = [p["text"] for p in value if isinstance(p, dict) and p.get("type") == "text" and type(p.get("text")) is str]
    if len(texts) == len(value):  # quick, since there may be 100,000
        return "".join(texts)
    parts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in PARTS:
            raise ValueError(f"part {number} is of type {kind[:40]!r}: this model reads text only")
        text = part.get(PARTS[kind]) if isinstance(kind, str) else None
        if not isinstance(text, str):
            raise ValueError(f'part {number} must be an object with the type "text" and a string "text"')
        parts.append({"type": kind if kind in PART_TOKENS else "text", "text": text})
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


class Part(Body):
    type: Literal["text", "refusal", "python", "python_output"]
    text: str | None = None
    refusal: str | None = None


Content = Annotated[
    str | list[dict[str, str]] | None,
    BeforeValidator(check_parts, json_schema_input_type=str | list[Part] | None),
]


class FunctionCall(Body):
    name: str = Field(max_length=200)
    arguments: str | dict[str, Any] = ""  # JSON

    @property
    def text(self) -> str:
        """The call as this model writes it: code, or an expression; name(key=value) for tools that it does not know."""
        arguments, own = self.arguments, self.name in OWN_TOOLS
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            return str(self.arguments) if own else f"{self.name}({self.arguments})"
        if own and len(arguments) == 1:
            return str(next(iter(arguments.values())))
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


class ToolCall(Body):
    id: str = Field("", max_length=200)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(KnownFields):
    harmless = frozenset(NOTES.split())
    neutral: ClassVar = {"images": ([],), "files": ([],), "audio": ()}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = Field(None, max_length=200)
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], FailFast(), null_means([], list[ToolCall] | None)] = Field(
        default_factory=list
    )
    function_call: FunctionCall | None = None
    tool_call_id: str | None = Field(None, max_length=200)
    prefix: bool | None = None  # continue this message

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role in ("system", "developer", "user"):
            raise ValueError("it has no content")
        if isinstance(self.content, list) and self.role != "assistant":
            raise ValueError("only an assistant message has parts other than text")
        return self

    @property
    def parts(self) -> list[dict[str, str]]:
        """The content as parts, with tool calls."""
        text = self.content or self.refusal or ""
        parts = [{"type": "text", "text": text}] if text and isinstance(text, str) else list(text)
        return [*parts, *({"type": "python", "text": call.function.text} for call in self.calls)]

    @property
    def calls(self) -> list[ToolCall]:
        old = [ToolCall(id="", function=self.function_call)] if self.function_call else []
        return [*self.tool_calls, *old] if self.role == "assistant" else []


def check_calls(value: Any) -> Any:
    """Limit the calls of all messages together before they are validated one by one."""
    if isinstance(value, list) and len(value) <= MAX_MESSAGES:
        lists = (message.get("tool_calls") for message in value if isinstance(message, dict))
        if sum(len(calls) for calls in lists if isinstance(calls, list)) > MAX_CALLS:
            raise ValueError(f"the messages have more than {MAX_CALLS} tool_calls")
    return value


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), BeforeValidator(check_calls)]


class PromptEnding(Body):
    """How the prompt ends: with a new assistant turn, or with the last message, which the answer then continues."""

    continue_final_message: Flag = False
    add_generation_prompt: bool | None = None  # false, as vLLM and llama.cpp want it beside continue_final_message

    @model_validator(mode="after")
    def _one_ending(self) -> "PromptEnding":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    @property
    def continue_last(self) -> bool:
        return self.continue_final_message or self.add_generation_prompt is False


# ---------------------------------------------------------------------------------------------------
# As a conversation


def message_error(number: int, message: Message, reason: str) -> ApiError:
    return ApiError(400, f"messages.{number} (role {message.role!r}): {reason}", param=f"messages.{number}")


def to_conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as nanochat.conversation has them, see the top of this file. Raises ApiError."""
    names = {message.name for message in messages if message.role == "user" and message.name}
    found: list[dict[str, Any]] = []
    calls: list[tuple[str, dict[str, str]]] = []  # (id, part) of the last assistant's calls without an output
    num_chars = 0
    for number, message in enumerate(messages):
        parts = message.parts
        text = plain_text(parts)
        num_chars += sum(len(part["text"]) for part in parts)
        if message.role in ("tool", "function"):
            answered = next((call for call in calls if message.tool_call_id in (None, call[0]) or not call[0]), None)
            if answered is None:
                raise message_error(number, message, "it answers no call of the assistant message before it")
            calls.remove(answered)
            earlier = found[-1]["content"]
            after = 1 + next(i for i, part in enumerate(earlier) if part is answered[1])
            earlier.insert(after, {"type": "python_output", "text": text})
            found[-1]["merged"] += 1
            continue
        calls = list(zip([call.id for call in message.calls], parts[len(parts) - len(message.calls) :]))
        role = "system" if message.role == "developer" else message.role
        content = parts if any(part["type"] != "text" for part in parts) else text
        if role == "user" and message.name and len(names) > 1:
            content = f"{message.name}: {text}"
        found.append({"role": role, "content": content, "merged": 1})
    if num_chars > MAX_CHARS:
        raise ApiError(400, f"messages: more than {MAX_CHARS} characters together", param="messages")
    return merge_messages(found)


def continues_last(conversation: Sequence[dict[str, Any]], messages: Sequence[Message], asked: bool) -> bool:
    """Whether the answer continues the last assistant turn: after the output of a tool, and where the client asks for
    it. Raises ApiError if there is none, or one of which the client does not say so."""
    number, last = len(messages) - 1, messages[-1]
    if conversation[-1]["role"] == "assistant":
        if not asked and not last.prefix and last.role not in ("tool", "function"):
            reason = "end with a user message, or continue this one with continue_final_message: true"
            raise message_error(number, last, reason)
        return True
    if asked and last.role != "assistant":
        raise message_error(number, last, "only an assistant message can be continued")
    return False


def chat_request(
    api: Api,
    body: GenerationBody,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    *,
    continue_last: bool = False,
    top_logprobs: int | None = None,
    answer_prefix: Sequence[int] = (),
) -> GenerationRequest:
    """The answer to `messages`, of which the oldest are dropped if they are too long together. Raises ApiError.

    max_tokens None: what the prompt leaves of the context. continue_last: the client asks for the last assistant
    message to be continued. answer_prefix: ids with which the answer begins.
    """
    api.check_token_ids(answer_prefix, "answer_prefix")
    decoding = api.decoding_fields(body)
    if answer_prefix and decoding["grammar"] is not None:
        raise ApiError(400, "answer_prefix: a grammar is for whole answers; leave it out", param="answer_prefix")
    chat_model, conversation = api.settings.chat_model, to_conversation(messages)
    continued = chat_model and continues_last(conversation, messages, continue_last)
    room = api.max_context - len(answer_prefix)
    if room <= 1:
        reason = f"the answer's beginning has {len(answer_prefix)} tokens, the context {api.max_context}"
        raise ApiError(400, reason, param="answer_prefix", code="context_length_exceeded")
    try:
        prompt, kept = fit_prompt(api.tokenizer, conversation, room, chat_model, continued)
    except ContextExceeded as error:
        raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
    dropped = sum(message["merged"] for message in conversation) - sum(message["merged"] for message in kept)
    return GenerationRequest(
        [*prompt, *answer_prefix],
        api.limit_tokens(max_tokens),
        answer_begun=len(answer_prefix),
        top_logprobs=top_logprobs,
        dropped_messages=dropped,
        **decoding,
    )
