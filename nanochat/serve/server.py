"""The HTTP application: create_app() on FastAPI, in OpenAI's shapes, over a WorkerPool.

A message's way: routes_chat.py (the request) -> generation.py (its samples) -> service.py (queue, batch, replica) ->
inference/decoding.py. To add an endpoint, add a function to a router, or a router to the lists below.

The event loop only passes messages on: the model runs on the services' threads, tokenizing and whole answers on
others. A client that disconnects frees its batch slots within a step.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from nanochat.serve import routes_chat, routes_completions, routes_info, routes_responses
from nanochat.serve.api import Api, ServerMetrics, Settings
from nanochat.serve.errors import ERROR_HANDLERS, ERROR_RESPONSES
from nanochat.serve.generation import DROPPED_HEADER
from nanochat.serve.guard import Guard
from nanochat.serve.service import WorkerPool

GENERATING = (
    routes_chat.router,
    routes_completions.router,
    routes_responses.router,
)  # limited in number, refused while shutting down
OPEN = (routes_info.open_router,)  # need no API key
OTHER = (routes_info.router,)


def create_app(
    pool: WorkerPool, tokenizer: Any, settings: Settings | None = None, metrics: ServerMetrics | None = None
) -> FastAPI:
    """The application over a running pool, which it closes at shutdown."""
    api = Api(pool, tokenizer, settings or Settings(), metrics or ServerMetrics())
    api.metrics.watch(pool)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        api.closing = True
        await asyncio.to_thread(pool.close, api.settings.drain_seconds)

    app = FastAPI(
        title="nanochat",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERROR_RESPONSES,
        exception_handlers=ERROR_HANDLERS,
    )
    app.state.api = api
    for router in (*GENERATING, *OTHER, *OPEN):
        app.include_router(router)
    open_paths, generating_paths = (
        {getattr(route, "path", "") for router in routers for route in router.routes} for routers in (OPEN, GENERATING)
    )
    open_paths |= {f"/{name}" for name in routes_info.page_files()}
    app.add_middleware(Guard, api=api, open_paths=open_paths, generating_paths=generating_paths)
    if api.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(api.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", DROPPED_HEADER],
        )
    return app
