"""Everything but text generation: models, tokenizer, figures; and, without an API key, health checks and the page."""

import functools
import hashlib
import time
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from pydantic import FailFast, Field
from typing_extensions import TypedDict

from nanochat.common import SPECIAL_TOKENS
from nanochat.conversation import render_prompt
from nanochat.serve.api import Api, ApiDependency
from nanochat.serve.errors import ApiError
from nanochat.serve.known_fields import KnownFields
from nanochat.serve.messages import Messages, PromptEnding, continues_last, to_conversation
from nanochat.serve.request_models import MAX_CHARS, TOKEN_LIMIT

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; font-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Not by `mimetypes`: the registry of a Windows machine may call a script text/plain, which browsers then refuse.
CONTENT_TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "json": "application/json",
    "woff2": "font/woff2",
}

router, open_router = APIRouter(), APIRouter()

# ---------------------------------------------------------------------------------------------------
# Models


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_context: int
    answers: bool  # finetuned to answer
    defaults: dict[str, int | float | None]  # of the settings that a request may have
    card: Mapping[str, str | int | float | None]  # where the model comes from


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
        "defaults": {
            **{name: getattr(api.settings.sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")},
            "max_tokens": api.settings.max_tokens,
        },
        "card": api.settings.card,
    }


@router.get("/v1/models/", include_in_schema=False)
@router.get("/v1/models")
async def models(api: ApiDependency) -> Models:
    return {"object": "list", "data": [served_model(api)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, api: ApiDependency) -> Model:
    api.check_model(name)
    return served_model(api)


# ---------------------------------------------------------------------------------------------------
# Tokenizer


class TokenizeRequest(KnownFields, PromptEnding):
    """POST /tokenize: of a text, or of a conversation as the model is given it.

    `prompt` is what evaluation harnesses send: a text, of which a special token's name alone is that token."""

    harmless = frozenset(["model"])
    neutral: ClassVar = {
        "add_special_tokens": (False,),
        "return_token_strs": (False,),
    }

    text: str | None = Field(None, max_length=MAX_CHARS)
    prompt: str | None = Field(None, max_length=MAX_CHARS)
    messages: Messages | None = None


class Tokens(TypedDict):
    tokens: list[int]
    count: int


class DetokenizeRequest(KnownFields):
    """POST /detokenize."""

    harmless = frozenset(["model"])

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast(), Field(max_length=TOKEN_LIMIT)]


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
        conversation = to_conversation(body.messages)
        continued = continues_last(conversation, body.messages, body.continue_last)
        tokens = render_prompt(api.tokenizer, conversation, continued)
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
    return {**api.pool.stats(), "requests_under_way": api.active, "seconds_up": seconds_up}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(api: ApiDependency) -> Response:
    return Response(generate_latest(api.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


# ---------------------------------------------------------------------------------------------------
# Without a key: health and the page


class Health(TypedDict):
    status: Literal["ok", "unavailable", "failing"]


UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": Health}}


@open_router.get("/health", response_model=Health, responses=UNHEALTHY)
@open_router.get("/health/ready", response_model=Health, responses=UNHEALTHY)
async def ready(api: ApiDependency) -> Any:
    fine = api.pool.alive and not api.pool.failing and not api.closing
    return JSONResponse({"status": "ok" if fine else "unavailable"}, 200 if fine else 503)


@open_router.get("/health/live", response_model=Health, responses=UNHEALTHY)
async def live(api: ApiDependency) -> Any:
    """503 where only restarting the process may help."""
    return JSONResponse({"status": "failing"}, 503) if api.pool.failing else {"status": "ok"}


@functools.cache
def page_files() -> dict[str, tuple[bytes, dict[str, str]]]:
    """The files of the page by URL path, with their headers. "" is ui.html; page/... its modules and libraries."""
    root = resources.files("nanochat")
    folder = {f"page/{file.name}": file for file in (root / "page").iterdir() if file.is_file()}
    vendor = {f"page/vendor/{file.name}": file for file in (root / "page" / "vendor").iterdir() if file.is_file()}
    found = {}
    for name, file in {"": root / "ui.html", **folder, **vendor}.items():
        content = file.read_bytes()
        kind = CONTENT_TYPES.get(file.name.rpartition(".")[2], "text/plain")
        tag = hashlib.sha256(content).hexdigest()[:32]
        found[name] = (
            content,
            {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Security-Policy": CONTENT_POLICY,
                "Cache-Control": "no-cache",
                "ETag": f'"{tag}"',
            },
        )
    return found


@open_router.get("/", response_class=HTMLResponse)
async def page(http: Request) -> Response:
    return page_file("", http)


@open_router.get("/page/{name:path}", include_in_schema=False)
async def page_part(name: str, http: Request) -> Response:
    return page_file(f"page/{name}", http)


def page_file(name: str, http: Request) -> Response:
    if name not in page_files():
        raise ApiError(404, f"the page has no file {name[:100]!r}", code="not_found")
    content, headers = page_files()[name]
    fresh = headers["ETag"] in http.headers.get("if-none-match", "")
    return Response(b"" if fresh else content, 304 if fresh else 200, headers)
