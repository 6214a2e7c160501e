"""What needs no API key: the page and the health checks."""

import base64
import functools
import hashlib
import re
from importlib import resources
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse
from typing_extensions import TypedDict

from nanochat.serve.api import ApiDependency

CONTENT_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter()


class Health(TypedDict):
    status: Literal["ok", "unavailable", "failing"]


UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"model": Health}}


@router.get("/health", response_model=Health, responses=UNHEALTHY)
@router.get("/health/ready", response_model=Health, responses=UNHEALTHY)
async def ready(api: ApiDependency) -> Any:
    fine = api.pool.alive and not api.pool.failing and not api.admission.closing
    return JSONResponse({"status": "ok" if fine else "unavailable"}, 200 if fine else 503)


@router.get("/health/live", response_model=Health, responses=UNHEALTHY)
async def live(api: ApiDependency) -> Any:
    """503 where only restarting the process may help."""
    return JSONResponse({"status": "failing"}, 503) if api.pool.failing else {"status": "ok"}


@functools.cache
def load_page() -> tuple[str, dict[str, str]]:
    """ui.html and its headers."""
    text = resources.files("nanochat").joinpath("ui.html").read_text(encoding="utf-8")
    policy = CONTENT_POLICY.format(script=inline_hash(text, "script"), style=inline_hash(text, "style"))
    return text, {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def inline_hash(page: str, tag: str) -> str:
    """Content-Security-Policy source that allows the page's one inline element of that tag and nothing injected."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    text, headers = load_page()
    return HTMLResponse(text, headers=headers)
