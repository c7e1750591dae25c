"""Fusions for encoders with rotary positions and gated feed-forward blocks (ModernBERT, EuroBERT, GTE).

ONNX Runtime's transformer optimizer leaves their attention in single operators, dozens for each layer. Here it becomes
RotaryEmbedding and MultiHeadAttention, and products whose output is split become several products. Operators are found
by their kinds and by how they are connected; what they compute is compared with the graph before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.transformers.onnx_model import OnnxModel

Inputs = Mapping[str, NDArray[Any]]

_CONTRIB = "com.microsoft"
_MASK = "attention_mask"
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")
_MASKED = float(np.finfo(np.float32).min)
_OUTSIDE = -1e9  # of the window; its sum with `_MASKED` is finite, so that no row of padding becomes NaN
_TOLERANCE = 1e-4
_PROBED = 8  # positions

ROTARY = "rotary_"
"""Beginning of the names of the operators that compute angles of positions, which fp16 is too coarse for."""


def fuse_rotary(model: OnnxModel, heads: int, example: Inputs) -> None:
    """Fuse the rotary attention of a model; leave the model as it is where there is none.

    `heads`: of its attention; `example`: inputs by name. Where the new graph does not answer the example as the old one
    does, the model is left as it was too.
    """
    before = onnx.ModelProto()
    before.CopyFrom(model.model)
    fusion = _Fusion(model, heads)
    if not fusion.fuse_attention():
        model.initialize(before)
        return
    fusion.split_gates()
    model.prune_graph(allow_remove_graph_inputs=False)
    _Fusion(model, heads).separate_products()
    model.prune_graph(allow_remove_graph_inputs=False)
    model.topological_sort()
    old, new = (_run(graph, [graph.graph.output[0].name], example)[0] for graph in (before, model.model))
    if not np.allclose(old, new, rtol=_TOLERANCE, atol=_TOLERANCE):
        model.initialize(before)


class _Fusion:
    """A graph while its operators are replaced."""

    def __init__(self, model: OnnxModel, heads: int) -> None:
        self._model = model
        self._heads = heads
        self._makers = model.output_name_to_node()
        self._readers = model.input_name_to_nodes()
        self._names: set[str] = set()
        self._windows: dict[str, int | None] = {}
        self._frequencies: dict[bytes, str] = {}

    def fuse_attention(self) -> int:
        """Replace attention with rotary positions; return how often."""
        return sum([self._fuse(node) for node in list(self._model.nodes()) if node.op_type == "Softmax"])

    def _fuse(self, softmax: NodeProto) -> bool:
        """Replace the attention around a softmax; return False where it is of another kind."""
        scores = self._model.match_parent_path(softmax, ["Add", "Mul", "MatMul"], [0, 0, 0], self._makers)
        reads = self._read_by(softmax, "MatMul", "Transpose", "Reshape")
        if not scores or not reads:
            return False
        masked, scaled, product = scores
        scale = self._model.get_constant_value(scaled.input[1])
        keys = self._model.match_parent(product, "Transpose", 1, self._makers)
        window = self._window(masked.input[1])
        if scale is None or scale.size != 1 or keys is None or window is None:
            return False
        query, key = self._rotated(product.input[0]), self._rotated(keys.input[0])
        if not query or not key:
            return False
        name = reads[-1].output[0]
        inputs = [query, key, self._tokens(reads[0].input[1]), "", self._key_mask()]
        if window:
            inputs.append(self._window_bias(window))
        self._model.remove_node(reads[-1])
        settings = {"num_heads": self._heads, "scale": scale.item(), "mask_filter_value": _MASKED}
        self._add("MultiHeadAttention", inputs, [name], _CONTRIB, **settings)
        return True

    def split_gates(self) -> None:
        """Replace the two halves that are cut out of a tensor by one Split."""
        for first in list(self._model.nodes()):
            whole = first.output[0]
            halves = [one for one in self._readers.get(whole, []) if one.op_type == "Slice" and one.input[0] == whole]
            if len(halves) == 2 and halves[0].input[2] == halves[1].input[1]:
                self._model.remove_nodes(halves)
                self._add("Split", [whole], [half.output[0] for half in halves], axis=-1, num_outputs=2)

    def separate_products(self) -> None:
        """Replace products with constant weights, of which an output is split by columns, by one for each part."""
        for split in [node for node in self._model.nodes() if node.op_type == "Split"]:
            product = self._makers.get(split.input[0])
            if product is None or product.op_type != "MatMul" or len(self._readers[split.input[0]]) > 1:
                continue
            weights = self._model.get_initializer(product.input[1])
            if weights is None or len(weights.dims) != 2:
                continue
            parts = np.split(numpy_helper.to_array(weights), len(split.output), axis=1)
            self._model.remove_node(split)
            for index, (part, output) in enumerate(zip(parts, split.output, strict=True)):
                name = self._constant(f"{weights.name}_{index}", np.ascontiguousarray(part))
                self._add("MatMul", [product.input[0], name], [output])

    def _read_by(self, node: NodeProto, *kinds: str) -> list[NodeProto]:
        """Return the chain of the only readers of a node's output, [] where they are of other kinds."""
        found: list[NodeProto] = []
        for kind in kinds:
            readers = self._readers.get((found or [node])[-1].output[0], [])
            if len(readers) != 1 or readers[0].op_type != kind:
                return []
            found.append(readers[0])
        return found

    def _rotated(self, tensor: str) -> str | None:
        """Return a new tensor (rows, tokens, width) for one with rotary positions; None for one without.

        What is matched is x * cosines + (-second half of x, first half of x) * sines.
        """
        whole = self._makers.get(tensor)
        if whole is None or whole.op_type != "Add":
            return None
        turned = self._model.match_parent_path(whole, ["Mul", "Concat", "Neg", "Slice"], [1, 0, 0, 0], self._makers)
        plain = self._model.match_parent(whole, "Mul", 0, self._makers)
        if not turned or plain is None or plain.input[0] != turned[-1].input[0]:
            return None
        tables = self._tables(plain.input[1], turned[0].input[1])
        if tables is None:
            return None
        tokens = self._tokens(plain.input[0])
        # With a start instead of all positions, OpenVINO answers wrongly; it knows no default for `interleaved`.
        self._add("Expand", [self._range(), "shape_of_mask"], ["positions_of_texts"])
        inputs = [tokens, "positions_of_texts", *tables]
        self._add("RotaryEmbedding", inputs, [f"{tokens}_rotated"], _CONTRIB, interleaved=0)
        return f"{tokens}_rotated"

    def _tables(self, cosines: str, sines: str) -> tuple[str, str] | None:
        """Return tensors (tokens, half of a head's width) with the cosines and sines of all positions of a text.

        None where those of the graph are not of each position times constant frequencies.
        """
        makers = [node for node in self._ancestors([cosines]) if node.op_type == "Cos"]
        if len(makers) != 1:
            return None
        mask = np.ones((1, _PROBED), dtype=np.int64)
        found = self._evaluate([makers[0].input[0], cosines, sines], mask)
        angles, *tables = (values.reshape(_PROBED, -1) for values in found)
        frequencies = np.ascontiguousarray(angles[1, : angles.shape[1] // 2])
        expected = np.tile(np.outer(np.arange(_PROBED), frequencies), 2)
        for values, by in zip(tables, (np.cos(expected), np.sin(expected)), strict=True):
            if values.shape != by.shape or not np.allclose(values, by, atol=_TOLERANCE):
                return None
        name = self._frequencies.setdefault(frequencies.tobytes(), f"{ROTARY}{len(self._frequencies)}")
        self._add("Cast", [self._range()], [f"{ROTARY}positions"], to=TensorProto.FLOAT)
        last = self._constant("last_axis", np.array([-1]))
        self._add("Unsqueeze", [f"{ROTARY}positions", last], [f"{ROTARY}column"])
        self._add("Mul", [f"{ROTARY}column", self._constant(f"{name}_by", frequencies)], [f"{name}_angles"])
        self._add("Cos", [f"{name}_angles"], [f"{name}_cosines"])
        self._add("Sin", [f"{name}_angles"], [f"{name}_sines"])
        return f"{name}_cosines", f"{name}_sines"

    def _range(self) -> str:
        """Return the positions 0, 1, ... of a text, shape (tokens,)."""
        zero, one = (self._constant(f"number_{number}", np.int64(number)) for number in (0, 1))
        self._add("Shape", [_MASK], ["shape_of_mask"])
        self._add("Gather", ["shape_of_mask", one], ["number_of_tokens"])
        self._add("Range", [zero, "number_of_tokens", one], ["positions_of_tokens"])
        return "positions_of_tokens"

    def _tokens(self, tensor: str) -> str:
        """Return the tensor (rows, tokens, width) of which another is a view by heads, or the part of it."""
        part: tuple[int, int] | None = None
        while (node := self._makers.get(tensor)) is not None and node.op_type in (*_VIEWS, "Split"):
            if node.op_type == "Split":
                part = list(node.output).index(tensor), len(node.output)
            tensor = node.input[0]
        if part is None:
            return tensor
        outputs = [f"{tensor}_part{index}" for index in range(part[1])]
        self._add("Split", [tensor], outputs, axis=-1, num_outputs=part[1])
        return outputs[part[0]]

    def _window(self, bias: str) -> int | None:
        """Return to how far a token attends on each side, 0 for all; None for an addition that is not such a mask."""
        if bias not in self._windows:
            self._windows[bias] = self._find_window(bias)
        return self._windows[bias]

    def _find_window(self, bias: str) -> int | None:
        compared = [node for node in self._ancestors([bias]) if node.op_type == "LessOrEqual"]
        limits = [self._model.get_constant_value(node.input[1]) for node in compared]
        window = int(limits[0]) if limits and limits[0] is not None else 0
        tokens = window + 3
        mask = np.ones((2, tokens), dtype=np.int64)
        mask[1, -1] = 0
        (values,) = self._evaluate([bias], mask)
        distance = np.abs(np.subtract.outer(np.arange(tokens), np.arange(tokens)))
        attended = (distance <= (window or tokens)) & mask.astype(bool)[:, None, :]
        if values.ndim != 4 or values.shape[1] != 1:
            return None
        seen = np.broadcast_to(values[:, 0], attended.shape)
        return window if np.array_equal(seen == 0, attended) and (seen[~attended] < _OUTSIDE).all() else None

    def _key_mask(self) -> str:
        self._add("Cast", [_MASK], ["key_mask"], to=TensorProto.INT32)
        return "key_mask"

    def _window_bias(self, window: int) -> str:
        """Return what is added to scores, 0 within the window, shape (1, 1, tokens, tokens)."""
        name = f"window_{window}"
        for side, axes in (("rows", [0, 1, 3]), ("columns", [0, 1, 2])):
            by = self._constant(f"axes_of_{side}", np.array(axes))
            self._add("Unsqueeze", [self._range(), by], [f"positions_of_{side}"])
        self._add("Sub", ["positions_of_rows", "positions_of_columns"], ["difference_of_positions"])
        self._add("Abs", ["difference_of_positions"], ["distance_of_positions"])
        limit = self._constant(f"{name}_limit", np.int64(window))
        self._add("LessOrEqual", ["distance_of_positions", limit], [f"{name}_within"])
        inside, outside = self._constant("inside", np.float32(0)), self._constant("outside", np.float32(_OUTSIDE))
        self._add("Where", [f"{name}_within", inside, outside], [name])
        return name

    def _evaluate(self, tensors: Sequence[str], mask: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Return tensors that depend on a text's length and on its mask (rows, tokens) alone."""
        nodes = self._ancestors(tensors)
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "part",
            list(self._model.graph().input),
            [],
            [weight for weight in self._model.graph().initializer if weight.name in read],
        )
        part = helper.make_model(graph, opset_imports=self._model.model.opset_import)
        part.ir_version = self._model.model.ir_version
        inputs: dict[str, NDArray[Any]] = {}
        for tensor in graph.input:
            width = [size.dim_value for size in tensor.type.tensor_type.shape.dim][2:]  # of hidden states
            inputs[tensor.name] = np.zeros([*mask.shape, *width], np.float32 if width else np.int64)
        return _run(part, tensors, inputs | {_MASK: mask})

    def _ancestors(self, tensors: Sequence[str]) -> list[NodeProto]:
        """Return the operators that tensors depend on."""
        found: dict[str, NodeProto] = {}
        missing = list(tensors)
        while missing:
            node = self._makers.get(missing.pop())
            if node is not None and node.output[0] not in found:
                found[node.output[0]] = node
                missing += node.input
        return list(found.values())

    def _constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        if name not in self._names:
            self._names.add(name)
            self._model.add_initializer(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **settings: Any
    ) -> None:
        """Add an operator, once."""
        if outputs[0] not in self._names:
            self._names.add(outputs[0])
            self._model.add_node(
                helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **settings)
            )


def _run(model: onnx.ModelProto, outputs: Sequence[str], inputs: Inputs) -> list[NDArray[Any]]:
    """Return tensors of a model as it stands, without what a session would optimize."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    part.graph.ClearField("output")
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(list(outputs), {tensor.name: inputs[tensor.name] for tensor in session.get_inputs()}))
