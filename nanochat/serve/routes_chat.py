"""Chat: POST /v1/chat/completions in OpenAI's form, and POST /chat/completions in the published project's."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, FailFast, Field, model_validator
from typing_extensions import TypedDict

from nanochat.conversation import Tokenizer
from nanochat.inference.request import GenerationRequest, Token
from nanochat.serve import answers
from nanochat.serve.api import Api, ApiDependency
from nanochat.serve.errors import FieldError
from nanochat.serve.generation import Generation
from nanochat.serve.known_fields import Body
from nanochat.serve.messages import Messages, PromptEnding, chat_request
from nanochat.serve.request_models import (
    TOKEN_LIMIT,
    Flag,
    GenerationBody,
    MaxTokens,
    Temperature,
    TopK,
    null_means,
)
from nanochat.serve.sample import FinishReason

router = APIRouter()
AnswerPrefix = Annotated[list[Annotated[int, Field(ge=0)]], FailFast(), Field(max_length=TOKEN_LIMIT)]

# ---------------------------------------------------------------------------------------------------
# Requests


class ChatRequest(GenerationBody, PromptEnding):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    logprobs: Flag = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    logprob_ids: Flag = False  # with token ids, and also of the tokens that a tool gave
    answer_prefix: AnswerPrefix = Field(default_factory=list)  # ids with which the answer begins; it goes on from there

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatRequest":
        for name in ("top_logprobs", "logprob_ids"):
            if getattr(self, name) and not self.logprobs:
                raise FieldError(name, "needs logprobs: true")
        return self


class PublishedChatRequest(Body):
    """POST /chat/completions, the published form. What has other fields is an OpenAI client's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Messages
    temperature: Temperature = None
    max_tokens: MaxTokens = None
    top_k: TopK = None
    stream: Annotated[bool, null_means(True, bool | None)] = True

    @model_validator(mode="before")
    @classmethod
    def _published_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and (other := [name for name in value if name not in cls.model_fields]):
            raise ValueError(
                f"/chat/completions is the published project's form, which has no {other[0][:100]!r}; "
                "OpenAI's is /v1/chat/completions: let the client's base URL end in /v1"
            )
        return value

    def to_chat(self) -> ChatRequest:
        return ChatRequest.model_validate(self.model_dump())


def generation_request(api: Api, body: ChatRequest) -> GenerationRequest:
    """Raises ApiError."""
    return chat_request(
        api,
        body,
        body.messages,
        api.limit_tokens(body.max_tokens, body.max_completion_tokens),
        continue_last=body.continue_last,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        answer_prefix=body.answer_prefix,
    )


# ---------------------------------------------------------------------------------------------------
# Answers


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    id: NotRequired[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]
    forced: NotRequired[bool]  # by a tool; the log probability is then 0


class ChatLogprobs(TypedDict):
    content: Iterable[ChosenLogprob]


class Tool(TypedDict):
    """A piece of a tool call: the call, or its result."""

    kind: Literal["python", "python_output"]
    text: str


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None
    tools: NotRequired[list[Tool]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(answers.Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


def logprob_entries(
    tokenizer: Tokenizer, tokens: Sequence[Token], top: int, with_ids: bool = False
) -> Iterator[ChosenLogprob]:
    """Log probabilities of the tokens that the model chose; `with_ids`: with their ids, and of tools' tokens too. An
    iterator, since a whole answer's would be hundreds of thousands of objects for the garbage collector."""

    def entry(token: int, logprob: float) -> TokenLogprob:
        raw = tokenizer.decode_bytes([token])
        found: TokenLogprob = {"token": raw.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(raw)}
        return {**found, "id": token} if with_ids else found

    for token in tokens:
        if token.logprobs is not None and (token.mask or not with_ids):
            top_logprobs = [entry(i, logprob) for i, logprob in token.logprobs.top[:top]]
            yield {**entry(token.id, token.logprobs.logprob), "top_logprobs": top_logprobs}
        elif with_ids:
            yield {**entry(token.id, 0.0), "top_logprobs": [], "forced": True}


def chat_choices(generation: Generation, body: ChatRequest) -> Iterator[ChatChoice]:
    """The choices of a whole answer; their log probabilities are iterators."""
    for sample in generation.samples[0]:
        message: AssistantMessage = {"role": "assistant", "content": sample.text, "refusal": None}
        if tools := [tool(kind, text) for kind, text in sample.pieces if kind != "text"]:
            message["tools"] = tools
        entries = logprob_entries(generation.api.tokenizer, sample.tokens, body.top_logprobs or 0, body.logprob_ids)
        logprobs: ChatLogprobs | None = {"content": entries} if body.logprobs else None
        reason = sample.finish_reason or "length"
        yield {"index": sample.choice, "message": message, "logprobs": logprobs, "finish_reason": reason}


async def streamed_choices(generation: Generation, body: ChatRequest) -> AsyncIterator[dict[str, Any]]:
    """The choice of each chunk. A tool call is not part of the text: it has its own field, which our page shows."""

    def choice(index: int, delta: Any, logprobs: Any = None, reason: FinishReason | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    for index in range(body.n):
        yield choice(index, {"role": "assistant", "content": ""})
    async for update in generation.updates():
        index, logprobs = update.sample.choice, None
        if body.logprobs:
            entries = logprob_entries(generation.api.tokenizer, update.tokens, body.top_logprobs or 0, body.logprob_ids)
            logprobs = {"content": list(entries)}
        for kind, text in update.pieces or ([("text", "")] if logprobs and logprobs["content"] else []):
            yield choice(index, {"content": text} if kind == "text" else {"tool": tool(kind, text)}, logprobs)
            logprobs = None
        if update.sample.finish_reason:
            yield choice(index, {}, None, update.sample.finish_reason)


async def published_events(generation: Generation) -> AsyncIterator[dict[str, Any]]:
    """The published form: {"token": text} for each piece of text, then {"done": true}."""
    async for update in generation.updates():
        for kind, text in update.pieces:
            if kind == "text":
                yield {"token": text, "gpu": 0}
    yield {"done": True}


def tool(kind: str, text: str) -> Tool:
    return {"kind": "python" if kind == "python" else "python_output", "text": text}


# ---------------------------------------------------------------------------------------------------
# Routes


@router.post("/v1/chat/completions", responses=answers.whole_or_streamed(ChatAnswer))
async def chat(body: ChatRequest, http: Request, api: ApiDependency) -> Any:
    api.check_model(body.model)
    generation = await generate(body, http, api)
    if body.stream:
        choices = streamed_choices(generation, body)
        kind = "chat.completion.chunk"
        chunks = answers.chunks(generation, "chatcmpl", kind, choices, body.include_usage, null_usage=True)
        return answers.stream(generation, chunks)
    return await whole_answer(generation, body)


@router.post("/chat/completions", responses=answers.whole_or_streamed(ChatAnswer))
async def published_chat(body: PublishedChatRequest, http: Request, api: ApiDependency) -> Any:
    """Streamed unless the request says otherwise."""
    request = body.to_chat()
    generation = await generate(request, http, api)
    if body.stream:
        return answers.stream(generation, published_events(generation), done=False)
    return await whole_answer(generation, request)


async def generate(body: ChatRequest, http: Request, api: Api) -> Generation:
    request = await api.run_in_thread(lambda: generation_request(api, body))
    return Generation(api, http, [request], body.stop, api.settings.chat_model)


async def whole_answer(generation: Generation, body: ChatRequest) -> Response:
    return await answers.whole(generation, "chatcmpl", "chat.completion", lambda: chat_choices(generation, body))
