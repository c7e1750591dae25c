"""FLOPs of an ONNX graph, counted in its matrix products. Running it shows their shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

_PRODUCTS = {"MatMul", "MatMulInteger", "Gemm", "DynamicQuantizeMatMul"}
_TOKENS = (8, 16, 24)


def graph_flops(file: Path) -> tuple[int, ...]:
    """Return the FLOPs for a text of n tokens, two for each multiply-add: the factors of 1, n and n^2."""
    model = onnx.load(file)
    products = [node for node in model.graph.node if node.op_type in _PRODUCTS]
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
        ids = np.ones((1, tokens), dtype=np.int64)
        shapes = dict(zip(names, map(np.shape, session.run(names, dict.fromkeys(inputs, ids))), strict=True))
        counted.append(sum(2 * np.prod(shapes[one.output[0]]) * shapes[one.input[0]][-1] for one in products))
    found = np.polynomial.polynomial.polyfit(_TOKENS, counted, 2)
    return tuple(max(0, round(float(factor))) for factor in found)
