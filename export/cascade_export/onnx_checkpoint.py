"""Members that are ONNX files already, in folders as Optimum or transformers.js lay them out; no torch needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from cascade_export.checkpoint import Checkpoint, checked_labels, checked_length, member_name, training_record
from cascade_rt.bundle.onnx_file import OnnxFile, scan
from cascade_rt.errors import BundleError, InputError, first_line

# The names that Optimum and transformers.js give to the files of each precision, in order of preference.
FILES = {
    "fp32": ("model.onnx", "model_optimized.onnx"),
    "fp16": ("model_fp16.onnx",),
    "int8": ("model_quantized.onnx", "model_int8.onnx", "model_uint8.onnx"),
}
_FOLDERS = ("", "onnx")
_TORCH_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_INTEGER = ("MatMulInteger", "QLinear", "QGemm", "QuantizeLinear")
_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QAttention"}  # one scale for a whole batch


@dataclass(frozen=True)
class OnnxCheckpoint(Checkpoint):
    """A checkpoint that is an ONNX file, by precision."""

    files: dict[str, Path]
    usual: str  # the default precision

    def copy(self, precision: str, folder: Path) -> tuple[str, list[str]]:
        """Copy the file of a precision into a bundle's folder; return the paths there: its own, its external data's."""
        path = self.files[precision]
        shutil.rmtree(folder / self.name, ignore_errors=True)  # of another precision that was tried
        (folder / f"{self.name}.onnx").unlink(missing_ok=True)
        external = sorted(_scanned(path).external)
        place = PurePosixPath(self.name) / path.name if external else PurePosixPath(f"{self.name}.onnx")
        for written in external:
            at = PurePosixPath(written)
            if at.is_absolute() or ".." in at.parts:
                raise InputError(f"{path}: keeps weights in {written!r}, expected a file beside it or below")
            _copy(path.parent / at, folder / place.parent / at)
        _copy(path, folder / place)
        return str(place), [str(place.parent / written) for written in external]


def is_onnx(source: str) -> bool:
    """Whether `source` is an ONNX file, or a folder that holds one and no torch weights."""
    path = Path(source)
    if path.is_file():
        return path.suffix == ".onnx"
    return path.is_dir() and not any((path / name).exists() for name in _TORCH_WEIGHTS) and bool(_files(path))


def open_onnx(source: str, *, pair: bool | None = None, max_length: int | None = None) -> OnnxCheckpoint:
    """Open an ONNX classifier: its folder, with config.json and tokenizer.json beside or above the file, or one file.

    Without `max_length` it takes as many tokens as config.json and the graph itself allow. Raises InputError for
    what is missing or does not fit.
    """
    path = Path(source)
    if path.is_file():
        folder = path.parent.parent if path.parent.name in _FOLDERS[1:] else path.parent
        usual = _precision_of(path)
        files = {usual: path}
        beside = path.with_name("model.onnx")  # the original of a quantised one
        if usual != "fp32" and beside.is_file() and _precision_of(beside) == "fp32":
            files["fp32"] = beside
    else:
        folder, files = path, _files(path)
        usual = "fp32" if "fp32" in files else next(iter(files))
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        settings_file = folder / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        names = {int(index): str(name) for index, name in config["id2label"].items()}
        layers = int(_first(config, "num_hidden_layers", "n_layers", "num_layers"))
        hidden = int(_first(config, "hidden_size", "dim", "d_model"))
        training = training_record(str(folder))
        _enable_padding(backend, config, settings)
        backend.enable_truncation(512, direction=settings.get("truncation_side", "right"))
        says = int(config.get("max_position_embeddings", 0)) or 512
        model_length = int(settings.get("model_max_length") or 2**31)
        inner = config.get("intermediate_size") or config.get("hidden_dim")
        inner = None if inner is None else int(inner)
        reserved = int(config.get("pad_token_id") or 0) + 1
    except Exception as error:  # missing files, broken JSON, missing keys, and the tokenizers library's bare ones
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"cannot open the member {source!r} ({reason}); expected config.json (id2label, layers, hidden size) and "
            "tokenizer.json beside the ONNX file or in the folder above it"
        ) from error
    if min(layers, hidden, says, reserved) < 1:
        raise InputError(
            f"{folder / 'config.json'}: found {layers} layers, hidden size {hidden}, {says} positions, padding id "
            f"{reserved - 1}; expected positive numbers"
        )
    graph = files.get("fp32", next(iter(files.values())))
    positions = _positions(graph, says, reserved)
    length = checked_length(source, max_length, training, min(positions, model_length))
    backend.enable_truncation(length, direction=settings.get("truncation_side", "right"))
    return OnnxCheckpoint(
        source=source,
        name=member_name(str(folder)),
        labels=checked_labels(source, names),
        pair=bool(training.get("pair", False)) if pair is None else pair,
        max_length=length,
        positions=positions,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        parameters=max(1, _scanned(graph).weights),
        model_type=str(config.get("model_type", "unknown")),
        backend=backend,
        training=training,
        files=files,
        usual=usual,
    )


def _files(folder: Path) -> dict[str, Path]:
    """Return the folder's files by what they are; of one precision the first in the order of `FILES`."""
    found: dict[str, Path] = {}
    for name in (name for names in FILES.values() for name in names):
        for place in (folder / below / name for below in _FOLDERS):
            if place.is_file():
                found.setdefault(_precision_of(place), place)
    return found


def _precision_of(path: Path) -> str:
    """Tell a file's precision by its operators; only fp16 from fp32 by its name."""
    operators = _scanned(path).operators.keys()
    if _DYNAMIC & operators:
        return "int8-tensor"
    if "MatMulNBits" in operators:
        return "int8-blocks"
    if any(name.startswith(_INTEGER) for name in operators):
        return "int8"
    return "fp16" if "fp16" in path.stem else "fp32"


def _scanned(path: Path) -> OnnxFile:
    try:
        return scan(path)
    except BundleError as error:
        raise InputError(str(error)) from error


def _first(config: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in config:
            return config[key]
    raise KeyError(" or ".join(keys))


def _enable_padding(backend: Tokenizer, config: dict[str, Any], settings: dict[str, Any]) -> None:
    token = settings.get("pad_token") or "[PAD]"
    token = str(token["content"] if isinstance(token, dict) else token)
    found = backend.token_to_id(token)
    backend.enable_padding(
        direction="right",
        pad_id=int(config.get("pad_token_id") or 0) if found is None else found,
        pad_type_id=int(settings.get("pad_token_type_id", 0)),
        pad_token=token,
    )


def _positions(path: Path, says: int, reserved: int) -> int:
    """Return how many tokens the graph takes, by running it: RoBERTa-like models take fewer than config.json says."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"{path}: ONNX Runtime cannot load it ({first_line(error)})") from error
    types = {node.name: node.type for node in session.get_inputs()}
    if wrong := [f"{name} as {kind}" for name, kind in types.items() if kind != "tensor(int64)"]:
        raise InputError(f"{path}: takes {', '.join(wrong)}; expected token ids as tensor(int64) only")
    for tokens in (says, says - reserved):
        ids = np.full((1, tokens), reserved, dtype=np.int64)  # any token but padding
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        try:
            session.run(None, {name: values[name] for name in types})
        except Exception:
            continue
        return tokens
    raise InputError(f"{path}: cannot run {says - reserved} tokens, as config.json's max_position_embeddings promises")


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise InputError(f"{source}: is missing, though the ONNX file keeps weights there; copy the folder again")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
