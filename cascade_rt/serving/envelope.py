"""What surrounds every request: its id, the bearer token, the limit of its body, the log and the metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from time import perf_counter
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .responses import error_response

PROBES = ("/health", "/v2/health/live", "/v2/health/ready")
"""Paths that tell whether the server takes requests."""

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_CLOSING = {"Connection": "close"}
_OPEN_PATHS = ("/", *PROBES)
_log = logging.getLogger("cascade_rt.serving.requests")


class Envelope:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int, body_seconds: float, token: str | None) -> None:
        """`token`: what `Authorization: Bearer` must carry, except for probes and the page; None for no token."""
        self._app = app
        self._metrics = metrics
        self._max_body = max_body
        self._body_seconds = body_seconds
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        scope["log"] = log = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        if "trace_id" in scope:
            log["trace_id"] = scope["trace_id"]
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            if not self._allowed(scope["path"], headers.get(b"authorization", b"")):
                response = error_response(
                    401, "found no valid bearer token", "unauthorized", headers={"WWW-Authenticate": "Bearer"}
                )
                await response(scope, receive, sending)
                return
            await self._app(scope, self._limited(headers, receive, perf_counter() + self._body_seconds), sending)
        finally:
            seconds = perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, seconds)
            if status >= 400:
                self._metrics.rejected.labels(log.get("reason", str(status))).inc()
            _log.info("request", extra=log | {"status": status, "ms": round(1000 * seconds, 2)})

    def _allowed(self, path: str, header: bytes) -> bool:
        if self._token is None or path in _OPEN_PATHS:
            return True
        kind, _, token = header.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(token, self._token)

    def _limited(self, headers: dict[bytes, bytes], receive: Receive, until: float) -> Receive:
        """Return `receive` with the limits of a body: its bytes, and the time until its end."""
        length = headers.get(b"content-length", b"0")
        announced = int(length) if length.isdigit() else 0
        received = 0
        complete = False
        too_large = HTTPException(413, f"the body is over {self._max_body:,} bytes; send several requests", _CLOSING)

        async def receiving() -> Message:
            nonlocal received, complete
            if announced > self._max_body:
                raise too_large
            if complete:  # what comes now is the end of the connection, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.001, until - perf_counter()))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "the body did not arrive in time", _CLOSING) from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_body:
                raise too_large
            return message

        return receiving
