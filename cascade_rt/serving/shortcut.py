"""Answers to valid JSON requests without FastAPI, which takes longer than a member without layers takes for a text.

A request is checked against the route's own pydantic model and answered by the route's own function. Every other
request goes on to FastAPI, which also says what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_type_hints

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .json_body import JSONRoute, read_json

OnError = Callable[[Request, Exception], Awaitable[Response]]


class _Way(NamedTuple):
    """A route, and what FastAPI would find out about it."""

    route: APIRoute
    pattern: re.Pattern[str]
    schema: TypeAdapter[Any]
    """The schema of the body."""


class Shortcut:
    """ASGI middleware that answers requests of JSON routes."""

    def __init__(self, app: ASGIApp, routes: Iterable[object], on_error: Mapping[type[Exception], OnError]) -> None:
        """`app`: the framework. `on_error`: answers by kind of error; others propagate."""
        self._app = app
        self._on_error = on_error
        ways = [
            _Way(route, route.path_regex, TypeAdapter(get_type_hints(route.endpoint)["body"]))
            for route in routes
            if isinstance(route, JSONRoute) and route.methods == {"POST"}
        ]
        self._by_path = {way.route.path: way for way in ways if "{" not in way.route.path}
        self._with_names = [way for way in ways if "{" in way.route.path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope["path"][len(scope.get("root_path", "")) :]
        way, names = self._find(path) if scope["method"] == "POST" else (None, {})
        if way is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = way.route
        request = Request(scope, receive)
        try:
            body = await request.body()
            try:
                checked = way.schema.validate_python(read_json(request.headers, body))
            except (HTTPException, ValidationError):
                await self._app(scope, _again(body, receive), send)
                return
            response: Response = await way.route.endpoint(**names, body=checked, request=request)
        except tuple(self._on_error) as error:
            handle = next(handle for kind, handle in self._on_error.items() if isinstance(error, kind))
            response = await handle(request, error)
        await response(scope, receive, send)

    def _find(self, path: str) -> tuple[_Way | None, dict[str, str]]:
        if (way := self._by_path.get(path)) is not None:
            return way, {}
        for way in self._with_names:
            if match := way.pattern.fullmatch(path):
                return way, match.groupdict()
        return None, {}


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body first, which was received before."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return parts.pop() if parts else await receive()

    return received
