"""Weights in a file beside the graph, each at the start of a page of memory: ONNX Runtime maps them there.

Mapped weights take no memory until they are read, and processes on a machine share them.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

PAGE = 4096
"""Bytes; smaller weights stay in the graph."""
_SUFFIX = "_data"  # as other exporters and the Hugging Face hub name it


def move_weights(path: Path) -> list[str]:
    """Move the weights out of an ONNX file of at most 2 GB; return the name of the file that has them, if any.

    Its name is that of the ONNX file, with "_data".
    """
    model = onnx.load(path)
    large = [weight for weight in model.graph.initializer if weight.ByteSize() > PAGE]
    if not large:
        return []
    data = path.with_name(path.name + _SUFFIX)
    with data.open("wb") as stream:
        for weight in large:
            content = weight.raw_data or numpy_helper.to_array(weight).tobytes()
            offset = -(-stream.tell() // PAGE) * PAGE
            stream.seek(offset)
            stream.write(content)
            _refer(weight, data.name, offset, len(content))
    path.write_bytes(model.SerializeToString())
    return [data.name]


def _refer(weight: TensorProto, file: str, offset: int, length: int) -> None:
    kept = TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
    kept.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        kept.external_data.add(key=key, value=str(value))
    weight.CopyFrom(kept)
