"""Request bodies, checked field by field: what several endpoints share. Names and meanings are OpenAI's; top_k is our
own."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_SAMPLES = 32
MAX_STOPS = 8
TOKEN_LIMIT = 100_000


def as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def null_means(default: Any, declared: Any) -> BeforeValidator:
    """Clients send null for the default. `declared` is the type in the schema."""
    return BeforeValidator(lambda value: default if value is None else value, json_schema_input_type=declared)


def max_tokens_or_none(value: int | None) -> int | None:
    """-1 is sent for "as many as there is room for"; so is a larger number than that."""
    if value == 0:
        raise ValueError("must be at least 1; -1 or no value gives the answer what the prompt leaves of the context")
    return None if value == -1 else value


Flag = Annotated[bool, null_means(False, bool | None)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Temperature = Annotated[float | None, Field(ge=0, le=10, allow_inf_nan=False)]
TopK = Annotated[int | None, Field(ge=0, le=1_000_000)]
MaxTokens = Annotated[int | None, Field(ge=-1), AfterValidator(max_tokens_or_none)]


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
