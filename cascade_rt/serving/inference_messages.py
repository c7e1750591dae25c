"""The messages of the Open Inference Protocol over gRPC, with the fields that the server reads or writes.

Others, such as parameters of tensors, are skipped by protobuf. The messages are in a pool of their own: generated
classes of the same names, as tritonclient's, can be in the same process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SERVICE = "inference.GRPCInferenceService"
_PACKAGE = "inference"
_TENSOR = {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64 *")}
_VERSION = {"name": (1, "string"), "version": (2, "string")}
_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {**_VERSION, "extensions": (3, "string *")},
    "ModelReadyRequest": _VERSION,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ModelMetadataRequest": _VERSION,
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "string *"),
        "platform": (3, "string"),
        "inputs": (4, "ModelMetadataResponse.TensorMetadata *"),
        "outputs": (5, "ModelMetadataResponse.TensorMetadata *"),
    },
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "inputs": (5, "ModelInferRequest.InferInputTensor *"),
        "outputs": (6, "ModelInferRequest.InferRequestedOutputTensor *"),
        "raw_input_contents": (7, "bytes *"),
    },
    "ModelInferRequest.InferInputTensor": {**_TENSOR, "contents": (5, "InferTensorContents")},
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string")},
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "outputs": (5, "ModelInferResponse.InferOutputTensor *"),
        "raw_output_contents": (6, "bytes *"),
    },
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "InferTensorContents": {"bytes_contents": (8, "bytes *")},
}
"""Fields by message: number and type, which a star makes repeated."""
METHODS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
"""Methods of the service; each takes its name's Request and returns its Response."""


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="open_inference.proto", package=_PACKAGE, syntax="proto3")
    described: dict[str, DescriptorProto] = {}
    for path, fields in _MESSAGES.items():
        outer, _, name = path.rpartition(".")
        message = described[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        described[path] = message
        for field, (number, kind) in fields.items():
            _add_field(message, field, number, kind)
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES}


def _add_field(message: DescriptorProto, name: str, number: int, kind: str) -> None:
    kind, _, repeated = kind.partition(" ")
    label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    if kind in _MESSAGES:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")


MESSAGES = _classes()
"""Classes by name."""
