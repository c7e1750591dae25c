"""Members that are ONNX files already, in folders as Optimum or transformers.js lay them out; no torch needed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cascade_train.settings import guarded, read_settings
from tokenizers import Tokenizer

from cascade_export.check import Probabilities, probabilities, reference
from cascade_export.checkpoint import Checkpoint, checked_length, member_name, task_of, training_record
from cascade_export.onnx_graph import OnnxGraph
from cascade_export.tokenizer_file import bundled, check_same_tokens, longest, read_tokenizer
from cascade_rt.bundle.onnx_file import OnnxFile, scan
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import BundleError, InputError
from cascade_rt.types import Text

# The names that Optimum and transformers.js give to the files of each precision, in order of preference.
FILES = {
    "fp32": ("model.onnx", "model_optimized.onnx"),
    "fp16": ("model_fp16.onnx",),
    "int8": ("model_quantized.onnx", "model_int8.onnx", "model_uint8.onnx"),
}
_EXPECTED = (
    "expected config.json (layers, hidden size) and tokenizer.json beside the ONNX file or in the folder above it"
)
_FOLDERS = ("", "onnx")
_TORCH_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_INTEGER = ("MatMulInteger", "QLinear", "QGemm", "QuantizeLinear")
_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QAttention"}  # one scale for a whole batch


@dataclass(frozen=True)
class OnnxCheckpoint(Checkpoint):
    """A checkpoint that is an ONNX file, by precision."""

    files: dict[str, Path]
    usual: str
    """The default precision."""

    @property
    def precisions(self) -> Sequence[str]:
        """The precisions that there are files of."""
        return tuple(self.files)

    @property
    def removed(self) -> int:
        """None: its vocabulary is kept."""
        return 0

    @property
    def facts(self) -> Mapping[str, Any]:
        """Nothing: the files are taken as they are."""
        return {}

    def weight_bits(self, precision: str) -> int:
        """Return 8: whether its weights have fewer is not known."""
        return 8

    def original(self, texts: Sequence[Text], tokenizer: TextTokenizer) -> Probabilities | None:
        """Return the probabilities of the fp32 file, float64 (texts, labels); None if there is none."""
        if "fp32" not in self.files:
            return None
        return probabilities(reference(self, self.files["fp32"]), tokenizer.encode(texts), self.task)

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
    """Return whether `source` is an ONNX file, or a folder that holds one and no torch weights."""
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
    settings = read_settings(source, folder)
    if not settings.config:
        raise InputError(f"{source}: has no config.json; {_EXPECTED}")
    settings.check_code(["AutoTokenizer"])
    settings.check_task()
    settings.check_tokenizer()
    labels = settings.labels
    with guarded(source, "cannot be opened", _EXPECTED):
        config = settings.config
        layers = int(_first(config, "num_hidden_layers", "n_layers", "num_layers", "n_layer"))
        hidden = int(_first(config, "hidden_size", "dim", "d_model"))
        says = int(config.get("max_position_embeddings", 0)) or 512
        inner = config.get("intermediate_size") or config.get("hidden_dim")
        inner = None if inner is None else int(inner)
        pad_id = int(config.get("pad_token_id") or 0)
        training = training_record(str(folder))
        model_length = longest(settings)
    if min(layers + 1, hidden, says, pad_id + 1) < 1:
        raise InputError(
            f"{folder / 'config.json'}: found {layers} layers, hidden size {hidden}, {says} positions, padding id "
            f"{pad_id}; expected positive numbers"
        )
    tokenizer = read_tokenizer(settings, pad_id=pad_id)
    is_pair = bool(training.get("pair", False)) if pair is None else pair
    main = files.get("fp32", next(iter(files.values())))
    graph = OnnxGraph(main)
    for other in {main, files[usual]} - {main}:
        OnnxGraph(other).check(len(labels))
    graph.check(len(labels))
    positions = graph.positions(says, pad_id + 1)
    length = checked_length(source, max_length, training, min(positions, model_length))
    typed = tokenizer.typed or not graph.takes_types
    backend = bundled(tokenizer.backend, tokenizer.padding, length, tokenizer.cut, typed=typed)
    _check_transformers(source, folder, backend, length, is_pair)
    graph.check_tokens(backend, is_pair)
    return OnnxCheckpoint(
        source=source,
        name=member_name(str(folder)),
        labels=labels,
        task=task_of(settings, training),
        pair=is_pair,
        max_length=length,
        positions=positions,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        parameters=max(1, _scanned(main).weights),
        model_type=str(config.get("model_type", "unknown")),
        backend=backend,
        training=training,
        files=files,
        usual=usual,
    )


def _check_transformers(source: str, folder: Path, backend: Tokenizer, max_length: int, pair: bool) -> None:
    """Compare tokens with those of transformers, where it is installed and can open this tokenizer."""
    try:
        from cascade_train.sources import load_tokenizer  # noqa: PLC0415 - an ONNX folder needs no transformers
    except ImportError:
        return
    try:
        tokenizer = load_tokenizer(str(folder))
    except InputError:  # of another transformers
        return
    check_same_tokens(source, backend, tokenizer, max_length, pair)


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


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in config:
            return config[key]
    raise ValueError(f"config.json has no {' or '.join(keys)}")


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise InputError(f"{source}: is missing, though the ONNX file keeps weights there; copy the folder again")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
