"""Everything that is neither text generation nor the page: models, tokenizer, figures."""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import generate_latest
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from nanochat.common import SPECIAL_TOKENS
from nanochat.conversation import render_prompt
from nanochat.serve.api import Api, ApiDependency
from nanochat.serve.errors import ApiError
from nanochat.serve.request_models import MAX_CHARS, TOKEN_LIMIT, Body, Messages, to_conversation

router = APIRouter()

# ---------------------------------------------------------------------------------------------------
# Models


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_context: int
    answers: bool  # finetuned to answer


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


def served_model(api: Api) -> Model:
    return {
        "id": api.settings.model_name,
        "object": "model",
        "created": int(api.started),
        "owned_by": "nanochat",
        "max_context": api.max_context,
        "answers": api.settings.chat_model,
    }


@router.get("/v1/models")
async def models(api: ApiDependency) -> Models:
    return {"object": "list", "data": [served_model(api)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, api: ApiDependency) -> Model:
    api.check_model(name)
    return served_model(api)


# ---------------------------------------------------------------------------------------------------
# Tokenizer


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a conversation as the model is given it.

    `prompt` is what evaluation harnesses send: a text, of which a special token's name alone is that token."""

    text: str | None = Field(None, max_length=MAX_CHARS)
    prompt: str | None = Field(None, max_length=MAX_CHARS)
    messages: Messages | None = None


class Tokens(TypedDict):
    tokens: list[int]
    count: int


def check_ids(value: Any) -> Any:
    """Report the first fault only: pydantic would write an error for each of a million."""
    if isinstance(value, list) and not all(type(i) is int and i >= 0 for i in value):
        raise ValueError("must be a list of token ids, from 0 up")
    return value


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(check_ids)] = Field(max_length=TOKEN_LIMIT)


class Text(TypedDict):
    text: str
    prompt: str  # the same text; evaluation harnesses read this field


class TokenizerInfo(TypedDict):
    bos_token: str
    eos_token: str
    vocab_size: int


@router.post("/tokenize")
def tokenize(body: TokenizeRequest, api: ApiDependency) -> Tokens:
    if [body.text, body.prompt, body.messages].count(None) != 2:
        raise ApiError(400, "give one of text, prompt and messages", param="text")
    if body.prompt in SPECIAL_TOKENS:
        tokens = [api.tokenizer.encode_special(body.prompt)]
    elif body.messages is None:
        tokens = api.tokenizer.encode(body.text or body.prompt or "")
    else:
        try:
            tokens = render_prompt(api.tokenizer, to_conversation(body.messages))
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
    return {"tokens": tokens, "count": len(tokens)}


@router.post("/detokenize")
def detokenize(body: DetokenizeRequest, api: ApiDependency) -> Text:
    api.check_token_ids(body.tokens, "tokens")
    text = api.tokenizer.decode(body.tokens)
    return {"text": text, "prompt": text}


@router.get("/tokenizer_info")
async def tokenizer_info(api: ApiDependency) -> TokenizerInfo:
    vocab_size = api.tokenizer.get_vocab_size()
    return {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>", "vocab_size": vocab_size}


# ---------------------------------------------------------------------------------------------------
# Figures


@router.get("/stats")
def stats(api: ApiDependency) -> dict[str, Any]:
    seconds_up = time.time() - api.started
    return {**api.pool.stats(), "requests_under_way": api.admission.active, "seconds_up": seconds_up}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(api: ApiDependency) -> Response:
    return Response(generate_latest(api.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")
