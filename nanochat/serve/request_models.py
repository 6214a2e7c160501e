"""Request bodies, checked field by field: what several endpoints share. Names and meanings are OpenAI's; top_k is our
own."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_MESSAGES = 500
MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_SAMPLES = 32
MAX_STOPS = 8
TOKEN_LIMIT = 100_000


def as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def null_means(default: Any, declared: Any) -> BeforeValidator:
    """Clients send null for the default. `declared` is the type in the schema."""
    return BeforeValidator(lambda value: default if value is None else value, json_schema_input_type=declared)


Flag = Annotated[bool, null_means(False, bool | None)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Temperature = Annotated[float | None, Field(ge=0, le=10, allow_inf_nan=False)]
TopK = Annotated[int | None, Field(ge=0, le=1_000_000)]
MaxTokens = Annotated[int | None, Field(ge=1, le=TOKEN_LIMIT)]


class Body(BaseModel):
    """Unknown fields are ignored, as clients send many; types are strict: "1" is not a number, 1 is not a boolean."""

    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(Body):
    include_usage: bool = False


class GenerationBody(Body):
    """Fields of every generating request. Those of SamplingParams have its names; None is the server's default."""

    model: str | None = Field(None, max_length=200)
    temperature: Temperature = None
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: TopK = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: Annotated[Samples, null_means(1, Samples | None)] = 1
    stop: Annotated[Stops, BeforeValidator(as_list, json_schema_input_type=Stop | Stops | None)] = Field(
        default_factory=list
    )
    stream: Flag = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _unsupported(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not supported; leave it out or give 0")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    type: Literal["text"]
    text: str = Field(max_length=MAX_CHARS)


def check_parts(value: Any) -> Any:
    """Report the first wrong part only: pydantic would write an error or two for each of a million."""
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


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


def to_conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as nanochat.conversation has them: a developer message is a system message."""
    return [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
