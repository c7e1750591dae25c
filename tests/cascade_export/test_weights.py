"""Weights beside the graph: page by page, with the same answers as inside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from cascade_export.export import export_bundle
from cascade_export.weights import PAGE, move_weights
from onnx import TensorProto, helper, numpy_helper

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.bundle.onnx_file import scan
from cascade_rt.cli import main

from ..conftest import make_member


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


def test_a_session_keeps_the_weights_that_it_has_mapped(tmp_path: Path) -> None:
    file = tmp_path / "member.onnx"
    x = np.ones((1, 64), dtype=np.float32)
    sessions = []
    for value in (1.0, 2.0):  # in the place of the first
        weight = numpy_helper.from_array(np.full((64, 500), value, dtype=np.float32), "weight")
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "weight"], ["y"]), helper.make_node("Gather", ["weight", "i"], ["row"])],
            "graph",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64]),
                helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]),
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 500]) for name in ("y", "row")],
            [weight],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), file)
        move_weights(file)
        sessions.append(onnxruntime.InferenceSession(str(file)))
    for session, value in zip(sessions, (1.0, 2.0), strict=True):
        y, row = session.run(None, {"x": x, "i": np.array([3])})
        assert np.unique(y).tolist() == [64 * value]
        assert np.unique(row).tolist() == [value]


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


def test_members_share_the_weights_that_they_have_in_common(tmp_path: Path) -> None:
    encoder = make_member(tmp_path / "encoder", layers=2, words=tuple(f"word{number}" for number in range(2000)))
    rows = [json.dumps({"text": f"word{n} film", "label": ["good", "bad"][n % 2]}) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    for name, layers in (("small", "1"), ("big", "2")):
        command = ["train", "--base", str(encoder), "--layers", layers, "--train-file", "train.jsonl", "--epochs", "1"]
        command += ["--max-length", "32", "--learning-rate", "1e-3", "--freeze-embeddings", "--no-export-check"]
        assert main([*command, "--output", name]) == 0
    alone = [export_bundle([name], tmp_path / f"{name}-alone", precision="int8") for name in ("small", "big")]
    bundle = export_bundle(["small", "big"], tmp_path / "together", precision="int8")
    small, big = bundle.members
    assert {"shared.onnx_data"} == {file.file for file in small.data} & {file.file for file in big.data}
    size = (tmp_path / "together" / "shared.onnx_data").stat().st_size
    assert size >= 2000 * 32, "the table of the words"
    files = [
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.onnx*"))
        for name in ("small-alone", "big-alone", "together")
    ]
    assert files[2] <= files[0] + files[1] - size + 4096
    assert bundle.format_version == alone[0].format_version == 1
    texts = ["word3 word4 film", "a film", "word1999"]
    found, _ = CascadeRuntime(tmp_path / "together").member_logits(texts)
    for number, name in enumerate(("small", "big")):
        expected, _ = CascadeRuntime(tmp_path / f"{name}-alone").member_logits(texts)
        np.testing.assert_array_equal(found[number], expected[0])
    read_bundle(tmp_path / "together")
