"""A deep averaging network as one ONNX graph: token ids in, logits out, n-grams hashed inside.

The table is stored in fp32, fp16 or int8, the linear layers always in fp32. In int8 each column has one scale, so the
sum of a text's rows is exact in int32, whatever the batch, and multiplying by 0 or 1 cannot saturate. The last column
has 1 in the rows that training has seen: its sum is their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from cascade_train.averaging import AveragingConfig, AveragingForSequenceClassification, token_hashes
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_OPSET, _IR_VERSION = 18, 8
_END = 2**31 - 1
_LARGEST = 127


def write_network(
    network: AveragingForSequenceClassification,
    path: Path,
    precision: str,
    own_ids: NDArray[np.int64] | None = None,
) -> None:
    """Write a network in one of `PRECISIONS`.

    `own_ids`: the network's ids of the tokens of a trimmed vocabulary, (tokens,); None for all of its own.
    """
    weights = {name: weight.detach().numpy() for name, weight in network.named_parameters()}
    graph = _Graph()
    config: AveragingConfig = network.config
    width = config.size.dimension
    own = np.arange(config.vocab_size) if own_ids is None else own_ids
    rows, masks = _ngrams(graph, config, own)
    table = np.column_stack([weights["table.weight"], network.seen.numpy().astype(np.float32)])
    table = np.concatenate([table[own], table[config.vocab_size :]])
    sums, scales = PRECISIONS[precision](graph, table, rows, masks)
    counts = graph.add("Cast", graph.add("ReduceSum", masks, graph.constant(np.array([2]))), to=TensorProto.FLOAT)
    if config.pair:  # whose texts may share nothing; a text has at least one token, padding if need be
        counts = graph.add("Max", counts, graph.constant(np.float32(1)))
        sums, scales = graph.add("Mul", sums, graph.constant(scales)), np.ones(width + 1, dtype=np.float32)
    roots = graph.add("Sqrt", counts)
    vectors = graph.add("Div", sums, roots)
    texts = _pair_vectors(graph, vectors) if config.pair else vectors
    text = graph.add("Squeeze", texts, graph.constant(np.array([1])))
    hidden = graph.add("Relu", graph.linear(text, _no_seen(weights["hidden.weight"], scales), weights["hidden.bias"]))
    classifier = weights["classifier.weight"], weights["classifier.bias"]
    if config.several:
        graph.linear(hidden, *classifier, output="logits")
    else:
        seen = graph.add("Div", graph.columns(vectors, width, axis=2), roots)  # a share, times the last scale
        seen = graph.columns(seen, -1) if config.pair else seen
        share = graph.add("Squeeze", seen, graph.constant(np.array([1])))
        graph.add("Mul", graph.linear(hidden, *(weight * scales[-1] for weight in classifier)), share, output="logits")
    onnx.save(graph.model(config.num_labels), path)


def _no_seen(weight: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weights of the hidden layer with 0 for the column of what training has seen, times the scales."""
    parts = weight.reshape(len(weight), -1, len(scales) - 1)
    return (np.pad(parts, ((0, 0), (0, 0), (0, 1))) * scales).reshape(len(weight), -1)


class _Graph:
    """A graph while it is written, operator by operator."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._number = itertools.count()

    def add(self, operator: str, *inputs: str, output: str = "", **settings: object) -> str:
        """Add an operator; return the name of its output."""
        output = output or f"{operator.lower()}_{next(self._number)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **settings))
        return output

    def constant(self, value: NDArray[np.generic] | np.generic) -> str:
        """Add a constant; return its name."""
        name = f"constant_{next(self._number)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def columns(self, of: str, start: int, end: int = _END, axis: int = 1) -> str:
        """Add the slice of an axis from `start` to `end`."""
        return self.add("Slice", of, *(self.constant(np.array([bound])) for bound in (start, end, axis)))

    def unsqueeze(self, of: str, axis: int) -> str:
        """Add an axis."""
        return self.add("Unsqueeze", of, self.constant(np.array([axis])))

    def linear(self, of: str, weight: NDArray[np.float32], bias: NDArray[np.float32], output: str = "") -> str:
        """Add a linear layer with torch's weights."""
        constants = self.constant(np.ascontiguousarray(weight.T)), self.constant(bias)
        return self.add("Gemm", of, *constants, output=output)

    def model(self, labels: int) -> onnx.ModelProto:
        """Return the model of a classifier."""
        read = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"])
            for name in ("input_ids", "attention_mask")
        ]
        answered = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", labels])
        graph = helper.make_graph(self._nodes, "averaging-network", read, [answered], self._constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="cascade-rt"
        )


def _ngrams(graph: _Graph, config: AveragingConfig, own_ids: NDArray[np.int64]) -> tuple[str, str]:
    """Add the rows of `averaging.ngram_rows`, (rows, n-grams), and which each sum has, (rows, sums, n-grams).

    `own_ids`: what each id is hashed as.
    """
    size = config.size
    mixed, rows, real = "input_ids", ["input_ids"], ["attention_mask"]
    if size.ngrams > 1 and len(own_ids) < config.vocab_size:
        mixed = graph.add("Gather", graph.constant(own_ids), "input_ids")
    buckets, tokens = graph.constant(np.int64(size.buckets)), graph.constant(np.int64(len(own_ids)))
    for before in range(1, size.ngrams):
        hashes = token_hashes(torch.from_numpy(own_ids), before, size).numpy()
        last = graph.add("Gather", graph.constant(hashes), graph.columns("input_ids", before))
        mixed = graph.add("Add", graph.columns(mixed, 0, -1), last)
        rows.append(graph.add("Add", graph.add("Mod", mixed, buckets), tokens))
        real.append(graph.columns("attention_mask", before))
    all_rows, mask = (graph.add("Concat", *parts, axis=1) if len(parts) > 1 else parts[0] for parts in (rows, real))
    if not config.pair:
        return all_rows, graph.unsqueeze(mask, 1)
    separator = int(np.searchsorted(own_ids, config.sep_token_id))
    parts = *_pair_masks(graph, config, all_rows, mask, separator), mask
    return all_rows, graph.add("Concat", *(graph.unsqueeze(part, 1) for part in parts), axis=1)


def _pair_masks(graph: _Graph, config: AveragingConfig, rows: str, mask: str, separator: int) -> tuple[str, str, str]:
    """Add which n-grams are in the first text of a pair, in the second, and in both, int64 (rows, n-grams)."""
    one = graph.constant(np.int64(1))
    separators = graph.add("Equal", "input_ids", graph.constant(np.int64(separator)))
    before = graph.add("CumSum", graph.add("Cast", separators, to=TensorProto.INT64), one, exclusive=1)
    starts = graph.add("Min", before, one)  # 1 from the token after the first separator
    sides = [starts, *(graph.columns(starts, 0, -shorter) for shorter in range(1, config.size.ngrams))]
    side = graph.add("Concat", *sides, axis=1) if len(sides) > 1 else starts
    second = graph.add("Mul", mask, side)
    first = graph.add("Sub", mask, second)
    equal = graph.add("Equal", graph.unsqueeze(rows, 2), graph.unsqueeze(rows, 1))
    same = graph.add("Cast", equal, to=TensorProto.INT64)

    def also_in(other: str) -> str:
        found = graph.add("Mul", same, graph.unsqueeze(other, 1))
        return graph.add("ReduceMax", found, graph.constant(np.array([2])), keepdims=0)

    shared = graph.add("Add", graph.add("Mul", first, also_in(second)), graph.add("Mul", second, also_in(first)))
    return first, second, shared


def _pair_vectors(graph: _Graph, sums: str) -> str:
    """Add the vector of a pair: both texts, how they differ, their product, and what they share."""
    first, second, shared = (graph.columns(sums, place, place + 1) for place in range(3))
    difference = graph.add("Abs", graph.add("Sub", first, second))
    return graph.add("Concat", first, second, difference, graph.add("Mul", first, second), shared, axis=2)


def _float_sums(graph: _Graph, table: NDArray[np.floating], rows: str, masks: str) -> tuple[str, NDArray[np.float32]]:
    vectors = graph.add("Gather", graph.constant(table), rows)
    if table.dtype != np.float32:
        vectors = graph.add("Cast", vectors, to=TensorProto.FLOAT)
    sums = graph.add("MatMul", graph.add("Cast", masks, to=TensorProto.FLOAT), vectors)
    return sums, np.ones(table.shape[1], dtype=np.float32)


def _int8_sums(graph: _Graph, table: NDArray[np.float32], rows: str, masks: str) -> tuple[str, NDArray[np.float32]]:
    scales = np.maximum(np.abs(table).max(axis=0), np.finfo(np.float32).tiny) / _LARGEST
    vectors = graph.add("Gather", graph.constant(np.rint(table / scales).astype(np.int8)), rows)
    sums = graph.add("MatMulInteger", graph.add("Cast", masks, to=TensorProto.UINT8), vectors)
    return graph.add("Cast", sums, to=TensorProto.FLOAT), scales.astype(np.float32)


PRECISIONS: Mapping[str, Callable[[_Graph, NDArray[np.float32], str, str], tuple[str, NDArray[np.float32]]]] = {
    "fp32": _float_sums,
    "fp16": lambda graph, table, rows, masks: _float_sums(graph, table.astype(np.float16), rows, masks),
    "int8-table": _int8_sums,
}
"""Number formats of the table; each adds the sums of its rows, and returns a factor for each column of them."""
