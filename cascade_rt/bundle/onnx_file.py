"""Read from an ONNX file's bytes which operators it has and which other files hold its weights.

It needs neither the onnx package nor trust in the file: only the few protobuf fields that lead to tensors and operator
names are followed, everything else is skipped by its length.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..errors import BundleError

# Message -> the numbers of those fields of it that lead to tensors or name operators (onnx.proto3).
_FOLLOWED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {1: "input", 2: "output", 4: "operator", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {1: "dimension", 13: "external"},
    "external": {1: "key", 2: "value"},
}
# Operators on products of bytes -> which of their inputs, from 1, is the zero point of the weights.
_ZERO_POINT = {"DequantizeLinear": 3, "DynamicQuantizeMatMul": 4, "MatMulInteger": 4, "MatMulIntegerToFloat": 6}
_DEEPEST = 64  # messages within messages; real graphs have a handful
_MOST_DIMENSIONS = 16
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


@dataclass
class OnnxFile:
    """The structure of an ONNX file."""

    external: set[str] = field(default_factory=set)
    """Weight files, as written in the file."""
    operators: Counter[str] = field(default_factory=Counter)
    """Nodes by type."""
    weights: int = 0
    """Number of weights."""
    made: dict[str, tuple[str, str]] = field(default_factory=dict)
    """For each output of a node, its type and its first input."""
    without_zero_point: set[str] = field(default_factory=set)
    """Types of nodes that multiply or dequantize bytes, some of them without a zero point of the weights."""

    def add_node(self, operator: str, inputs: list[str], outputs: list[str]) -> None:
        """Note a node; inputs that are left out have no name."""
        self.operators[operator] += 1
        self.made |= dict.fromkeys(outputs, (operator, "".join(inputs[:1])))
        at = _ZERO_POINT.get(operator, 0)
        if at and not any(inputs[at - 1 : at]):
            self.without_zero_point.add(operator)


def scan(path: Path) -> OnnxFile:
    """Read an ONNX file's structure, not its weights; raise BundleError if it is not an ONNX model."""
    found = OnnxFile()
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _message(content, 0, len(content), "model", found, 0)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: not an ONNX model ({error}); export or copy it again") from error
    return found


def _message(content: mmap.mmap, start: int, end: int, kind: str, found: OnnxFile, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    entry = {"key": b"", "value": b"", "operator": b""}
    names: dict[str, list[str]] = {"input": [], "output": []}
    dimensions: list[int] = []
    for number, value in _fields(content, start, end):
        child = _FOLLOWED[kind].get(number)
        if child is None:
            continue
        if child == "dimension":
            dimensions += [value] if isinstance(value, int) else _packed(content, *value)
        elif isinstance(value, int):
            raise ValueError(f"field {number} of a {kind} holds a number")
        elif child in entry:
            entry[child] = content[slice(*value)]
        elif child in names:
            names[child].append(content[slice(*value)].decode())
        else:
            _message(content, *value, child, found, depth + 1)
        if len(dimensions) > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of more than {_MOST_DIMENSIONS} dimensions")
    if kind == "tensor":
        found.weights += prod(dimensions)
    if kind == "node":
        found.add_node(entry["operator"].decode(), names["input"], names["output"])
    if entry["key"] == b"location":
        found.external.add(entry["value"].decode())


def _fields(content: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Yield each field's number with its value: an int, or where its bytes start and end."""
    while at < end:
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 2**29:  # other readers drop the upper bits and would see another field
            raise ValueError(f"field number {number}")
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(content, at)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"unknown kind of field {wire}")
        if length > end - at:
            raise ValueError("cut short")
        yield number, (at, at + length)
        at += length


def _packed(content: mmap.mmap, at: int, end: int) -> list[int]:
    numbers: list[int] = []
    while at < end and len(numbers) <= _MOST_DIMENSIONS:
        number, at = _varint(content, at)
        numbers.append(number)
    return numbers


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
