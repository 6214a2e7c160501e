"""Completions: POST /v1/completions, as evaluation harnesses use it; echo sends the prompt back with its log
probabilities."""

import codecs
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from typing_extensions import TypedDict

from nanochat.conversation import Tokenizer
from nanochat.inference.request import ContextExceeded, GenerationRequest, TokenLogprobs
from nanochat.serve import answers
from nanochat.serve.api import Api, ApiDependency
from nanochat.serve.errors import ApiError
from nanochat.serve.generation import Generation
from nanochat.serve.replica import RequestHandle
from nanochat.serve.request_models import MAX_CHARS, MAX_SAMPLES, TOKEN_LIMIT, Flag, GenerationBody
from nanochat.serve.sample import FinishReason

MAX_PROMPTS = 256
ECHO_TOKENS = 64  # of an echoed prompt with log probabilities, in one event

router = APIRouter()

# ---------------------------------------------------------------------------------------------------
# Requests


def all_are(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) <= {kind}


def check_prompts(value: Any) -> Any:
    """Require a list of strings, of token ids or of lists of these. Reports the first fault only: pydantic would write
    an error for each of a million."""
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("the list of prompts is empty")
    if type(value[0]) is not int and len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts at a time, got {len(value)}")
    for prompt in value if isinstance(value[0], list) else [value]:
        if isinstance(prompt, list) and len(prompt) > TOKEN_LIMIT:
            raise ValueError(f"a prompt may have {TOKEN_LIMIT} tokens, got {len(prompt)}")
        if not isinstance(prompt, list) or not (all_are(prompt, int) or (prompt is value and all_are(prompt, str))):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    return value


Text = Annotated[str, Field(max_length=MAX_CHARS)]


class CompletionRequest(GenerationBody):
    """POST /v1/completions. A prompt is text or token ids; there may be several."""

    prompt: Annotated[Text | list[int] | list[Text] | list[list[int]], BeforeValidator(check_prompts)] = ""
    max_tokens: int | None = Field(16, ge=-1)  # -1: what the prompt leaves of the context
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
        """The prompts as a list, in whichever form they were sent."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


def generation_requests(api: Api, body: CompletionRequest) -> list[GenerationRequest]:
    """A request for each prompt. Raises ApiError."""
    max_tokens = api.limit_tokens({None: 16, -1: None}.get(body.max_tokens, body.max_tokens))
    fields: dict[str, Any] = {"top_logprobs": body.logprobs, "prompt_logprobs": body.echo and body.logprobs is not None}
    fields |= api.decoding_fields(body)
    return [  # each prompt has a random seed of its own, unless the body gives one
        GenerationRequest(encode_prompt(api, prompt), max_tokens, **{**fields, "sampling": api.sampling(body)})
        for prompt in body.prompts()
    ]


def encode_prompt(api: Api, prompt: str | list[int]) -> list[int]:
    """Token ids that start with <|bos|>. Raises ApiError if there are more than the context has."""
    bos = api.tokenizer.encode_special("<|bos|>")
    if isinstance(prompt, str):
        ids = [bos, *api.tokenizer.encode(prompt)]
    else:
        api.check_token_ids(prompt, "prompt")
        ids = list(prompt) if prompt[:1] == [bos] else [bos, *prompt]
    if len(ids) > api.max_context:
        error = ContextExceeded("it", len(ids), api.max_context)
        raise ApiError(400, str(error), param="prompt", code="context_length_exceeded")
    return ids


# ---------------------------------------------------------------------------------------------------
# Answers


class CompletionLogprobs(TypedDict):
    """Parallel lists, an element per token. None: not known, of a token that a tool forced."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionAnswer(answers.Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TextOffsets:
    """Positions of tokens in a text, in characters. All tokens of one character have its position."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, ids: Sequence[int]) -> list[int]:
        """Positions of the next tokens."""
        positions = []
        for i in ids:
            raw = self.tokenizer.decode_bytes([i])
            if not 0x80 <= raw[0] < 0xC0:  # not a continuation byte: an incomplete character stays incomplete
                self.end_character()
            positions.append(self.end)
            self.end += len(self._decoder.decode(raw))
        return positions

    def end_character(self) -> None:
        """Count an incomplete character as one."""
        self.end += len(self._decoder.decode(b"", final=True))


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: list[int]
) -> CompletionLogprobs:
    """logprobs[i] and offsets[i] belong to ids[i]."""

    def name(token: int) -> str:
        return tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")

    def top(found: TokenLogprobs | None) -> dict[str, float] | None:
        if found is None or not found.top:
            return None
        best: dict[str, float] = {}
        for token, logprob in found.top:  # of tokens with the same text the likeliest is kept
            best.setdefault(name(token), logprob)
        return best

    return {
        "tokens": [name(token) for token in ids],
        "token_logprobs": [None if found is None else found.logprob for found in logprobs],
        "top_logprobs": [top(found) for found in logprobs],
        "text_offset": offsets,
    }


def echoed(handle: RequestHandle) -> list[int]:
    """The prompt's tokens without <|bos|>."""
    return handle.request.prompt[1:]


def completion_choices(generation: Generation, body: CompletionRequest) -> Iterator[CompletionChoice]:
    """The choices of a whole answer."""
    tokenizer = generation.api.tokenizer
    for handle, samples in zip(generation.handles, generation.samples):
        prompt = echoed(handle) if body.echo else []
        for sample in samples:
            ids, logprobs = [token.id for token in sample.tokens], None
            if body.logprobs is not None:
                positions = TextOffsets(tokenizer)
                offsets = positions.of(prompt)
                positions.end_character()
                found = [*handle.sequences[0].prompt_logprobs, *(token.logprobs for token in sample.tokens)]
                logprobs = completion_logprobs(tokenizer, [*prompt, *ids], found, [*offsets, *positions.of(ids)])
            text, reason = tokenizer.decode(prompt) + sample.text, sample.finish_reason or "length"
            yield {"index": sample.choice, "text": text, "logprobs": logprobs, "finish_reason": reason}


def echo_parts(
    tokenizer: Tokenizer, handle: RequestHandle, offsets: TextOffsets, with_logprobs: bool
) -> Iterator[tuple[str, CompletionLogprobs | None]]:
    """The prefilled prompt as (text, log probabilities), in parts that do not occupy the event loop for long."""
    ids = echoed(handle)
    text, logprobs = tokenizer.decode(ids), handle.sequences[0].prompt_logprobs
    if not with_logprobs:
        yield text, None
        return
    for first in range(0, len(ids), ECHO_TOKENS):
        part, start = slice(first, first + ECHO_TOKENS), offsets.end
        positions = offsets.of(ids[part])
        if first + ECHO_TOKENS >= len(ids):
            offsets.end_character()
        yield text[start : offsets.end], completion_logprobs(tokenizer, ids[part], logprobs[part], positions)


async def streamed_choices(generation: Generation, body: CompletionRequest) -> AsyncIterator[dict[str, Any]]:
    """The choice of each chunk."""

    def choice(
        index: int, text: str, logprobs: CompletionLogprobs | None = None, reason: FinishReason | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    tokenizer, with_logprobs = generation.api.tokenizer, body.logprobs is not None
    offsets: dict[int, TextOffsets] = {}  # by choice
    async for update in generation.updates():
        index = update.sample.choice
        if index not in offsets:
            offsets[index] = TextOffsets(tokenizer)
            if body.echo:
                for text, part in echo_parts(tokenizer, update.handle, offsets[index], with_logprobs):
                    yield choice(index, text, part)
                    await generation.api.budget.wait()
        logprobs = None
        if with_logprobs and update.tokens:
            ids, found = [t.id for t in update.tokens], [t.logprobs for t in update.tokens]
            logprobs = completion_logprobs(tokenizer, ids, found, offsets[index].of(ids))
        for _, text in update.pieces or ([("text", "")] if logprobs else []):
            yield choice(index, text, logprobs)
            logprobs = None
        if update.sample.finish_reason:
            yield choice(index, "", None, update.sample.finish_reason)


# ---------------------------------------------------------------------------------------------------
# Route


@router.post("/v1/completions", responses=answers.whole_or_streamed(CompletionAnswer))
async def complete(body: CompletionRequest, http: Request, api: ApiDependency) -> Any:
    api.check_model(body.model)
    requests = await api.run_in_thread(lambda: generation_requests(api, body))
    generation = Generation(api, http, requests, body.stop, chat=False)
    if body.stream:
        choices = streamed_choices(generation, body)
        chunks = answers.chunks(generation, "cmpl", "text_completion", choices, body.include_usage)
        return answers.stream(generation, chunks)
    return await answers.whole(generation, "cmpl", "text_completion", lambda: completion_choices(generation, body))
