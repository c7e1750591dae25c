"""Weights in files beside the graph, each at the start of a page of memory: ONNX Runtime maps them there.

Mapped weights take no memory until they are read, and processes on a machine share them. Weights that several members
have in common, as a table of words that training left as it was, are in one file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from cascade_rt.bundle import MemberEntry, WeightFile, sha256_of

PAGE = 4096
"""Bytes; smaller weights stay in the graph."""
SHARED = "shared.onnx_data"
"""The file of weights that several members have."""
_SUFFIX = "_data"  # as other exporters and the Hugging Face hub name it
_SMALLEST_SHARED = 2**16  # bytes


def move_weights(path: Path) -> list[str]:
    """Move the weights out of an ONNX file of at most 2 GB; return the name of the file that has them, if any.

    Its name is that of the ONNX file, with "_data".
    """
    return _written(path, onnx.load(path), {})


def share_weights(folder: Path, members: Sequence[MemberEntry]) -> list[MemberEntry]:
    """Move weights that are equal in several members to `SHARED`, in a bundle's folder; return the members' entries.

    For members whose weights `move_weights` has moved. Any ONNX Runtime reads such files, and maps their pages once.
    """
    moved = [member for member in members if [file.file for file in member.data] == [member.file + _SUFFIX]]
    graphs = [onnx.load(folder / member.file) for member in moved]
    hashes = [{weight.name: _hash(weight) for weight in _large(model, _SMALLEST_SHARED)} for model in graphs]
    found = Counter(digest for of_member in hashes for digest in set(of_member.values()))
    if max(found.values(), default=0) < 2:
        return list(members)
    places: dict[str, int] = {}
    with (folder / SHARED).open("wb") as stream:
        for model, of_member in zip(graphs, hashes, strict=True):
            for weight in _large(model, _SMALLEST_SHARED):
                if found[digest := of_member[weight.name]] > 1 and digest not in places:
                    places[digest] = _append(stream, _content(weight))
    changed = {}
    for member, model, of_member in zip(moved, graphs, hashes, strict=True):
        shared = {name: places[digest] for name, digest in of_member.items() if digest in places}
        data = tuple(WeightFile.of(folder, name) for name in _written(folder / member.file, model, shared))
        changed[member.name] = replace(member, sha256=sha256_of(folder / member.file), data=data)
    return [changed.get(member.name, member) for member in members]


def _written(path: Path, model: ModelProto, shared: Mapping[str, int]) -> list[str]:
    """Write a model with its weights beside it; return the names of the files.

    `shared`: where weights are in `SHARED`, by their names.
    """
    data = path.with_name(path.name + _SUFFIX)
    files: dict[str, None] = {}
    data.unlink(missing_ok=True)  # sessions may have mapped the one of before, which stays theirs
    with data.open("wb") as stream:
        for weight in _large(model):
            content, at = _content(weight), shared.get(weight.name)
            file, offset = (SHARED, at) if at is not None else (data.name, _append(stream, content))
            files[file] = None
            _refer(weight, file, offset, len(content))
    if files:
        path.write_bytes(model.SerializeToString())
    if data.name not in files:
        data.unlink()
    return list(files)


def _large(model: ModelProto, above: int = PAGE) -> list[TensorProto]:
    return [weight for weight in model.graph.initializer if weight.ByteSize() > above]


def _content(weight: TensorProto) -> bytes:
    return bytes(weight.raw_data or numpy_helper.to_array(weight).tobytes())


def _hash(weight: TensorProto) -> str:
    return hashlib.sha256(_content(weight)).hexdigest()


def _append(stream: BinaryIO, content: bytes) -> int:
    """Write content at the start of the next page; return where that is."""
    offset = -(-stream.tell() // PAGE) * PAGE
    stream.seek(offset)
    stream.write(content)
    return offset


def _refer(weight: TensorProto, file: str, offset: int, length: int) -> None:
    kept = TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
    kept.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        kept.external_data.add(key=key, value=str(value))
    weight.CopyFrom(kept)
