"""Weights beside the graph: page by page, with the same answers as inside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from cascade_export.weights import PAGE, move_weights
from onnx import TensorProto, helper, numpy_helper

from cascade_rt.bundle.onnx_file import scan


def test_weights_are_at_the_start_of_pages_and_answers_are_the_same(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(64, 50)).astype(np.float32)
    halves, bias = draw.normal(size=(50, 90)).astype(np.float16), draw.normal(size=90).astype(np.float16)
    weights = [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(bias, "bias")]
    unpacked = TensorProto(name="halves", data_type=TensorProto.FLOAT16, dims=halves.shape)
    unpacked.int32_data.extend(halves.view(np.uint16).ravel().tolist())  # another way to write weights
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "matrix"], ["y"]),
            helper.make_node("Cast", ["y"], ["y16"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["y16", "halves"], ["z"]),
            helper.make_node("Add", ["z", "bias"], ["logits"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["rows", 90])],
        [*weights, unpacked],
    )
    file = tmp_path / "member.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), file)
    x = draw.normal(size=(3, 64)).astype(np.float32)
    before = onnxruntime.InferenceSession(str(file)).run(None, {"x": x})[0]

    assert move_weights(file) == ["member.onnx_data"]
    assert scan(file).external == {"member.onnx_data"}
    assert file.stat().st_size < PAGE
    moved = {weight.name: weight for weight in onnx.load(file, load_external_data=False).graph.initializer}
    places = {name: {item.key: item.value for item in weight.external_data} for name, weight in moved.items()}
    assert [int(places[name]["offset"]) for name in ("matrix", "halves")] == [0, 16384]
    assert not places["bias"]
    np.testing.assert_array_equal(onnxruntime.InferenceSession(str(file)).run(None, {"x": x})[0], before)
    np.testing.assert_array_equal(numpy_helper.to_array(moved["matrix"], str(tmp_path)), matrix)


def test_small_weights_stay(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 9])],
        [numpy_helper.from_array(np.ones(9, dtype=np.float32), "one")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "small.onnx")
    before = (tmp_path / "small.onnx").read_bytes()
    assert move_weights(tmp_path / "small.onnx") == []
    assert (tmp_path / "small.onnx").read_bytes() == before
