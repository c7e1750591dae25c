"""The surroundings of every request: its path, its id, the bearer token, its body, the log and the metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from os import urandom
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .body import Body
from .metrics import Metrics
from .responses import error_response

PROBES = ("/health", "/v2/health/live", "/v2/health/ready")
"""Paths that tell whether the server takes requests."""

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
REQUESTS = "cascade_rt.serving.requests"
"""The logger of requests."""
LOGGED = ("request_id", "method", "path", "trace_id", "reason", "status", "ms")
"""Fields of its records, in order."""
_log = logging.getLogger(REQUESTS)


class Envelope:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body: int,
        body_seconds: float,
        token: str | None,
        root_path: str,
    ) -> None:
        """`token`: what `Authorization: Bearer` must carry, except for probes and the page; None for no token.

        `root_path`: the prefix of all paths before a proxy, which may strip it or not.
        """
        self._app = app
        self._metrics = metrics
        self._max_body = max_body
        self._body_seconds = body_seconds
        self._token = token.encode() if token else None
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else urandom(16).hex()
        log = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        if "trace_id" in scope:
            log["trace_id"] = scope["trace_id"]
        status, ended = 500, 0.0
        method, path = scope["method"], self._path(scope["path"])
        inner = {**scope, "log": log, "root_path": self._root_path, "path": self._root_path + path}
        if method == "HEAD":  # is GET without its body
            inner["method"] = "GET"
        body = Body(headers, receive, self._max_body, self._body_seconds)

        async def sending(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode())]
                if body.ends_connection:
                    more.append((b"connection", b"close"))
                await send({**message, "headers": [*message["headers"], *more]})
                return
            if method == "HEAD":
                message = {**message, "body": b""}
            if message["type"] == "http.response.body" and not (message.get("more_body", False) or body.is_complete):
                ended = perf_counter()
                await send({**message, "more_body": True})
                await body.discard()
                message = {"type": message["type"], "body": b"", "more_body": False}
            await send(message)

        try:
            if not self._allowed(inner["method"], path, headers.get(b"authorization", b"")):
                response = error_response(
                    401, "found no valid bearer token", "unauthorized", headers={"WWW-Authenticate": "Bearer"}
                )
                await response(inner, body.receive, sending)
                return
            await self._app(inner, body.receive, sending)
        except asyncio.CancelledError:  # by a gRPC client, or by the end of the server
            status, log["reason"] = 499, "cancelled"
            raise
        finally:
            self._count(inner, log, status, (ended or perf_counter()) - started)

    def _count(self, scope: Scope, log: dict[str, str], status: int, seconds: float) -> None:
        """Put a request into the metrics and the log."""
        route = getattr(scope.get("route"), "path", "other")
        if (route, log["method"]) == ("/", "POST"):
            route = "/predict"
        self._metrics.request(route, status, seconds)
        if status >= 400:
            self._metrics.rejected.labels(log.get("reason", str(status))).inc()
        if _log.isEnabledFor(logging.INFO):  # `info` looks for its caller, which takes longer than the rest
            record = logging.makeLogRecord({"name": REQUESTS, "levelno": logging.INFO, "levelname": "INFO"})
            record.__dict__.update(log, msg="request", status=status, ms=round(1000 * seconds, 2))
            _log.handle(record)

    def _path(self, path: str) -> str:
        """Return a path without the prefix, where the proxy left it, and without a slash at its end."""
        if path == self._root_path or path.startswith(self._root_path + "/"):
            path = path[len(self._root_path) :]
        return path.rstrip("/") or "/"

    def _allowed(self, method: str, path: str, header: bytes) -> bool:
        if self._token is None or path in PROBES or (path == "/" and method == "GET"):
            return True
        kind, _, token = header.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(token, self._token)
