"""JSON in: bodies as clients send and label them, and the shapes of texts in them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Coroutine
from email.message import Message
from functools import lru_cache
from typing import Any

from fastapi.routing import APIRoute
from pydantic import Discriminator, Tag
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_UNLABELLED = ("application/x-www-form-urlencoded", "application/octet-stream", "text/plain")
_UNICODE = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "ascii")
_LATIN = ("iso8859-1", "iso8859-15", "cp1252")

ONE, LIST, BATCH = Tag("(one)"), Tag("(list)"), Tag("(batch)")
"""Alternatives of a field, which `ONE_OR_LIST` and others tell apart, so that an error speaks of the one that is meant.

Their names are no names of fields, and are left out where an error names its field.
"""

ONE_OR_LIST = Discriminator(lambda found: LIST.tag if _is_list(found) else ONE.tag)
LIST_OR_BATCH = Discriminator(lambda found: BATCH.tag if _is_batch(found) else LIST.tag)
ONE_LIST_OR_BATCH = Discriminator(
    lambda found: BATCH.tag if _is_batch(found) else LIST.tag if _is_list(found) else ONE.tag
)


def _is_list(found: object) -> bool:
    return isinstance(found, list | tuple)


def _is_batch(found: object) -> bool:
    return isinstance(found, list) and bool(found) and _is_list(found[0])


class JSONRoute(APIRoute):
    """A route whose body is read by `read_json`, not by FastAPI, which refuses what `curl -d` sends."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request; FastAPI calls this."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(_JSONRequest(request))

        return answer


class _JSONRequest(Request):
    """A request that is JSON for FastAPI."""

    def __init__(self, request: Request) -> None:
        self._labelled = request.headers
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        super().__init__({**request.scope, "headers": headers}, request.receive)

    async def json(self) -> Any:
        return read_json(self._labelled, await self.body())


def read_json(headers: Headers, body: bytes) -> Any:
    """Return what a body says; raise HTTPException if it is not JSON.

    The label may be missing, or one that clients put on any body. A page of another origin can send those without
    asking first, so with `Origin`, as browsers send it, the label has to be JSON. Without a `charset`, the body is in
    UTF-8, UTF-16 or UTF-32. Of a name that an object has twice, the last value counts.
    """
    charset = _charset(headers.get("content-type", ""), "origin" in headers)
    try:
        text = body.decode(charset) if charset else body.decode(json.detect_encoding(body), "surrogatepass")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not JSON (found byte {error.start}, which is not UTF-8)") from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON ({error})") from error


@lru_cache(32)  # clients send few, and email's reading of one takes as long as the JSON of a short text
def _charset(given: str, has_origin: bool) -> str | None:
    """Return the encoding of a body with this `Content-Type`, or None if its first bytes tell."""
    label = Message()
    label["content-type"] = given
    kind, charset = label.get_content_type(), label.get_content_charset()
    is_json = kind in ("application/json", "text/json") or kind.endswith("+json")
    if not is_json and (kind not in _UNLABELLED or has_origin):
        raise HTTPException(415, f"`Content-Type`: found {given[:80] or 'none'}, expected application/json")
    try:
        encoding = codecs.lookup(charset or "utf-8").name
    except (LookupError, ValueError):
        encoding = ""
    if encoding in _UNICODE:
        return None
    if encoding not in _LATIN:
        raise HTTPException(415, f"`Content-Type`: found charset {str(charset)[:80]}, expected utf-8")
    return encoding


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"found {name}, expected a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
