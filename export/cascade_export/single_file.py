"""A bundle as one ONNX file that decides about exits itself, for every language that has ONNX Runtime.

input_ids, attention_mask, token_type_ids, thresholds -> member 1 -> probabilities -> the rows whose confidence is not
above the threshold, if any -> member 2 -> ... -> probabilities, exit, layers; with several labels per text also labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import ArrayLike
from onnx import TensorProto, compose, helper, inliner, numpy_helper, version_converter

from cascade_rt import CascadeRuntime
from cascade_rt.bundle import Bundle
from cascade_rt.bundle.manifest import BATCH_TOLERANCE
from cascade_rt.engine.cost import cumulative_layers
from cascade_rt.engine.providers import saturates
from cascade_rt.engine.task import MultiLabel, Task, task_of
from cascade_rt.errors import BundleError, CascadeError, InputError, first_line
from cascade_rt.io.writers import new_path, whole_file
from cascade_rt.types import Text

METADATA = "cascade"
"""Key of the metadata: JSON with labels, members, thresholds, max_length, pair, tokenizer_sha256, any other task."""

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_LARGEST = 2**31 - 1  # bytes of a protocol buffer
_OPSET, _IR_VERSION = 18, 8  # at least; int8 members need newer ones
_END = 2**62  # of a slice to the last column


def pack(model_dir: str | Path, output: str | Path, *, overwrite: bool = False) -> Bundle:
    """Write the members that `CascadeRuntime` uses by default to one ONNX file; return the bundle with them.

    Inputs: `input_ids`, `attention_mask` and `token_type_ids`, int64 (rows, tokens), with at least one row and one
    token; `thresholds`, float64 (members - 1,). Outputs: `probabilities`, float32 (rows, labels); `exit`, the index
    of the member that answered, int64 (rows,); `layers` executed, int64 (rows,) (paper, Algorithm 1). With several
    labels per text also `labels`, which of them are above their cut, bool (rows, labels).

    Raises BundleError for a bundle of segments or with another exit rule, or if the file does not answer as the
    runtime does, and InputError if the file exists or would be larger than 2 GB.
    """
    new_path(output, ".onnx", overwrite=overwrite)
    with CascadeRuntime(model_dir) as runtime:
        _write(runtime, model_dir, output)
        return runtime.bundle


def _write(runtime: CascadeRuntime, model_dir: str | Path, output: str | Path) -> None:
    bundle = runtime.bundle
    if not bundle.is_cascade:
        raise BundleError(
            f"{model_dir}: found members that are segments, or exits by {bundle.exit_rule['kind']}; expected complete "
            "members and exits by maximum_probability"
        )
    if wrong := [entry for entry in bundle.members if saturates(entry)]:
        raise BundleError(
            f"{model_dir}: found member {wrong[0].name!r} in {wrong[0].precision} on a CPU without VNNI, where its "
            "products saturate at ONNX Runtime's default settings, with which one file runs; export the members again "
            "in int8, whose weights now have 7 bits and never saturate, or in fp32"
        )
    try:
        model = _joined(bundle, bundle.folder or Path(model_dir))
        if (size := model.ByteSize()) > _LARGEST:
            raise InputError(f"{model_dir}: its members take {size / 1e9:.1f} GB, expected at most 2.1; use int8")
        with whole_file(output) as path:
            onnx.save(model, path)
            _check(path, runtime)
    except (CascadeError, OSError):
        raise
    except Exception as error:  # neither ONNX's nor ONNX Runtime's classes share a public base
        raise BundleError(
            f"{model_dir}: its members do not work in one ONNX file ({first_line(error)}); export them from their "
            "checkpoints"
        ) from error


def _joined(bundle: Bundle, folder: Path) -> onnx.ModelProto:
    graph = _Graph(bundle)
    for entry in bundle.members:
        graph.add_member(_modern(onnx.load(folder / entry.file)))
    return graph.finished()


def _modern(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a member of any writer without local functions, with ONNX's operators of at least `_OPSET`."""
    model = inliner.inline_local_functions(model)
    for library in [*model.opset_import, *model.graph.node]:
        if library.domain == "ai.onnx":  # another name of the default
            library.domain = ""
    version = max(library.version for library in model.opset_import if not library.domain)
    return model if version >= _OPSET else version_converter.convert_version(model, _OPSET)


def _check(file: Path, runtime: CascadeRuntime) -> None:
    """Raise AssertionError unless `file` answers as the runtime does, at every member."""
    texts: list[Text] = [("a", "b c"), ("b", "c")] if runtime.bundle.pair else ["a", "b c"]
    last = len(runtime.bundle.members) - 1
    session = onnxruntime.InferenceSession(str(file))
    inputs = runtime.plan.tokenizer.encode(texts).batch(np.arange(len(texts)))
    for exit in range(last + 1):
        taus = [1.0] * exit + [0.0] * (last - exit)
        found, exits, _, *labels = session.run(None, {**inputs, "thresholds": np.array(taus)})
        expected = runtime.with_thresholds(taus).predict(texts)
        np.testing.assert_array_equal(exits, [answer.exit for answer in expected])
        np.testing.assert_allclose(found, [answer.probabilities for answer in expected], atol=BATCH_TOLERANCE)
        if labels:
            has = [[name in answer.labels for name in runtime.bundle.labels] for answer in expected]
            np.testing.assert_array_equal(labels[0], has)


class _Graph:
    """The graph while members are added to it, small to big."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._task = task_of(bundle)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._opsets = {"": _OPSET}
        self._ir_version = _IR_VERSION
        self._added = 0

    def add_member(self, model: onnx.ModelProto) -> None:
        """Add the next member: the first runs on all rows, another one on those that have not left.

        Weights stay outside of the branches, where sessions hold them once.
        """
        at, last = self._added, len(self._bundle.members) - 1
        self._added += 1
        self._ir_version = max(self._ir_version, model.ir_version)
        for library in model.opset_import:
            self._opsets[library.domain] = max(self._opsets.get(library.domain, 0), library.version)
        model = compose.add_prefix(model, f"member{at}/")
        self._constants |= {weight.name: weight for weight in model.graph.initializer}
        if at == 0:
            self._nodes += _reading(model.graph, {name: name for name in _TOKENS}, at)
            self._nodes += _probabilities(model.graph, at, "found0", self._task)
            self._node("Shape", ["found0"], "rows", end=1)
            self._node("ConstantOfShape", ["rows"], "exit0", value=_tensor([0]))
        else:
            self._node("NonZero", [f"waiting{at - 1}"], f"waiting_rows{at}")
            self._node("Transpose", [f"waiting_rows{at}"], f"rows{at}")
            self._node("Size", [f"rows{at}"], f"count{at}")
            self._node("Greater", [f"count{at}", self._constant("zero", 0)], f"any{at}")
            branches = {"then_branch": self._answering(model.graph, at), "else_branch": _passing(at)}
            self._node("If", [f"any{at}"], f"found{at}", **branches)
            self._node("Cast", [f"waiting{at - 1}"], f"step{at}", to=TensorProto.INT64)
            self._node("Add", [f"exit{at - 1}", f"step{at}"], f"exit{at}")
        if at < last:
            self._confidence(at)
            self._node("Gather", ["thresholds", self._constant(f"index{at}", at)], f"threshold{at}")
            self._node("Greater", [f"confidence{at}", f"threshold{at}"], f"confident{at}")
            staying = f"staying{at}" if at else "waiting0"
            self._node("Not", [f"confident{at}"], staying)  # NaN continues
            if at:
                self._node("And", [f"waiting{at - 1}", staying], f"waiting{at}")

    def _confidence(self, at: int) -> None:
        """Add the operators from probabilities to confidences: see `Task.confidence`."""
        last_axis = self._constant("last_axis", [-1])
        if not isinstance(self._task, MultiLabel):
            self._node("ReduceMax", [f"found{at}", last_axis], f"confidence{at}", keepdims=0)
            return
        one, cuts = self._constant("one", 1.0, np.float64), self._constant("cuts", self._task.cuts, np.float64)
        tiny = self._constant("tiny", np.finfo(np.float64).tiny, np.float64)
        rest = self._constant("rest_of_cuts", 1.0 - np.array(self._task.cuts), np.float64)
        self._node("Sub", [one, f"found{at}"], f"rest{at}")
        self._node("Mul", [f"found{at}", rest], f"above_cut{at}")
        self._node("Mul", [cuts, f"rest{at}"], f"below_cut{at}")
        self._node("Max", [f"above_cut{at}", f"below_cut{at}"], f"larger{at}")
        self._node("Add", [f"above_cut{at}", f"below_cut{at}"], f"both{at}")
        self._node("Max", [f"both{at}", tiny], f"whole{at}")
        self._node("Div", [f"larger{at}", f"whole{at}"], f"distances{at}")
        self._node("ReduceMin", [f"distances{at}", last_axis], f"confidence{at}", keepdims=0)

    def _above(self, at: int, output: str) -> None:
        assert isinstance(self._task, MultiLabel)
        self._node("Greater", [f"found{at}", self._constant("cuts", self._task.cuts, np.float64)], output)

    def finished(self) -> onnx.ModelProto:
        """Return the model."""
        last = self._added - 1
        self._node("Identity", [f"exit{last}"], "exit")
        layers = cumulative_layers(self._bundle.members)
        self._node("Gather", [self._constant("cumulative_layers", layers), "exit"], "layers")
        self._node("Cast", [f"found{last}"], "probabilities", to=TensorProto.FLOAT)
        labels = ["rows", len(self._bundle.labels)]
        answers = [helper.make_tensor_value_info("labels", TensorProto.BOOL, labels)] if self._task.several else []
        if answers:
            self._above(last, "labels")
        tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"]) for name in _TOKENS]
        graph = helper.make_graph(
            self._nodes,
            "cascade",
            [*tokens, helper.make_tensor_value_info("thresholds", TensorProto.DOUBLE, [last])],
            [
                helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, labels),
                helper.make_tensor_value_info("exit", TensorProto.INT64, ["rows"]),
                helper.make_tensor_value_info("layers", TensorProto.INT64, ["rows"]),
                *answers,
            ],
            list(self._constants.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version, producer_name="cascade-rt")
        helper.set_model_props(model, {METADATA: json.dumps(self._facts(), ensure_ascii=False)})
        return model

    def _facts(self) -> dict[str, Any]:
        bundle = self._bundle
        return {
            "labels": bundle.labels,
            "members": [{"name": entry.name, "layers": entry.layers} for entry in bundle.members],
            "thresholds": bundle.thresholds,
            "max_length": bundle.max_length,
            "pair": bundle.pair,
            "tokenizer_sha256": bundle.tokenizer_sha256,
            **({"task": bundle.task} if self._task.several else {}),
        }

    def _answering(self, member: onnx.GraphProto, at: int) -> onnx.GraphProto:
        """Return a branch: a member on the waiting rows, without columns that are padding in all of them."""
        nodes = list[onnx.NodeProto]()
        add = partial(_add, nodes)
        first, last = self._constant("first_axis", [0]), self._constant("last_axis", [-1])
        add("Squeeze", [f"rows{at}", last], f"row_list{at}")
        add("Gather", ["attention_mask", f"row_list{at}"], f"mask{at}", axis=0)
        add("ReduceMax", [f"mask{at}", first], f"used{at}", keepdims=0)
        add("Slice", [f"used{at}", self._constant("one_axis", [1]), self._constant("end", [_END])], f"others{at}")
        add("Concat", [self._constant("one_axis", [1]), f"others{at}"], f"columns{at}", axis=0)  # at least one
        add("NonZero", [f"columns{at}"], f"column_rows{at}")
        add("Squeeze", [f"column_rows{at}", first], f"column_list{at}")
        for name in _TOKENS:
            add("Gather", [name, f"row_list{at}"], f"{name}_rows{at}", axis=0)
            add("Gather", [f"{name}_rows{at}", f"column_list{at}"], f"{name}{at}", axis=1)
        nodes += _reading(member, {name: f"{name}{at}" for name in _TOKENS}, at)
        nodes += _probabilities(member, at, f"answers{at}", self._task)
        add("ScatterND", [f"found{at - 1}", f"rows{at}", f"answers{at}"], f"answered{at}")
        return helper.make_graph(nodes, f"answering{at}", [], [_rows_of_probabilities(f"answered{at}")])

    def _node(self, operator: str, inputs: Sequence[str], output: str, **settings: Any) -> None:
        _add(self._nodes, operator, inputs, output, **settings)

    def _constant(self, name: str, value: ArrayLike, dtype: type = np.int64) -> str:
        self._constants[name] = _tensor(value, name, dtype)
        return name


def _add(nodes: list[onnx.NodeProto], operator: str, inputs: Sequence[str], output: str, **settings: Any) -> None:
    nodes.append(helper.make_node(operator, inputs, [output], name=output, **settings))


def _reading(member: onnx.GraphProto, inputs: dict[str, str], at: int) -> list[onnx.NodeProto]:
    """Return a member's operators, with other names for its inputs.

    Additions before normalizations become sums: ONNX Runtime would fuse additions into a slower kernel, with other
    rounding than in `CascadeRuntime`, which can turn that off.
    """
    normalized = {node.input[0] for node in member.node if node.op_type == "LayerNormalization"}
    renamed = {f"member{at}/{name}": other for name, other in inputs.items()}
    nodes = list(member.node)
    _rename(nodes, renamed)
    for node in nodes:
        if node.op_type == "Add" and node.output[0] in normalized:
            node.op_type = "Sum"
    return nodes


def _rename(nodes: Iterable[onnx.NodeProto], renamed: Mapping[str, str]) -> None:
    """Give inputs of operators other names, in their branches too."""
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for setting in node.attribute:
            for branch in [setting.g, *setting.graphs]:
                _rename(branch.node, renamed)


def _probabilities(member: onnx.GraphProto, at: int, output: str, task: Task) -> list[onnx.NodeProto]:
    """Return the operators from logits to probabilities, in float64 as in the runtime."""
    outputs = [tensor.name for tensor in member.output]
    logits = f"member{at}/logits" if f"member{at}/logits" in outputs else outputs[0]
    return [
        helper.make_node("Cast", [logits], [f"logits{at}"], name=f"logits{at}", to=TensorProto.DOUBLE),
        helper.make_node("Sigmoid", [f"logits{at}"], [output], name=output)
        if task.several
        else helper.make_node("Softmax", [f"logits{at}"], [output], name=output, axis=-1),
    ]


def _passing(at: int) -> onnx.GraphProto:
    """Return the branch for no waiting rows."""
    node = helper.make_node("Identity", [f"found{at - 1}"], [f"passed{at}"], name=f"passed{at}")
    return helper.make_graph([node], f"passing{at}", [], [_rows_of_probabilities(f"passed{at}")])


def _rows_of_probabilities(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["rows", "labels"])


def _tensor(value: ArrayLike, name: str = "", dtype: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
