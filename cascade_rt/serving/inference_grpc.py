"""The Open Inference Protocol over gRPC: each call becomes the request of the same protocol over HTTP.

So its token, limits, deadline, errors, log, metrics and trace are those of the HTTP server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import grpc
from starlette.types import ASGIApp, Message

from .inference_messages import MESSAGES, SERVICE

_PASSED = {"authorization", "baggage", "traceparent", "tracestate", "x-deadline-ms", "x-request-id"}
"""Metadata of a call that become headers."""
_RETURNED = ("retry-after", "x-request-id")
"""Headers that become trailing metadata."""
_LENGTH = "inference-header-content-length"
_ROOM = 64 * 2**10  # bytes of a message beside its texts
_LONGEST_DEADLINE = 86_400_000  # milliseconds
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

    def __init__(self, app: ASGIApp, host: str, port: int, *, max_body: int, grace: float) -> None:
        """`port`: 0 for any that is free. `max_body`: bytes of a request. `grace`: seconds for calls when it stops."""
        self._app = app
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._options = (("grpc.max_receive_message_length", max_body + _ROOM), ("grpc.max_send_message_length", -1))
        self._grace = grace
        self.port: int | None = None
        """Where it listens, once it does."""

    async def start(self) -> None:
        """Listen, in this event loop; raise RuntimeError where it cannot."""
        self._server = grpc.aio.server(options=self._options)
        methods = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=MESSAGES[f"{name}Request"].FromString,
                response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
            )
            for name, method in methods.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = self._server.add_insecure_port(self._address)
        await self._server.start()
        self.port = port

    async def stop(self) -> None:
        """Take no more calls, and wait for those that are open."""
        await self._server.stop(self._grace)

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
        tensors, parts = len(request.inputs), len(request.raw_input_contents)
        if parts not in (0, tensors):
            await context.abort(_code(422), f"raw_input_contents: found {parts}, expected {tensors}, as inputs")
        head, contents = _body(request)
        path = _path(request.model_name, request.model_version)
        found = await self._answered(context, "POST", f"{path}/infer", head + contents, {_LENGTH: str(len(head))})
        length = int(found.headers[_LENGTH])
        return _inferred(json.loads(found.body[:length]), found.body[length:])

    async def _holds(self, path: str, context: Any) -> bool:
        """Return whether the application says yes; end the call where it says neither yes nor no."""
        response = await self._asked(context, "GET", path)
        if response.status not in (404, 503):
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
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
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


def _code(status: int) -> grpc.StatusCode:
    return _CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT)


async def _end_if_error(context: Any, response: _Response) -> None:
    context.set_trailing_metadata([(name, response.headers[name]) for name in _RETURNED if name in response.headers])
    if response.status != 200:
        await context.abort(_code(response.status), json.loads(response.body)["error"])


def _deadline(context: Any) -> dict[str, str]:
    """Return the header that tells the application the deadline of a call, if it has one."""
    seconds: float | None = context.time_remaining()
    if seconds is None:
        return {}
    return {"x-deadline-ms": str(min(max(1, math.ceil(1000 * seconds)), _LONGEST_DEADLINE))}


def _path(model: str, version: str) -> str:
    path = "/v2/models/" + model.replace("/", "%2F")
    return f"{path}/versions/{version.replace('/', '%2F')}" if version else path


def _body(request: Any) -> tuple[bytes, bytes]:
    """Return the JSON part of a request's body, and its binary tensors."""
    contents = request.raw_input_contents or [_packed(tensor.contents.bytes_contents) for tensor in request.inputs]
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": len(content)},
        }
        for tensor, content in zip(request.inputs, contents, strict=True)
    ]
    outputs = [{"name": output.name} for output in request.outputs]
    head = {"id": request.id, "inputs": inputs, "outputs": outputs, "parameters": {"binary_data_output": True}}
    return json.dumps(head).encode(), b"".join(contents)


def _packed(texts: Iterator[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


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
