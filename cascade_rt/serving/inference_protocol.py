"""The Open Inference Protocol, version 2, over HTTP: JSON and the binary tensors of Triton's clients."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from .. import __version__
from ..types import Text
from .batcher import Answer
from .json_body import BATCH, LIST, LIST_OR_BATCH, read_json
from .models import Model
from .responses import ERRORS, JSON, dumps
from .service import BadField, Service, whole_number

HEADER_LENGTH = "inference-header-content-length"
_INPUTS = ("text", "text_pair")
_OUTPUTS: Mapping[str, tuple[str, Callable[[Answer], Any]]] = {
    "label": ("BYTES", lambda answer: answer.prediction.label),
    "score": ("FP32", lambda answer: answer.prediction.score),
    "probabilities": ("FP32", lambda answer: answer.prediction.probabilities),
    "logits": ("FP32", lambda answer: answer.logits),
    "exit": ("INT32", lambda answer: answer.prediction.exit),
    "layers": ("INT32", lambda answer: answer.prediction.layers),
    "truncated": ("BOOL", lambda answer: answer.prediction.truncated),
    "degraded": ("BOOL", lambda answer: answer.degraded),
}
_TYPES = {"FP32": "<f4", "INT32": "<i4", "BOOL": "?"}
_PER_LABEL = ("probabilities", "logits", "labels")

Texts = Annotated[list[str], Field(fail_fast=True)]
Data = Annotated[
    Annotated[Texts, LIST] | Annotated[list[Texts], Field(fail_fast=True), BATCH],
    LIST_OR_BATCH,
]
Parameters = dict[str, Any] | None


class InputTensor(BaseModel):
    """Texts."""

    name: str = Field(description="text, or text_pair for the second texts of pairs")
    datatype: str = Field(description="BYTES")
    shape: Annotated[list[int], Field(fail_fast=True)] = Field(description="[N] or [N, 1]")
    data: Data | None = None
    parameters: Parameters = None


class OutputRequest(BaseModel):
    """An output that is wanted."""

    name: str
    parameters: Parameters = None


class InferRequest(BaseModel):
    """Texts as tensors. Unknown fields are ignored, as by Triton and MLServer."""

    id: str | None = None
    inputs: Annotated[list[InputTensor], Field(fail_fast=True)]
    outputs: Annotated[list[OutputRequest], Field(fail_fast=True)] | None = None
    parameters: Parameters = None


class OutputTensor(BaseModel):
    """One output for all texts."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferResponse(BaseModel):
    """The answers as tensors."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


def inference_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])

    @router.get("", summary="The server")
    async def server() -> dict[str, Any]:
        return {"name": "cascade-rt", "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live", summary="Whether the server runs")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health/ready", summary="Whether the server answers", responses={503: ERRORS[503]})
    async def ready() -> Response:
        return _readiness(service)

    @router.get("/models/{name}", summary="A model", responses={404: ERRORS[404]})
    @router.get("/models/{name}/versions/{version}", summary="A version of a model", responses={404: ERRORS[404]})
    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        model = _model(service, name, version)
        labels = len(model.runtime.bundle.labels)
        names = _INPUTS[: 1 + model.runtime.bundle.pair]
        return {
            "name": model.name,
            "versions": [model.version],
            "platform": "cascade-rt_onnxruntime",
            "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in names],
            "outputs": [
                {"name": name, "datatype": kind, "shape": [-1, labels] if name in _PER_LABEL else [-1]}
                for name, (kind, _) in _outputs_of(model).items()
            ],
        }

    @router.get("/models/{name}/ready", summary="Whether a model answers", responses={404: ERRORS[404]})
    @router.get("/models/{name}/versions/{version}/ready", summary="Whether a version answers", responses=ERRORS)
    async def model_ready(name: str, version: str | None = None) -> Response:
        _model(service, name, version)
        return _readiness(service)

    @router.post(
        "/models/{name}/infer",
        summary="Classify texts",
        response_model=InferResponse,
        responses=ERRORS,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _schema()}}}},
    )
    @router.post("/models/{name}/versions/{version}/infer", summary="Classify by a version", include_in_schema=False)
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        """Answer the inputs `text` (and `text_pair`) with the outputs asked for, or with all of them."""
        known = _outputs_of(_model(service, name, version))
        try:
            wanted, binary = _read(request.headers, await request.body())
            texts = _texts(wanted, binary)
            names = _wanted(wanted, list(known))
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        model, answers = await service.classify(request, name, texts)
        return _written(model, answers, wanted, names)

    return router


def _schema() -> dict[str, Any]:
    """Return the schema of `InferRequest` with its parts in place: the body is read here, not by the framework."""
    schema = InferRequest.model_json_schema()
    parts = schema.pop("$defs")
    for name, part in (("inputs", "InputTensor"), ("outputs", "OutputRequest")):
        field = schema["properties"][name]
        next(kind for kind in field.get("anyOf", [field]) if kind["type"] == "array")["items"] = parts[part]
    return schema


def _readiness(service: Service) -> Response:
    service.check_taking()
    return JSON({"ready": True})


def _model(service: Service, name: str, version: str | None) -> Model:
    model = service.models.get(name)
    if version not in (None, "", model.version):
        raise BadField("version", version, f"{model.version}, which is served now")
    return model


def _read(headers: Headers, body: bytes) -> tuple[InferRequest, bytes]:
    """Return the JSON part of a body, and the binary tensors that follow it."""
    header_length = headers.get(HEADER_LENGTH)
    if header_length is None:
        return InferRequest.model_validate(read_json(headers, body)), b""
    if not whole_number(header_length) or int(header_length) > len(body):
        raise BadField("Inference-Header-Content-Length", header_length, f"a length up to {len(body)}")
    length = int(header_length)
    return InferRequest.model_validate(read_json(headers, body[:length])), body[length:]


def _texts(wanted: InferRequest, binary: bytes) -> list[Text]:
    columns: dict[str, list[str]] = {}
    for at, tensor in enumerate(wanted.inputs):
        if tensor.name not in _INPUTS or tensor.name in columns:
            raise BadField(f"inputs.{at}.name", tensor.name, "text, and text_pair for pairs, once each")
        if tensor.datatype != "BYTES":
            raise BadField(f"inputs.{at}.datatype", tensor.datatype, "BYTES")
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is not None:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary):
                raise BadField(f"inputs.{at}.parameters.binary_data_size", size, "the bytes of this tensor")
            found = list(_strings(binary[:size], at))
            binary = binary[size:]
        elif tensor.data is None:
            raise BadField(f"inputs.{at}.data", None, "texts, or binary_data_size in its parameters")
        else:
            found = [text for row in tensor.data for text in ([row] if isinstance(row, str) else row)]
        if not _fits(tensor.shape, len(found)):
            raise BadField(f"inputs.{at}.shape", tensor.shape, f"[{len(found)}] or [{len(found)}, 1], as its data")
        columns[tensor.name] = found
    if binary:
        raise BadField("inputs", len(binary), "no bytes after those of the last tensor")
    if "text" not in columns:
        raise BadField("inputs", list(columns), "an input named text")
    if "text_pair" not in columns:
        return list(columns["text"])
    if len(columns["text"]) != len(columns["text_pair"]):
        raise BadField("inputs", len(columns["text_pair"]), f"{len(columns['text'])} texts in text_pair, as in text")
    return list(zip(columns["text"], columns["text_pair"], strict=True))


def _fits(shape: Sequence[int], count: int) -> bool:
    return tuple(shape) in ((count,), (count, 1))


def _strings(data: bytes, at: int) -> Iterator[str]:
    """Yield the texts of a BYTES tensor: each after its length, 4 bytes."""
    place = 0
    while place < len(data):
        if place + 4 > len(data):
            raise BadField(f"inputs.{at}", len(data), "4 bytes of length before each text")
        (length,) = struct.unpack_from("<I", data, place)
        place += 4
        if place + length > len(data):
            raise BadField(f"inputs.{at}", len(data), "as many bytes as the lengths say")
        try:
            yield data[place : place + length].decode()
        except UnicodeDecodeError as error:
            raise BadField(f"inputs.{at}", data[place : place + 20], "UTF-8") from error
        place += length


def _outputs_of(model: Model) -> Mapping[str, tuple[str, Callable[[Answer], Any]]]:
    """Return all outputs of a model: with several labels per text also which labels each has."""
    if not model.runtime.task.several:
        return _OUTPUTS
    names = model.runtime.bundle.labels
    return {**_OUTPUTS, "labels": ("BOOL", lambda answer: [name in answer.prediction.labels for name in names])}


def _wanted(wanted: InferRequest, known: Sequence[str]) -> dict[str, bool]:
    """Return which outputs are wanted, and which of them as binary data."""
    all_binary = (wanted.parameters or {}).get("binary_data_output") is True
    if not wanted.outputs:
        return dict.fromkeys(known, all_binary)
    for at, output in enumerate(wanted.outputs):
        if output.name not in known:
            raise BadField(f"outputs.{at}.name", output.name, f"one of {', '.join(known)}")
    return {output.name: (output.parameters or {}).get("binary_data", all_binary) is True for output in wanted.outputs}


def _written(model: Model, answers: Sequence[Answer], wanted: InferRequest, names: Mapping[str, bool]) -> Response:
    labels, known = model.runtime.bundle.labels, _outputs_of(model)
    outputs, parts = [], []
    for name, binary in names.items():
        kind, value = known[name]
        values = [value(answer) for answer in answers]
        shape = [len(values), len(labels)] if name in _PER_LABEL else [len(values)]
        output: dict[str, Any] = {"name": name, "datatype": kind, "shape": shape}
        if binary:
            parts.append(_packed(values, kind))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = [item for row in values for item in row] if name in _PER_LABEL else values
        outputs.append(output)
    body = {"model_name": model.name, "model_version": model.version, "outputs": outputs}
    if wanted.id is not None:
        body["id"] = wanted.id
    if not parts:
        return JSON(body)
    header = dumps(body)
    return Response(
        header + b"".join(parts),
        headers={"Inference-Header-Content-Length": str(len(header))},
        media_type="application/octet-stream",
    )


def _packed(values: Sequence[Any], kind: str) -> bytes:
    if kind == "BYTES":
        return packed_strings(value.encode() for value in values)
    array: NDArray[Any] = np.array(values, dtype=_TYPES[kind])
    return array.tobytes()


def packed_strings(strings: Iterable[bytes]) -> bytes:
    """Return a BYTES tensor: each string after its length, 4 bytes."""
    return b"".join(struct.pack("<I", len(string)) + string for string in strings)
