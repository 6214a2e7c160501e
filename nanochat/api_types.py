"""What clients may ask for, checked field by field. Names and meanings are OpenAI's; top_k is this system's own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_MESSAGES = 500
MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_SAMPLES = 32
MAX_PROMPTS = 256
MAX_STOPS = 8
TOKEN_LIMIT = 100_000


class Request(BaseModel):
    """What all generating requests share. Unknown fields are ignored, as clients send many."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = Field(None, max_length=200)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    stream_options: "StreamOptions | None" = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("n", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return 1 if value is None else value

    @field_validator("stream", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _unsupported(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not supported; leave it out or give 0")
        return value


class StreamOptions(BaseModel):
    include_usage: bool = False


class TextPart(BaseModel):
    type: Literal["text"]
    text: str = Field(max_length=MAX_CHARS)


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = Field(None)

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
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_logprobs(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("messages")
    @classmethod
    def _short_enough(cls, value: list[Message]) -> list[Message]:
        if sum(len(message.text) for message in value) > MAX_CHARS:
            raise ValueError(f"the messages have more than {MAX_CHARS} characters together")
        return value


class CompletionRequest(Request):
    """POST /v1/completions. A prompt is text or token ids; there may be several."""

    prompt: (
        Annotated[str, Field(max_length=MAX_CHARS)]
        | list[int]
        | list[Annotated[str, Field(max_length=MAX_CHARS)]]
        | list[list[int]]
    ) = ""
    max_tokens: int | None = Field(16, ge=0, le=TOKEN_LIMIT)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES)

    @field_validator("echo", mode="before")
    @classmethod
    def _no_echo(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("prompt")
    @classmethod
    def _not_too_many(cls, value: Any) -> Any:
        if isinstance(value, list):
            if not value:
                raise ValueError("the list of prompts is empty")
            if not isinstance(value[0], int) and len(value) > MAX_PROMPTS:
                raise ValueError(f"at most {MAX_PROMPTS} prompts at a time, got {len(value)}")
        return value

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, whatever form they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class PublishedChatRequest(BaseModel):
    """POST /chat/completions, the published form."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=TOKEN_LIMIT)
    top_k: int | None = Field(None, ge=0, le=1_000_000)

    def to_chat(self) -> ChatRequest:
        return ChatRequest.model_validate({**self.model_dump(), "stream": True})


class TokenizeRequest(BaseModel):
    """POST /tokenize: of a text, or of a conversation as the model is given it."""

    text: str | None = Field(None, max_length=MAX_CHARS)
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=TOKEN_LIMIT)
