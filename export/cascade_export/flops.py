"""FLOPs of an ONNX graph, counted in its matrix products. Running it shows their shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

_PRODUCTS = {"MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "Gemm", "DynamicQuantizeMatMul"}
_ATTENTION = {"Attention", "MultiHeadAttention"}
_TOKENS = (8, 16, 24)


def graph_flops(file: Path) -> tuple[int, ...]:
    """Return the FLOPs for a text of n tokens, two for each multiply-add: the factors of 1, n and n^2.

    Attention within a window is counted in full, because that is what runs: the rest is masked.
    """
    model = onnx.load(file)
    products = [node for node in _computed_from_texts(model.graph) if node.op_type in _PRODUCTS | _ATTENTION]
    seen = {tensor.name for tensor in model.graph.output}
    for name in dict.fromkeys(name for node in products for name in (node.input[0], node.output[0])):
        if name not in seen:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names, inputs = [output.name for output in session.get_outputs()], [node.name for node in session.get_inputs()]
    counted = []
    for tokens in _TOKENS:
        mask = np.ones((1, tokens), dtype=np.int64)
        batch = {name: mask * (name == "attention_mask") for name in inputs}
        shapes = dict(zip(names, map(np.shape, session.run(names, batch)), strict=True))
        counted.append(sum(_count(one, shapes[one.input[0]], shapes[one.output[0]]) for one in products))
    found = np.polynomial.polynomial.polyfit(_TOKENS, counted, 2)
    return tuple(max(0, round(float(factor))) for factor in found)


def _count(node: onnx.NodeProto, read: tuple[int, ...], written: tuple[int, ...]) -> int:
    """Return the FLOPs of an operator for the shapes of its first input and its output."""
    size = int(np.prod(written))
    if node.op_type in _PRODUCTS:
        return 2 * size * read[-1]
    projections = 3 * 2 * size * read[-1] if node.op_type == "Attention" else 0
    return projections + 2 * 2 * size * read[1]  # each token with each, once for scores and once for means


def _computed_from_texts(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the operators that depend on the inputs; the others (DeBERTa's relative positions) run at load."""
    known = {tensor.name for tensor in graph.input}
    found = []
    for node in graph.node:
        if known.intersection(node.input):
            known.update(node.output)
            found.append(node)
    return found
