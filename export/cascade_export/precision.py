"""The precisions that a member can be exported in, and how its fused fp32 graph becomes each of them.

The default int8 quantises the activations of each token with that token's range, so neither the other texts of a batch
nor padding change an answer. Weights are quantised symmetrically, by output channel, and the table of word embeddings
by word.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.onnx_model import OnnxModel

Batch = dict[str, NDArray[np.int64]]
"""A padded micro-batch, by input name."""

CONTRIB = "com.microsoft"
_LARGEST = 127  # of a symmetric int8
_BLOCK = 64  # weights per scale in int8-blocks and int8-weights


def write_precision(source: Path, target: Path, precision: str, calibration: Batch) -> None:
    """Write the fused fp32 graph `source` to `target` in one of `PRECISIONS`.

    The `calibration` batch is what `int8-static` draws the ranges of activations from; others ignore them.
    """
    PRECISIONS[precision](source, target, calibration)


def _fp32(source: Path, target: Path, _: Batch) -> None:
    onnx.save(onnx.load(source), target)


def _fp16(source: Path, target: Path, _: Batch) -> None:
    model = OnnxModel(onnx.load(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on weights below the smallest half-precision number, which become it
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(target))


def _int8(source: Path, target: Path, _: Batch) -> None:
    graph = _Graph(onnx.load(source))
    graph.separate_attention()
    graph.quantize_activations_by_token()
    graph.quantize_embeddings()
    onnx.save(graph.finished(), target)


def _int8_tensor(source: Path, target: Path, _: Batch) -> None:
    with _quiet():
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused operators have no inferred types
        )


def _blocks(accuracy_level: int) -> Callable[[Path, Path, Batch], None]:
    def write(source: Path, target: Path, _: Batch) -> None:
        graph = _Graph(onnx.load(source))
        graph.separate_attention()
        graph.quantize_embeddings()
        with _quiet():
            quantizer = _nbits_quantizer()(
                graph.finished(), bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=accuracy_level
            )
            quantizer.process()
        onnx.save(quantizer.model.model, target)

    return write


def _nbits_quantizer() -> Any:
    """Return the library's quantiser, without the log that its import turns on for the whole process."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415

    root.setLevel(level)
    root.handlers[:] = handlers
    return MatMulNBitsQuantizer


def _int8_static(source: Path, target: Path, calibration: Batch) -> None:
    graph = _Graph(onnx.load(source))
    graph.separate_attention()
    graph.quantize_embeddings()
    graph.declare_activations()
    inputs = [node.name for node in graph.model.graph.input]
    with TemporaryDirectory(prefix="cascade-export-") as folder, _quiet():
        separate = Path(folder) / "separate.onnx"
        onnx.save(graph.finished(), separate)
        quantize_static(
            separate,
            target,
            _Calibration({name: calibration[name] for name in inputs}),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={
                "DefaultTensorType": onnx.TensorProto.FLOAT,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],  # results stay fp32
                "MatMulConstBOnly": True,
                "CalibPercentile": 99.999,
            },
        )


PRECISIONS: dict[str, Callable[[Path, Path, Batch], None]] = {
    "fp32": _fp32,
    "fp16": _fp16,
    "int8": _int8,
    "int8-tensor": _int8_tensor,
    "int8-blocks": _blocks(accuracy_level=4),
    "int8-static": _int8_static,
    "int8-weights": _blocks(accuracy_level=1),
}


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    def __init__(self, batch: Batch) -> None:
        self._batches = iter([batch])  # the library cannot join batches of different lengths

    def get_next(self) -> Batch | None:
        return next(self._batches, None)


class _Graph:
    """A fused graph while its operators are replaced."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._number = itertools.count()
        self._made: set[str] = set()

    def separate_attention(self) -> None:
        """Take the projections out of fused Attention operators, so that they are matrix products like the others."""
        for node in self._rebuilt():
            if node.op_type != "Attention":
                self._nodes.append(node)
                continue
            hidden, packed, bias, *masks = node.input
            settings = {setting.name: helper.get_attribute_value(setting) for setting in node.attribute}
            sizes = settings.pop("qkv_hidden_sizes", None) or [self._array(packed).shape[1] // 3] * 3
            parts = np.split(self._array(packed), np.cumsum(sizes)[:-1], axis=1)
            for part, projection in zip(parts, "qkv", strict=True):
                weight = self._constant(f"{packed}_{projection}", np.ascontiguousarray(part))
                self._add("MatMul", [hidden, weight], f"{node.output[0]}_{projection}")
            projected = [f"{node.output[0]}_{projection}" for projection in "qkv"]
            kept = {name: value for name, value in settings.items() if name in _ATTENTION_SETTINGS}
            bias_at = 3 - 1  # of the additional inputs of Attention: mask, past, attention bias
            mask = masks[0] if masks else ""
            scores = [masks[bias_at]] if len(masks) > bias_at else []
            self._add("MultiHeadAttention", [*projected, bias, mask, *scores], node.output[0], CONTRIB, **kept)

    def quantize_activations_by_token(self) -> None:
        """Replace every product with constant weights by one in int8, with one scale per row of its input."""
        unit, middle = self._constant("unit", np.float32(1)), self._constant("middle", np.uint8(128))
        quantized: dict[str, tuple[str, str]] = {}
        of_texts = self._computed_from_texts()
        for node in self._rebuilt():
            if node.op_type != "MatMul" or node.input[0] not in of_texts or not self._is_matrix(node.input[1]):
                self._nodes.append(node)
                continue
            tokens, weight = node.input
            if tokens not in quantized:  # query, key and value share theirs
                quantized[tokens] = self._by_token(tokens, self._array(weight).shape[0], middle)
            values, scale = quantized[tokens]
            integers, scales = self._by_channel(weight)
            product = f"{node.output[0]}_scaled"
            self._add("MatMulIntegerToFloat", [values, integers, unit, scales, middle], product, CONTRIB)
            self._add("Mul", [product, scale], node.output[0])

    def quantize_embeddings(self) -> None:
        """Keep the biggest lookup table of the embeddings, that of the words, in int8 with a scale per row."""
        tables = [node for node in self.model.graph.node if node.op_type == "Gather" and self._is_matrix(node.input[0])]
        if not tables:
            return
        biggest = max(tables, key=lambda node: self._array(node.input[0]).size)
        for node in self._rebuilt():
            if node != biggest:
                self._nodes.append(node)
                continue
            table, ids = node.input
            values = self._array(table)
            scales = _scales(values, axis=1)
            rows = self._constant(f"{table}_int8", _rounded(values / scales))
            self._add("Gather", [rows, ids], f"{table}_row")
            self._add("Cast", [f"{table}_row"], f"{table}_row_float", to=onnx.TensorProto.FLOAT)
            self._add("Gather", [self._constant(f"{table}_scale", scales), ids], f"{table}_row_scale")
            self._add("Mul", [f"{table}_row_float", f"{table}_row_scale"], node.output[0])

    def declare_activations(self) -> None:
        """Declare the inputs of matrix products as fp32, which the library cannot infer behind fused operators."""
        known = {tensor.name for tensor in self.model.graph.value_info}
        products = [node for node in self.model.graph.node if node.op_type == "MatMul"]
        for tensor in {node.input[0] for node in products if self._is_matrix(node.input[1])} - known:
            self.model.graph.value_info.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))

    def finished(self) -> onnx.ModelProto:
        """Return the model without unused weights."""
        read = {name for node in self.model.graph.node for name in node.input}
        kept = [weight for name, weight in self._weights.items() if name in read]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)
        if CONTRIB not in {library.domain for library in self.model.opset_import}:
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return self.model

    def _computed_from_texts(self) -> set[str]:
        """Return all nodes that depend on the inputs; the rest (DeBERTa's relative positions) is computed at load."""
        found = {tensor.name for tensor in self.model.graph.input}
        for node in self.model.graph.node:
            if found.intersection(node.input):
                found.update(node.output)
        return found

    def _by_token(self, tokens: str, width: int, middle: str) -> tuple[str, str]:
        """Quantise activations of shape (..., width): return their uint8 values, and float32 scales (..., 1)."""
        name = f"token{next(self._number)}"
        last = self._constant("last", np.array([-1], dtype=np.int64))
        self._add("Abs", [tokens], f"{name}_size")
        self._add("ReduceMax", [f"{name}_size", last], f"{name}_largest", keepdims=1)
        self._add("Max", [f"{name}_largest", self._constant("tiny", np.float32(1e-20))], f"{name}_range")
        self._add("Mul", [f"{name}_range", self._constant("step", np.float32(1 / _LARGEST))], f"{name}_scale")
        # QuantizeLinear takes one scale per row of a matrix. Shapes are the same for all activations of one width.
        self._add("Reshape", [f"{name}_scale", last], f"{name}_scales")
        self._add_once("Shape", [f"{name}_scales"], "token_count")
        self._add_once("Expand", [middle, "token_count"], "middles")
        matrix = self._constant(f"matrix{width}", np.array([-1, width], dtype=np.int64))
        self._add("Reshape", [tokens, matrix], f"{name}_matrix")
        self._add("QuantizeLinear", [f"{name}_matrix", f"{name}_scales", "middles"], f"{name}_bytes", axis=0)
        self._add_once("Shape", [tokens], f"shape{width}")
        self._add("Reshape", [f"{name}_bytes", f"shape{width}"], f"{name}_values")
        return f"{name}_values", f"{name}_scale"

    def _by_channel(self, weight: str) -> tuple[str, str]:
        """Quantise weights of shape (inputs, outputs), once: return their int8 values and float32 scales (outputs,)."""
        integers, scales = f"{weight}_int8", f"{weight}_scales"
        if integers not in self._weights:
            values = self._array(weight)
            steps = _scales(values, axis=0)
            self._constant(integers, _rounded(values / steps))
            self._constant(scales, steps[0])
        return integers, scales

    def _rebuilt(self) -> list[onnx.NodeProto]:
        """Return the operators and start a new list, which replaces them when the loop over them ends."""
        before = list(self.model.graph.node)
        del self.model.graph.node[:]
        self._nodes = self.model.graph.node
        return before

    def _add(self, operator: str, inputs: Sequence[str], output: str, domain: str = "", **settings: Any) -> None:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **settings))

    def _add_once(self, operator: str, inputs: Sequence[str], output: str) -> None:
        if output not in self._made:
            self._made.add(output)
            self._add(operator, inputs, output)

    def _constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(np.asarray(value), name)
            self.model.graph.initializer.append(self._weights[name])
        return name

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = numpy_helper.to_array(self._weights[name])
        return array

    def _is_matrix(self, name: str) -> bool:
        weight = self._weights.get(name)
        return weight is not None and len(weight.dims) == 2 and weight.data_type == onnx.TensorProto.FLOAT


_ATTENTION_SETTINGS = ("num_heads", "mask_filter_value", "scale", "unidirectional")


def _scales(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Return the scale of int8 along `axis`, which is kept with size 1; 1 where all values are 0."""
    steps: NDArray[np.float32] = np.abs(values).max(axis=axis, keepdims=True) / np.float32(_LARGEST)
    steps[steps == 0] = 1
    return steps


def _rounded(values: NDArray[Any]) -> NDArray[np.int8]:
    integers: NDArray[np.int8] = np.clip(np.rint(values), -_LARGEST, _LARGEST).astype(np.int8)
    return integers


class _quiet(warnings.catch_warnings):
    """Silence the log of the quantisation library."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *exception: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*exception)
