"""The messages of the Open Inference Protocol over gRPC, and of gRPC's health checks, with the fields that are used.

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
HEALTH = "grpc.health.v1.Health"
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
_HEALTH_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "HealthCheckRequest": {"service": (1, "string")},
    "HealthCheckResponse": {"status": (1, "int32")},  # an enum, which is the same on the wire
}


def _classes(package: str, messages: Mapping[str, Mapping[str, tuple[int, str]]]) -> dict[str, Any]:
    file = FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    described: dict[str, DescriptorProto] = {}
    for path, fields in messages.items():
        outer, _, name = path.rpartition(".")
        message = described[outer].nested_type.add(name=name) if outer else file.message_type.add(name=name)
        described[path] = message
        for field_name, (number, written) in fields.items():
            kind, _, repeated = written.partition(" ")
            label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
            field = message.field.add(name=field_name, number=number, label=label)
            if kind in messages:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


MESSAGES = _classes(SERVICE.rpartition(".")[0], _MESSAGES) | _classes(HEALTH.rpartition(".")[0], _HEALTH_MESSAGES)
"""Classes by name."""
