"""A typed client, in two forms: blocking and asynchronous."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..errors import CascadeError, MissingExtraError
from ..types import Text

try:
    import httpx
except ImportError as error:
    raise MissingExtraError("the client", "serve", error) from error

_NDJSON = {"Accept": "application/x-ndjson"}
_PATH = "/v1/classify"


class ServerError(CascadeError):
    """The server refused a request.

    `status`: of HTTP, None within a stream; `kind`: the response's `error_type`; `field`: what was wrong with the
    request, or None; `retry_after`: seconds, or None.
    """

    def __init__(
        self, message: str, status: int | None, kind: str, field: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.field = field
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the arguments of the constructor."""
        return type(self), (str(self), self.status, self.kind, self.field, self.retry_after)


@dataclass(frozen=True)
class Classification:
    """The answer to one text, as `POST /v1/classify` gives it."""

    label: str
    score: float
    """Probability of the label."""
    probabilities: Mapping[str, float]
    """Probability of each label."""
    exit: int
    """Which member answered, 0-based."""
    member: str
    """Its name."""
    layers: int
    """Encoder layers executed, by all members that the text ran."""
    truncated: bool
    degraded: bool
    """True if a deadline kept the text from the next member."""
    model: str
    version: str
    """The first 12 digits of the bundle's sha256."""
    steps: Sequence[Mapping[str, float]] | None = None
    """Probabilities of every member that ran, where asked for."""
    labels: Sequence[str] | None = None
    """With several labels per text, all that are above their cut."""


class _Requests:
    """Requests and responses of both clients."""

    def __init__(self, retries: int) -> None:
        self._retries = retries

    @staticmethod
    def _settings(base_url: str, token: str | None, timeout: float) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return {"base_url": base_url, "headers": headers, "timeout": timeout}

    @staticmethod
    def _request(
        texts: Sequence[Text],
        model: str | None,
        thresholds: float | Sequence[float] | None,
        steps: bool,
        deadline_ms: int | None,
    ) -> dict[str, Any]:
        body = {"texts": list(texts), "model": model, "thresholds": thresholds, "steps": steps}
        headers = {} if deadline_ms is None else {"X-Deadline-Ms": str(deadline_ms)}
        return {"json": {name: value for name, value in body.items() if value is not None}, "headers": headers}

    def _pause(self, response: httpx.Response, attempt: int) -> float | None:
        """Return the seconds before another attempt, or None where there is none."""
        if response.status_code != 503 or attempt >= self._retries:
            return None
        return _retry_after(response) or 1.0


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _checked(response: httpx.Response) -> Any:
    """Return the JSON of a response; raise ServerError for any other than a success."""
    try:
        body = response.json()
    except ValueError as error:
        message = f"{response.url}: found {response.text[:80]!r} with status {response.status_code}, expected JSON"
        raise ServerError(message, response.status_code, "backend") from error
    if response.is_success:
        return body
    raise ServerError(
        body.get("error", response.reason_phrase),
        response.status_code,
        body.get("error_type", "backend"),
        body.get("field"),
        _retry_after(response),
    )


def _classifications(body: Any) -> list[Classification]:
    return [Classification(**row, model=body["model"], version=body["version"]) for row in body["predictions"]]


def _streamed(line: str) -> Classification:
    row = json.loads(line)
    if "error" in row:
        raise ServerError(row["error"], None, row["error_type"], row.get("field"))
    return Classification(**row)


class Client(_Requests):
    """A blocking client of `cascade-rt serve`, and a context manager.

    A request that finds the queues full (503) is sent again after the time that the server names.
    """

    def __init__(self, base_url: str, *, token: str | None = None, timeout: float = 60.0, retries: int = 3) -> None:
        """`timeout`: seconds to connect, and between two parts of a response; `retries`: of a request that gets 503."""
        super().__init__(retries)
        self._http = httpx.Client(**self._settings(base_url, token, timeout))

    def classify(
        self,
        texts: Sequence[Text],
        *,
        model: str | None = None,
        thresholds: float | Sequence[float] | None = None,
        steps: bool = False,
        deadline_ms: int | None = None,
    ) -> list[Classification]:
        """Classify texts, or pairs, in one request; raise ServerError where the server refuses."""
        request = self._request(texts, model, thresholds, steps, deadline_ms)
        attempt = 0
        while True:
            response = self._http.post(_PATH, **request)
            pause = self._pause(response, attempt)
            if pause is None:
                return _classifications(_checked(response))
            time.sleep(pause)
            attempt += 1

    def stream(self, texts: Sequence[Text], *, model: str | None = None) -> Iterator[Classification]:
        """Classify any number of texts; yield the answers in order, as they come."""
        request = self._request(texts, model, None, False, None)
        with self._http.stream("POST", _PATH, json=request["json"], headers=_NDJSON) as response:
            if not response.is_success:
                response.read()
                _checked(response)
            for line in response.iter_lines():
                yield _streamed(line)

    def health(self) -> Any:
        """Return what /health says, also where it is not well."""
        return self._http.get("/health").json()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        """Return the client itself; `close` is called at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()


class AsyncClient(_Requests):
    """The same for asyncio."""

    def __init__(self, base_url: str, *, token: str | None = None, timeout: float = 60.0, retries: int = 3) -> None:
        """`timeout`: seconds to connect, and between two parts of a response; `retries`: of a request that gets 503."""
        super().__init__(retries)
        self._http = httpx.AsyncClient(**self._settings(base_url, token, timeout))

    async def classify(
        self,
        texts: Sequence[Text],
        *,
        model: str | None = None,
        thresholds: float | Sequence[float] | None = None,
        steps: bool = False,
        deadline_ms: int | None = None,
    ) -> list[Classification]:
        """Classify texts, or pairs, in one request; raise ServerError where the server refuses."""
        request = self._request(texts, model, thresholds, steps, deadline_ms)
        attempt = 0
        while True:
            response = await self._http.post(_PATH, **request)
            pause = self._pause(response, attempt)
            if pause is None:
                return _classifications(_checked(response))
            await asyncio.sleep(pause)
            attempt += 1

    async def stream(self, texts: Sequence[Text], *, model: str | None = None) -> AsyncIterator[Classification]:
        """Classify any number of texts; yield the answers in order, as they come."""
        request = self._request(texts, model, None, False, None)
        async with self._http.stream("POST", _PATH, json=request["json"], headers=_NDJSON) as response:
            if not response.is_success:
                await response.aread()
                _checked(response)
            async for line in response.aiter_lines():
                yield _streamed(line)

    async def health(self) -> Any:
        """Return what /health says, also where it is not well."""
        return (await self._http.get("/health")).json()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        """Return the client itself; `close` is called at the end of the block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()
