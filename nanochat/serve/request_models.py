"""Request bodies, checked field by field: what several endpoints share. Names and meanings are OpenAI's, and vLLM's
where OpenAI has none."""

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from nanochat.serve.known_fields import HARMLESS, NEUTRAL, KnownFields
from nanochat.serve.structured_output import StructuredFields

MAX_CHARS = 200_000  # of all messages together, or of a prompt
MAX_SAMPLES = 32
MAX_STOPS = 8
MAX_STOP_IDS = 128
MAX_BIASES = 1024
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


def check_ids(biases: dict[str, float]) -> dict[str, float]:
    """JSON has strings for the names of an object, also where these are token ids."""
    for name in biases:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
            raise ValueError(f"its names must be token ids, got {name[:40]!r}")
    return biases


Flag = Annotated[bool, null_means(False, bool | None)]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Temperature = Annotated[float | None, Field(ge=0, le=10, allow_inf_nan=False)]
TopK = Annotated[int | None, Field(ge=-1, le=1_000_000)]
Penalty = Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)]
StopIds = Annotated[list[Annotated[int, Field(ge=0, lt=TOKEN_LIMIT)]], Field(max_length=MAX_STOP_IDS)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), AfterValidator(check_ids)]
MaxTokens = Annotated[int | None, Field(ge=-1), AfterValidator(max_tokens_or_none)]


class StreamOptions(KnownFields):
    harmless = frozenset(["include_obfuscation"])
    neutral: ClassVar = {"continuous_usage_stats": (False,)}

    include_usage: Flag = False


class GenerationBody(StructuredFields):
    """Fields of every generating request. Those of SamplingParams have its names; None is the server's default."""

    harmless = HARMLESS
    neutral = NEUTRAL

    model: str | None = Field(None, max_length=200)
    temperature: Temperature = None
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: TopK = None
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)  # -1 is a random one
    n: Annotated[Samples, null_means(1, Samples | None)] = 1
    stop: Annotated[Stops, BeforeValidator(as_list, json_schema_input_type=Stop | Stops | None)] = Field(
        default_factory=list
    )
    stop_token_ids: Annotated[StopIds, null_means([], StopIds | None)] = Field(default_factory=list)
    min_tokens: Annotated[int, Field(ge=0), null_means(0, int | None)] = 0
    ignore_eos: Flag = False
    stream: Flag = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: LogitBias | None = None

    @field_validator("seed")
    @classmethod
    def _random_seed(cls, value: int | None) -> int | None:
        return None if value == -1 else value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
