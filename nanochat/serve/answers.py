"""What the routes answer, as /openapi.json declares it. Answers are made as plain dicts; tests hold them to this."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error, whatever its cause."""

    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChosenLogprob]


class Tool(BaseModel):
    """A piece of a calculator call: what was asked, what it gave."""

    kind: Literal["python", "python_output"]
    text: str


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    tools: list[Tool] = []


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatAnswer(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_context: int
    answers: bool


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    tokens: list[int]
    count: int


class Text(BaseModel):
    text: str
    prompt: str  # the same, as evaluation harnesses read it


class TokenizerInfo(BaseModel):
    bos_token: str
    eos_token: str
    vocab_size: int


class Health(BaseModel):
    status: Literal["ok", "unavailable"]


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "What was wrong, and where"},
    "5XX": {"model": ErrorAnswer, "description": "Not the client's fault"},
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[str, Any] = {"text/event-stream": {"schema": EVENT}}


def whole_or_streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that streams if it is asked to."""
    return {200: {"model": model, "content": EVENTS, "description": "The answer; with stream: true, its events"}}
