"""JSON out: answers, and errors with one shape for all interfaces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic_core import PydanticSerializationError, to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Mount

from ..errors import CascadeError, InputError, TextError
from .batcher import DeadlineExceeded, Draining, Overloaded
from .json_body import BATCH, LIST, ONE
from .models import UnknownModel
from .service import ClientGone, TooManyTexts

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class ErrorBody(BaseModel):
    """Why a request was not answered."""

    error: str = Field(description="What was found, what was expected, and what to do.")
    error_type: str = Field(description="validation, not_found, too_large, unauthorized, overloaded, deadline, backend")
    field: str | None = Field(None, description="The field that is wrong, where it is one.")


def _documented(description: str) -> dict[str, Any]:
    return {"model": ErrorBody, "description": description}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _documented("The body is not JSON."),
    401: _documented("The bearer token is missing or wrong."),
    404: _documented("There is no such model."),
    405: _documented("The path has other methods, which Allow names."),
    408: _documented("The body did not arrive in time."),
    413: _documented("Too many texts, or too big a body."),
    415: _documented("The body's type, charset or compression is not known."),
    422: _documented("A field, a header or a text cannot be used."),
    500: _documented("A model failed."),
    503: _documented("Too many texts are waiting, or the server is stopping: try again after Retry-After seconds."),
    504: _documented("The deadline passed."),
}


class JSON(Response):
    """A JSON response without spaces, in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode the content."""
        return dumps(content)


def dumps(content: Any) -> bytes:
    """Return JSON without spaces, in UTF-8; half a surrogate pair, which a name in a request may have, becomes "?"."""
    with suppress(PydanticSerializationError):
        return to_json(content, inf_nan_mode="null")  # a seventh of the time of the standard library's
    return _ENCODER.encode(content).encode("utf-8", "replace")


def error_response(
    status: int, message: str, kind: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> JSON:
    """Return an error."""
    body = {"error": message, "error_type": kind} | ({"field": field} if field else {})
    return JSON(body, status, headers)


_KINDS: tuple[tuple[type[CascadeError], int, str], ...] = (
    (Overloaded, 503, "overloaded"),
    (Draining, 503, "overloaded"),
    (DeadlineExceeded, 504, "deadline"),
    (UnknownModel, 404, "not_found"),
    (TooManyTexts, 413, "too_large"),
    (ClientGone, 499, "cancelled"),
    (InputError, 422, "validation"),
    (CascadeError, 500, "backend"),
)


def describe_error(error: CascadeError) -> tuple[int, ErrorBody]:
    """Return the status of an error, and what a response says of it."""
    status, kind = next((status, name) for found, status, name in _KINDS if isinstance(error, found))
    field = f"texts.{error.index}" if isinstance(error, TextError) else getattr(error, "field", None)
    return status, ErrorBody(error=str(error), error_type=kind, field=field)


async def on_cascade_error(request: Request, error: Exception) -> Response:
    """Answer one of our errors."""
    assert isinstance(error, CascadeError)
    status, found = describe_error(error)
    request.scope["log"]["reason"] = found.error_type
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Overloaded | Draining) else None
    return error_response(status, found.error, found.error_type, found.field, headers)


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Answer a client that hung up within its body, for the log and the metrics."""
    return await on_cascade_error(request, ClientGone("the client hung up"))


async def on_invalid_body(request: Request, error: Exception) -> Response:
    """Answer a body or a parameter that does not fit the schema: name its first wrong field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = _fields(first["loc"])
    request.scope["log"]["reason"] = "validation"
    return error_response(422, f"{'.'.join(where) or 'body'}: {first['msg']}", "validation", ".".join(where) or None)


def _fields(location: Sequence[str | int]) -> list[str]:
    """Return the path of a field, without the alternatives that it has."""
    names = location[1:] if location and location[0] == "body" else location
    return [str(part)[:80] for part in names if part not in (ONE.tag, LIST.tag, BATCH.tag)]


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: an unknown path, a wrong method; and what `OPTIONS` asks for."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        error = HTTPException(405, error.detail, {"Allow": ", ".join(_methods(request))})
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=error.headers)
    kind = {404: "not_found", 408: "deadline", 413: "too_large"}.get(error.status_code, "validation")
    request.scope["log"]["reason"] = kind
    return error_response(error.status_code, str(error.detail), kind, headers=error.headers)


def _methods(request: Request) -> list[str]:
    """Return the methods of a path."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    found = [
        method
        for method in ("GET", "POST")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ] or ["GET"]  # of files
    return [*(["HEAD"] if "GET" in found else []), *found, "OPTIONS"]


def ranked(labels: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return labels and scores, the highest first."""
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)  # keeps the order of equal ones
    return [{"label": labels[at], "score": scores[at]} for at in order]
