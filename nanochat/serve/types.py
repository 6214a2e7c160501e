"""What clients may ask for, checked field by field. Names and meanings are OpenAI's; top_k is this system's own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

MAX_MESSAGES = 500
MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_SAMPLES = 32
MAX_PROMPTS = 256
MAX_STOPS = 8
TOKEN_LIMIT = 100_000


def as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def or_else(default: Any, declared: Any) -> BeforeValidator:
    """null means the default, as clients send it."""
    return BeforeValidator(lambda value: default if value is None else value, json_schema_input_type=declared)


Flag = Annotated[bool, or_else(False, bool | None)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class Body(BaseModel):
    """Unknown fields are ignored, as clients send many; "1" is no number, 1 is no yes."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Request(Body):
    """What all generating requests share."""

    model: str | None = Field(None, max_length=200)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: Annotated[Samples, or_else(1, Samples | None)] = 1
    stop: Annotated[Stops, BeforeValidator(as_list, json_schema_input_type=Stop | Stops | None)] = Field(
        default_factory=list
    )
    stream: Flag = False
    stream_options: "StreamOptions | None" = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _unsupported(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not supported; leave it out or give 0")
        return value


class StreamOptions(Body):
    include_usage: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: str = Field(max_length=MAX_CHARS)


def check_parts(value: Any) -> Any:
    """The first wrong part says enough: pydantic would write an error or two for each of a million."""
    if isinstance(value, list):
        for number, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f'part {number} must be an object with the type "text" and a string "text"')
    return value


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart] | None, BeforeValidator(check_parts)] = Field(None)

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=TOKEN_LIMIT)
    max_completion_tokens: int | None = Field(None, ge=1, le=TOKEN_LIMIT)
    logprobs: Flag = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("messages")
    @classmethod
    def _short_enough(cls, value: list[Message]) -> list[Message]:
        if sum(len(message.text) for message in value) > MAX_CHARS:
            raise ValueError(f"the messages have more than {MAX_CHARS} characters together")
        return value


def check_prompts(value: Any) -> Any:
    """As check_parts: a list is of strings, of token ids or of lists of these, and of one kind throughout."""
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("the list of prompts is empty")
    if type(value[0]) is not int and len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts at a time, got {len(value)}")
    for prompt in value if isinstance(value[0], list) else [value]:
        if not isinstance(prompt, list) or not (are_all(prompt, int) or (prompt is value and are_all(prompt, str))):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
        if len(prompt) > TOKEN_LIMIT:
            raise ValueError(f"a prompt may have {TOKEN_LIMIT} tokens, got {len(prompt)}")
    return value


def check_ids(value: Any) -> Any:
    if isinstance(value, list) and not (are_all(value, int) and min(value, default=0) >= 0):
        raise ValueError("must be a list of token ids, from 0 up")
    return value


def are_all(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


class CompletionRequest(Request):
    """POST /v1/completions. A prompt is text or token ids; there may be several."""

    prompt: Annotated[
        Annotated[str, Field(max_length=MAX_CHARS)]
        | list[int]
        | list[Annotated[str, Field(max_length=MAX_CHARS)]]
        | list[list[int]],
        BeforeValidator(check_prompts),
    ] = ""
    max_tokens: int | None = Field(16, ge=0, le=TOKEN_LIMIT)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Flag = False
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES)

    @field_validator("best_of")
    @classmethod
    def _no_choosing(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, info.data.get("n")):
            raise ValueError("choosing is not supported; leave it out, and choose among n samples")
        return value

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, whatever form they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class PublishedChatRequest(Body):
    """POST /chat/completions, the published form."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=TOKEN_LIMIT)
    top_k: int | None = Field(None, ge=0, le=1_000_000)

    def to_chat(self) -> ChatRequest:
        return ChatRequest.model_validate({**self.model_dump(), "stream": True})


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a conversation as the model is given it.

    `prompt` is what evaluation harnesses send: a text, of which a special token's name alone is that token."""

    text: str | None = Field(None, max_length=MAX_CHARS)
    prompt: str | None = Field(None, max_length=MAX_CHARS)
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(check_ids)] = Field(max_length=TOKEN_LIMIT)
