"""The ASGI application: all interfaces around one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..errors import CascadeError
from .classify import classify_router
from .envelope import Envelope
from .hugging_face import hugging_face_router
from .inference_protocol import inference_router
from .responses import ERRORS, JSON, on_cascade_error, on_disconnect, on_http_error, on_invalid_body
from .service import Service
from .shortcut import OnError, Shortcut
from .tei import tei_router

_BODY_SECONDS = 30.0
_GAUGES_SECONDS = 1.0
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    service: Service,
    *,
    token: str | None = None,
    cors_origins: tuple[str, ...] = (),
    body_seconds: float = _BODY_SECONDS,
) -> Application:
    """Return the application.

    `token`: asked for as `Authorization: Bearer` everywhere but in health checks and for the page. `cors_origins`:
    pages of these origins may call it. `body_seconds`: how long the body of a request may take to arrive.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        seconds = service.settings.reload_seconds
        tasks = [asyncio.create_task(service.models.watch(seconds))] if seconds else []
        if service.metrics.shared:  # other processes read the gauges of this one
            tasks.append(asyncio.create_task(_update_gauges(service)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(service.close)

    app = FastAPIOffline(
        title="cascade-rt",
        version=__version__,
        summary="Text classification with a cascade of BERTs",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    routers = classify_router(service), hugging_face_router(service), inference_router(service), tei_router(service)
    for router in routers:
        app.include_router(router)

    root_path = service.settings.root_path
    base = f'<head>\n<base href="{root_path}/">'.encode() if root_path else b"<head>"
    page = Path(__file__).with_name("page.html").read_bytes().replace(b"<head>", base)

    @app.get("/", tags=["operations"], summary="A page for browsers", response_class=HTMLResponse)
    async def index() -> Response:
        """Return the page, which calls the other interfaces."""
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    @app.get("/health", tags=["operations"], summary="Whether the server answers", responses={503: ERRORS[503]})
    async def health() -> Response:
        """Answer 200 while requests are taken; a replaced bundle that cannot be used is shown by its error."""
        models = {
            model.name: {
                "version": model.version,
                "loaded": model.loaded,
                "error": service.models.errors.get(model.name),
            }
            for model in service.models
        }
        status: dict[str, Any] = {"status": "draining" if service.draining else "ok", "models": models}
        return JSON(status, 503 if service.draining else 200)

    text = {"schema": {"type": "string"}}
    formats = {"text/plain": text, "application/openmetrics-text": text}

    @app.get(
        "/metrics",
        tags=["operations"],
        summary="Prometheus metrics",
        response_class=PlainTextResponse,
        responses={200: {"content": formats}},
    )
    async def metrics(request: Request) -> Response:
        """Return the metrics as text."""
        measured = await service.measure()
        text, media_type = measured.text(request.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    on_error: dict[type[Exception], OnError] = {
        CascadeError: on_cascade_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
    }
    for kind, handle in {**on_error, RequestValidationError: on_invalid_body}.items():
        app.add_exception_handler(kind, handle)
    front: ASGIApp = Envelope(
        Shortcut(app, [route for router in routers for route in router.routes], on_error),
        metrics=service.metrics,
        max_body=service.settings.max_body,
        body_seconds=body_seconds,
        token=token,
        root_path=root_path,
    )
    if service.tracing is not None:
        front = service.tracing.around(front)
    if cors_origins:  # outermost: browsers ask without a token whether they may ask
        front = CORSMiddleware(front, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    return Application(app, ServerErrorMiddleware(front))


@dataclass(frozen=True)
class Application:
    """FastAPI, behind middleware of our own that a request passes before the framework's."""

    api: FastAPI
    front: ASGIApp
    """Answers requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or what the server says of itself."""
        await (self.front if scope["type"] == "http" else self.api)(scope, receive, send)


async def _update_gauges(service: Service) -> None:
    while True:
        await asyncio.to_thread(service.update_gauges)
        await asyncio.sleep(_GAUGES_SECONDS)
