"""The precisions that a member can be exported in, and how its fused fp32 graph becomes each of them.

The default int8 quantises the activations of each token with that token's range, so neither the other texts of a batch
nor padding change an answer. Weights are quantised symmetrically, by output channel, and the table of word embeddings
by word. Those of products take 7 bits, with which no CPU's kernels saturate; int8-vnni has all 8. Where there are
enough texts, they say how weights are best rounded.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.onnx_model import OnnxModel

from cascade_export.fusion import ROTARY
from cascade_export.rounding import (
    LARGEST,
    LARGEST_EXACT,
    Inputs,
    compensated,
    dimensions,
    measure_inputs,
    rounded,
    smoothing,
    steps_of,
)
from cascade_rt.engine.batching import TOKEN_BUDGET, by_length, micro_batches
from cascade_rt.engine.tokenization import Encoded
from cascade_rt.errors import InputError

Write = Callable[[Path, Path, Encoded | None], None]
"""Takes the fused fp32 graph, the file to write, and texts."""
Weights = tuple[str, ...]
"""Names of matrices that multiply the same input."""

CONTRIB = "com.microsoft"
_OPSET, _IR_VERSION = 21, 10  # of the first QuantizeLinear with scales per block, and its file format
# Of smoothing, found by trying: with one range for all tokens, activations need the more of it.
_STRENGTH_BY_TOKEN, _STRENGTH_ONCE = 0.6, 0.75
_BLOCK = 64  # weights per scale in int8-blocks and int8-weights


def write_precision(source: Path, target: Path, precision: str, texts: Encoded | None = None) -> None:
    """Write the fused fp32 graph `source` to `target` in one of `WRITERS`.

    `texts` like those that the member will answer: `int8-static` needs some for the ranges of activations, `int8`
    rounds weights better with at least as many tokens as a product has input channels; others ignore them.
    """
    WRITERS[precision].write(source, target, texts)


def _fp32(source: Path, target: Path, _: Encoded | None) -> None:
    onnx.save(onnx.load(source), target)


def _fp16(source: Path, target: Path, _: Encoded | None) -> None:
    model = OnnxModel(onnx.load(source))
    angles = [node.name for node in model.nodes() if node.name.startswith(ROTARY)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on weights below the smallest half-precision number, which become it
        model.convert_float_to_float16(keep_io_types=True, node_block_list=angles)
    model.save_model_to_file(str(target))


def _with_int8_words(write: Write) -> Write:
    """Return what writes the same, but for the table of the words."""

    def write_rest(source: Path, target: Path, texts: Encoded | None) -> None:
        graph = _Graph(onnx.load(source))
        graph.quantize_embeddings()
        onnx.save(graph.finished(), target)
        write(target, target, texts)

    return write_rest


def _int8(largest: int) -> Write:
    def write(source: Path, target: Path, texts: Encoded | None) -> None:
        graph = _Graph(onnx.load(source), largest)
        graph.separate_attention()
        graph.quantize_activations_by_token(graph.measured(texts) if texts else {})
        graph.quantize_embeddings()
        onnx.save(graph.finished(), target)

    return write


def _int8_tensor(source: Path, target: Path, _: Encoded | None) -> None:
    with _quiet():
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused operators have no inferred types
        )


def _blocks(accuracy_level: int) -> Write:
    def write(source: Path, target: Path, _: Encoded | None) -> None:
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


def _int8_static(source: Path, target: Path, texts: Encoded | None) -> None:
    if texts is None:
        raise InputError("int8-static: found no texts, expected some for the ranges of activations")
    graph = _Graph(onnx.load(source))
    graph.separate_attention()
    graph.quantize_activations_once(graph.measured(texts))
    graph.quantize_embeddings()
    onnx.save(graph.finished(), target)


@dataclass(frozen=True)
class Writer:
    """The offline half of a precision: how files in it are made."""

    write: Write
    needs_texts: bool = False
    """It draws ranges of activations from texts."""


WRITERS = {
    "fp32": Writer(_fp32),
    "fp16": Writer(_fp16),
    "fp32-int8-words": Writer(_with_int8_words(_fp32)),
    "fp16-int8-words": Writer(_with_int8_words(_fp16)),
    "int8": Writer(_int8(LARGEST_EXACT)),
    "int8-vnni": Writer(_int8(LARGEST)),
    "int8-tensor": Writer(_int8_tensor),
    "int8-blocks": Writer(_blocks(accuracy_level=4)),
    "int8-static": Writer(_int8_static, needs_texts=True),
    "int8-weights": Writer(_blocks(accuracy_level=1)),
}
"""By the names in `cascade_rt.bundle.precisions`."""


class _Graph:
    """A fused graph while its operators are replaced."""

    def __init__(self, model: onnx.ModelProto, largest: int = LARGEST) -> None:
        """`largest`: of the integers that weights of products become."""
        self.model = model
        self._largest = largest
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

    def measured(self, texts: Encoded) -> dict[Weights, Inputs]:
        """Return what the products with constant weights read for these texts, by the names of the weights."""
        batches = micro_batches(by_length(texts.lengths), texts.lengths, TOKEN_BUDGET)
        return measure_inputs(self.model, self._read_by(), (texts.batch(rows) for rows in batches))

    def quantize_activations_by_token(self, measured: Mapping[Weights, Inputs]) -> None:
        """Replace every product with constant weights by one in int8, with one scale per row of its input.

        `measured`: what `measured` found; where it has fewer tokens than channels, weights become the nearest int8.
        """
        unit, middle = self._constant("unit", np.float32(1)), self._constant("middle", np.uint8(128))
        factors = self._round_all(measured, _STRENGTH_BY_TOKEN)
        ranks = dimensions(self.model, list(factors))
        quantized: dict[str, tuple[str, str]] = {}
        for tokens, weight, output in self._products():
            if tokens not in quantized:  # query, key and value share theirs
                quantized[tokens] = self._by_token(tokens, self._array(weight).shape[0], ranks[tokens], factors[tokens])
            values, scale = quantized[tokens]
            # Without a zero point of the weights, ONNX Runtime before 1.30 ends the process on CPUs without VNNI.
            zero = self._constant(f"{weight}_zero", np.int8(0))
            integers = [f"{weight}_int8", unit, f"{weight}_scales", middle, zero]
            self._add("MatMulIntegerToFloat", [values, *integers], f"{output}_scaled", CONTRIB)
            self._add("Mul", [f"{output}_scaled", scale], output)
        self._raise_operators()

    def quantize_activations_once(self, measured: Mapping[Weights, Inputs]) -> None:
        """Quantise and dequantise around every product with constant weights, with one range for all of its input.

        `measured`: as above; it says the ranges too. Engines compute such products in int8.
        """
        factors = self._round_all(measured, _STRENGTH_ONCE)
        read_by = self._read_by()
        quantized: dict[str, str] = {}
        for tokens, weight, output in self._products():
            if tokens not in quantized:
                quantized[tokens] = self._by_one_range(tokens, measured[read_by[tokens]], factors[tokens])
            scaled = [f"{weight}_int8", f"{weight}_scales"]
            self._add("DequantizeLinear", scaled, f"{output}_weight", axis=1)
            self._add("MatMul", [quantized[tokens], f"{output}_weight"], output)

    def _round_all(self, measured: Mapping[Weights, Inputs], strength: float) -> dict[str, str | None]:
        """Round all matrices that multiply activations; return by what each activation is to be multiplied before."""
        read_by = self._read_by()
        shared = Counter(weight for weights in set(read_by.values()) for weight in weights)
        means = {node.output[0] for node in self.model.graph.node if node.op_type == "MultiHeadAttention"}
        factors: dict[Weights, str | None] = {}
        for tokens, weights in read_by.items():
            if weights not in factors:  # ALBERT's layers share theirs
                alone = all(shared[name] == 1 for name in weights)
                smoothed = 0 if tokens in means else strength  # means have no outliers
                factors[weights] = self._round(weights, measured.get(weights) if alone else None, smoothed)
        return {tokens: factors[weights] for tokens, weights in read_by.items()}

    def _products(self) -> Iterator[tuple[str, str, str]]:
        """Yield the input, the weights and the output of each product with constant weights, to be replaced."""
        read_by = self._read_by()
        for node in self._rebuilt():
            if node.op_type == "MatMul" and node.input[0] in read_by and self._is_matrix(node.input[1]):
                yield node.input[0], node.input[1], node.output[0]
            else:
                self._nodes.append(node)

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
            scales = steps_of(values, axis=1)
            rows = self._constant(f"{table}_int8", rounded(values / scales))
            self._add("Gather", [rows, ids], f"{table}_row")
            self._add("Cast", [f"{table}_row"], f"{table}_row_float", to=onnx.TensorProto.FLOAT)
            self._add("Gather", [self._constant(f"{table}_scale", scales), ids], f"{table}_row_scale")
            self._add("Mul", [f"{table}_row_float", f"{table}_row_scale"], node.output[0])

    def finished(self) -> onnx.ModelProto:
        """Return the model without unused weights."""
        read = {name for node in self.model.graph.node for name in node.input}
        kept = [weight for name, weight in self._weights.items() if name in read]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)
        if CONTRIB not in {library.domain for library in self.model.opset_import}:
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return self.model

    def _read_by(self) -> dict[str, Weights]:
        """Return, for each activation, the matrices that multiply it, in the order of the graph."""
        of_texts = self._computed_from_texts()
        found: dict[str, Weights] = {}
        for node in self.model.graph.node:
            if node.op_type == "MatMul" and node.input[0] in of_texts and self._is_matrix(node.input[1]):
                found[node.input[0]] = (*found.get(node.input[0], ()), node.input[1])
        return found

    def _round(self, weights: Weights, inputs: Inputs | None, strength: float) -> str | None:
        """Round matrices that multiply the same input, by output channel, to the constants `_int8` and `_scales`.

        Returns by what their input is to be multiplied before, None for nothing.
        """
        matrices = [self._array(name) for name in weights]
        width = len(matrices[0])
        if inputs is not None and inputs.tokens < width:
            inputs = None
        divisors = smoothing(inputs, matrices, strength) if inputs and strength else np.ones(width, dtype=np.float32)
        for name, matrix in zip(weights, matrices, strict=True):
            smooth_matrix = divisors[:, None] * matrix
            steps = steps_of(smooth_matrix, 0, self._largest)
            integers = (
                compensated(smooth_matrix, steps, inputs.products / np.outer(divisors, divisors), self._largest)
                if inputs
                else rounded(smooth_matrix / steps, self._largest)
            )
            self._constant(f"{name}_int8", integers)
            self._constant(f"{name}_scales", steps[0])
        return self._constant(f"{weights[0]}_smoothing", 1 / divisors) if inputs and strength else None

    def _raise_operators(self) -> None:
        """Declare the ONNX operators of `_OPSET`; since the version that `convert` writes, only types were added."""
        for library in self.model.opset_import:
            if not library.domain:
                library.version = max(library.version, _OPSET)
        self.model.ir_version = max(self.model.ir_version, _IR_VERSION)

    def _computed_from_texts(self) -> set[str]:
        """Return all nodes that depend on the inputs; the rest (DeBERTa's relative positions) is computed at load."""
        found = {tensor.name for tensor in self.model.graph.input}
        for node in self.model.graph.node:
            if found.intersection(node.input):
                found.update(node.output)
        return found

    def _by_token(self, tokens: str, width: int, rank: int, factors: str | None) -> tuple[str, str]:
        """Quantise activations of shape (..., width), times `factors`: return uint8 values, float32 scales (..., 1).

        `rank`: how many dimensions they have. Those with as many share the tensor of their zero points.
        """
        name = f"token{next(self._number)}"
        last = self._constant("last", np.array([-1], dtype=np.int64))
        if factors is not None:
            self._add("Mul", [tokens, factors], f"{name}_smooth")
            tokens = f"{name}_smooth"
        self._add("Abs", [tokens], f"{name}_size")
        self._add("ReduceMax", [f"{name}_size", last], f"{name}_range", keepdims=1)
        # Where all values are 0, so is this scale, and whatever the bytes are, their product with it.
        self._add("Mul", [f"{name}_range", self._constant("step", np.float32(1 / LARGEST))], f"{name}_scale")
        count, middles = f"token_count_{rank}d", f"middles_{rank}d"
        self._add_once("Shape", [f"{name}_scale"], count)
        self._add_once("Expand", ["middle", count], middles)
        self._add("QuantizeLinear", [tokens, f"{name}_scale", middles], f"{name}_values", axis=-1, block_size=width)
        return f"{name}_values", f"{name}_scale"

    def _by_one_range(self, tokens: str, inputs: Inputs, factors: str | None) -> str:
        """Quantise activations, times `factors`, with the range of `inputs`, and return them dequantised."""
        name = f"token{next(self._number)}"
        by: NDArray[Any] = np.ones(1, dtype=np.float32)
        if factors is not None:
            self._add("Mul", [tokens, factors], f"{name}_smooth")
            tokens, by = f"{name}_smooth", self._array(factors)
        lowest, highest = float((by * inputs.lowest).min()), float((by * inputs.highest).max())
        step = (highest - lowest) / 255 or 1.0
        scale = self._constant(f"{name}_scale", np.float32(step))
        zero = self._constant(f"{name}_zero", np.uint8(round(-lowest / step)))
        self._add("QuantizeLinear", [tokens, scale, zero], f"{name}_values")
        self._add("DequantizeLinear", [f"{name}_values", scale, zero], f"{name}_dequantized")
        return f"{name}_dequantized"

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


class _quiet(warnings.catch_warnings):
    """Silence the log of the quantisation library."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *exception: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*exception)
