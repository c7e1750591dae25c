"""The Open Inference Protocol over gRPC: each call becomes the request of the same protocol over HTTP.

So its token, limits, deadline, errors, log, metrics and trace are those of the HTTP server.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NamedTuple

import grpc
from starlette.types import ASGIApp, Message

from ..errors import InputError
from .inference_messages import HEALTH, MESSAGES, SERVICE
from .inference_protocol import HEADER_LENGTH, packed_strings
from .service import LONGEST_DEADLINE

_PASSED = {"authorization", "baggage", "traceparent", "tracestate", "x-deadline-ms", "x-request-id"}
"""Metadata of a call that become headers."""
_RETURNED = ("retry-after", "x-request-id")
"""Headers that become trailing metadata."""
_ROOM = 64 * 2**10  # bytes of a message beside its texts
_LARGEST = 2**31 - 1  # that gRPC knows
_ON_THE_WAY = 0.05, 0.005  # share of a call's time, and at least seconds, that an answer needs to arrive in time
_LONGEST_MESSAGE = 4000  # characters of an error, which clients limit together with other metadata
_CONNECTION_AGE = 300_000  # milliseconds, after which a client connects again, maybe to another process
_SERVING, _NOT_SERVING = 1, 2
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Codes by the status over HTTP; for others INVALID_ARGUMENT."""
_log = logging.getLogger(__name__)


class _Response(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class GRPCServer:
    """Answers calls by an application that speaks the protocol over HTTP."""

    def __init__(self, app: ASGIApp, host: str, port: int, *, max_body: int) -> None:
        """`port`: 0 for any that is free, or one that others share. `max_body`: bytes of a request."""
        self._app = app
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._options = (
            ("grpc.max_receive_message_length", min(max_body + _ROOM, _LARGEST)),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_connection_age_ms", _CONNECTION_AGE),
        )
        self._server: Any = None
        self.tasks: set[Any] = set()
        """Tasks of open calls."""
        self.port: int | None = None
        """Where it listens, once it does."""

    async def start(self) -> None:
        """Listen, in this event loop; raise InputError where it cannot."""
        server = grpc.aio.server(options=self._options)
        methods = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE, {name: _handler(name, methods[name]) for name in methods}
                ),
                grpc.method_handlers_generic_handler(HEALTH, {"Check": _handler("HealthCheck", self._health)}),
            )
        )
        try:
            port = server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise InputError(f"cannot listen on {self._address} for gRPC; choose another port") from error
        await server.start()
        self._server, self.port = server, port

    async def stop(self, grace: float | None) -> None:
        """Take no more calls, and wait `grace` seconds for those that are open; a second call may shorten that."""
        if self._server is not None:
            await self._server.stop(grace)

    async def _health(self, request: Any, context: Any) -> Any:
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"found no service {request.service[:80]!r}")
        ready = await self._holds("/v2/health/ready", context)
        return MESSAGES["HealthCheckResponse"](status=_SERVING if ready else _NOT_SERVING)

    async def _server_live(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerLiveResponse"](live=await self._holds("/v2/health/live", context))

    async def _server_ready(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=await self._holds("/v2/health/ready", context))

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        found = json.loads((await self._answered(context, "GET", "/v2")).body)
        return MESSAGES["ServerMetadataResponse"](name=found["name"], version=found["version"])

    async def _model_ready(self, request: Any, context: Any) -> Any:
        path = _path(request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=await self._holds(f"{path}/ready", context))

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        found = await self._answered(context, "GET", _path(request.name, request.version))
        return MESSAGES["ModelMetadataResponse"](**json.loads(found.body))

    async def _model_infer(self, request: Any, context: Any) -> Any:
        head, contents = _body(request)
        path = _path(request.model_name, request.model_version)
        found = await self._answered(context, "POST", f"{path}/infer", head + contents, {HEADER_LENGTH: str(len(head))})
        length = int(found.headers[HEADER_LENGTH])
        return _inferred(json.loads(found.body[:length]), found.body[length:])

    async def _holds(self, path: str, context: Any) -> bool:
        """Return whether the application says yes; end the call where it says neither yes nor no."""
        response = await self._asked(context, "GET", path)
        if response.status not in (404, 422, 503):
            await _end_if_error(context, response)
        return response.status == 200

    async def _answered(self, context: Any, *request: Any) -> _Response:
        """Return the application's answer; end the call where it is an error."""
        response = await self._asked(context, *request)
        await _end_if_error(context, response)
        return response

    async def _asked(
        self, context: Any, method: str, path: str, body: bytes = b"", more: Mapping[str, str] | None = None
    ) -> _Response:
        """Return the application's answer to a request. A cancelled call cancels it."""
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        given = {name: value for name, value in context.invocation_metadata() if name in _PASSED}
        headers = {"content-length": str(len(body)), **_deadline(context), **given, **(more or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "2",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode("utf-8", "replace")) for name, value in headers.items()],
        }
        status, found, parts = 500, dict[str, str](), list[bytes]()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not unread:  # a client that goes away cancels the call
                await asyncio.get_running_loop().create_future()
            return unread.pop()

        async def send(message: Message) -> None:
            nonlocal status, found
            if message["type"] == "http.response.start":
                status = message["status"]
                found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
            else:
                parts.append(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        except Exception:  # the application has answered it with status 500, and raises it for the log
            _log.exception("call failed", extra={"path": path})
        return _Response(status, found, b"".join(parts))


def _handler(name: str, method: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=MESSAGES[f"{name}Request"].FromString,
        response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
    )


async def _end_if_error(context: Any, response: _Response) -> None:
    context.set_trailing_metadata([(name, response.headers[name]) for name in _RETURNED if name in response.headers])
    if response.status != 200:
        code = _CODES.get(response.status, grpc.StatusCode.INVALID_ARGUMENT)
        await context.abort(code, _message(response)[:_LONGEST_MESSAGE])


def _message(response: _Response) -> str:
    """Return what an error says; a failure that the application did not expect has a body of its own kind, or none."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(response.body)["error"])
    return f"the server failed with status {response.status}; its log says why"


def _deadline(context: Any) -> dict[str, str]:
    """Return the header that tells the application when to answer, so that a call with a deadline gets it in time."""
    seconds: float | None = context.time_remaining()
    if seconds is None:
        return {}
    share, least = _ON_THE_WAY
    return {"x-deadline-ms": str(min(max(1, int(1000 * (seconds - max(least, share * seconds)))), LONGEST_DEADLINE))}


def _path(model: str, version: str) -> str:
    path = "/v2/models/" + model.replace("/", "%2F")
    return f"{path}/versions/{version.replace('/', '%2F')}" if version else path


def _body(request: Any) -> tuple[bytes, bytes]:
    """Return the JSON part of a request's body, and its binary tensors; the application finds what is wrong."""
    contents = list(request.raw_input_contents) or [
        packed_strings(one.contents.bytes_contents) for one in request.inputs
    ]
    sizes = [{"binary_data_size": len(content)} for content in contents]
    inputs = [
        {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "parameters": size}
        for tensor, size in zip_longest(request.inputs, sizes[: len(request.inputs)])
    ]
    outputs = [{"name": output.name} for output in request.outputs]
    head = {"id": request.id, "inputs": inputs, "outputs": outputs, "parameters": {"binary_data_output": True}}
    return json.dumps(head).encode(), b"".join(contents)


def _inferred(head: Mapping[str, Any], contents: bytes) -> Any:
    """Return the response that a body says: its JSON part, and binary tensors."""
    response = MESSAGES["ModelInferResponse"](
        model_name=head["model_name"], model_version=head["model_version"], id=head["id"]
    )
    place = 0
    for output in head["outputs"]:
        response.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        size = output["parameters"]["binary_data_size"]
        response.raw_output_contents.append(contents[place : place + size])
        place += size
    return response
