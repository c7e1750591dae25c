"""Tiny seeded BERT classifiers and bundles, made without torch, transformers or cascade_rt.

The runtime's tests use them where no torch is installed. Bundles are written from the description of the format alone,
so reading them also tests cascade_rt against an independent writer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import BertWordPieceTokenizer

_WORDS = """
the a film is was not very good bad fine great dull bright dark witty boring lovely sad happy it this that and but of
in on with for we they he she you i no yes so too more less never always cat dog sat mat runs walks
"""
WORDS = tuple(_WORDS.split())
LABELS = ("bad", "fine", "good")
CASCADE = (("tiny", 1, 16, 23), ("small", 2, 32, 10), ("big", 4, 32, 59))
"""Name, layers, hidden size and seed of each member; with these seeds, each member answers with every label."""

Weights = dict[str, NDArray[np.float32]]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Member:
    """A member of a bundle: its name, and the arguments of `write_model`."""

    name: str
    weights: Weights
    heads: int = 4
    layers: range | None = None
    from_hidden: bool = False
    hidden_out: bool = False


def vocabulary(words: Sequence[str] = ()) -> dict[str, int]:
    """Return the token ids: special tokens, `WORDS`, extra words, punctuation, letters, one-letter word pieces."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *words, *".,!?'", *_LETTERS]
    pieces += [f"##{letter}" for letter in _LETTERS]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def write_tokenizer(path: Path, words: Sequence[str] = ()) -> None:
    """Write BERT's tokenizer over `vocabulary(words)` as a tokenizer.json that pads on the right."""
    ids = vocabulary(words)
    tokenizer = BertWordPieceTokenizer(ids)
    tokenizer.enable_padding(direction="right", pad_id=ids["[PAD]"], pad_token="[PAD]")
    tokenizer.save(str(path))


def encoder_weights(
    *,
    layers: int,
    hidden: int = 32,
    inner: int | None = None,
    positions: int = 64,
    labels: int = 3,
    seed: int = 0,
    spread: float = 0.3,
    words: Sequence[str] = (),
) -> Weights:
    """Draw a classifier's weights, named as in the state dict of transformers' BertForSequenceClassification.

    `spread` is their standard deviation, three times that in the classifier: confidences cover their range. A larger
    one amplifies rounding errors from layer to layer: at 0.6, four layers turn them into 1e-4 in the logits.
    """
    draw, inner = np.random.default_rng(seed), inner or 3 * hidden
    weights: Weights = {
        f"bert.embeddings.{name}_embeddings.weight": draw.normal(0, spread, (rows, hidden)).astype(np.float32)
        for name, rows in {"word": len(vocabulary(words)), "position": positions, "token_type": 2}.items()
    }
    weights |= _draw(draw, spread, "bert.embeddings.LayerNorm", hidden)
    for at in (f"bert.encoder.layer.{index}" for index in range(layers)):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            weights |= _draw(draw, spread, f"{at}.attention.{name}", hidden, hidden)
        weights |= _draw(draw, spread, f"{at}.attention.output.LayerNorm", hidden)
        weights |= _draw(draw, spread, f"{at}.intermediate.dense", inner, hidden)
        weights |= _draw(draw, spread, f"{at}.output.dense", hidden, inner)
        weights |= _draw(draw, spread, f"{at}.output.LayerNorm", hidden)
    return weights | head_weights(hidden=hidden, labels=labels, seed=draw, spread=spread)


def head_weights(
    *, hidden: int = 32, labels: int = 3, seed: int | np.random.Generator = 0, spread: float = 0.3
) -> Weights:
    """Draw another pooler and classifier, to replace those of `encoder_weights` in a segment."""
    draw = np.random.default_rng(seed)
    pooler = _draw(draw, spread, "bert.pooler.dense", hidden, hidden)
    return pooler | _draw(draw, 3 * spread, "classifier", labels, hidden)


def write_model(
    path: Path,
    weights: Weights,
    *,
    heads: int = 4,
    layers: range | None = None,
    from_hidden: bool = False,
    hidden_out: bool = False,
) -> dict[str, int]:
    """Write a classifier, or a segment that runs some `layers`, as an ONNX file; return its sizes for the manifest.

    Without layers it is a bag of words. `from_hidden`: it reads `hidden_states`, not tokens. `hidden_out`: it also
    returns `last_hidden_state`.
    """
    if layers is None:
        layers = range(sum(name.endswith("intermediate.dense.bias") for name in weights))
    labels, hidden = weights["classifier.weight"].shape
    graph = _Graph(width=hidden // heads)
    states = "hidden_states" if from_hidden else graph.embeddings()
    present = graph.node("Unsqueeze", "attention_mask", np.array([1, 2]))  # rows x 1 x 1 x tokens
    absent = graph.node("Sub", np.float32(1), graph.node("Cast", present, to=TensorProto.FLOAT))
    mask = graph.node("Mul", absent, np.finfo(np.float32).min)
    for index in layers:
        states = graph.layer(f"bert.encoder.layer.{index}", states, mask)
    first = graph.node("Gather", states, np.array(0), axis=1)
    if not layers:  # a bag of words: the mean of the embeddings
        weight = graph.node("Unsqueeze", graph.node("Cast", "attention_mask", to=TensorProto.FLOAT), np.array([2]))
        total = graph.node("ReduceSum", graph.node("Mul", states, weight), np.array([1]), keepdims=0)
        first = graph.node("Div", total, graph.node("ReduceSum", weight, np.array([1]), keepdims=0))
    pooled = graph.node("Tanh", graph.dense("bert.pooler.dense", first))
    graph.node("Identity", graph.dense("classifier", pooled), output="logits")
    if hidden_out:
        graph.node("Identity", states, output="last_hidden_state")

    used = {name: weights[name] for node in graph.nodes for name in node.input if name in weights}
    tokens = (TensorProto.INT64, ["rows", "tokens"])
    vectors = (TensorProto.FLOAT, ["rows", "tokens", hidden])
    inputs = {"hidden_states": vectors} if from_hidden else {"input_ids": tokens, "token_type_ids": tokens}
    outputs = {"logits": (TensorProto.FLOAT, ["rows", labels])} | ({"last_hidden_state": vectors} if hidden_out else {})
    made = helper.make_graph(
        graph.nodes,
        "toy",
        [helper.make_tensor_value_info(name, *kind) for name, kind in (inputs | {"attention_mask": tokens}).items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (used | graph.constants).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    inner = len(weights["bert.encoder.layer.0.intermediate.dense.bias"])
    parameters = sum(weight.size for weight in used.values())
    return {"layers": len(layers), "hidden_size": hidden, "intermediate_size": inner, "parameters": parameters}


def write_bundle(
    folder: Path,
    members: Sequence[Member],
    *,
    thresholds: Sequence[float],
    labels: Sequence[str] = LABELS,
    pair: bool = False,
    max_length: int = 32,
    words: Sequence[str] = (),
    extra: Mapping[str, Any] = {},
) -> Path:
    """Write a bundle of members, small to big, into a new folder and return it.

    Members beyond `thresholds` have none. `extra` adds keys to the manifest, or replaces some.
    """
    folder.mkdir(parents=True)
    tokenizer = folder / "tokenizer.json"
    write_tokenizer(tokenizer, words)
    entries = []
    for member, threshold in zip(members, [*thresholds, *[None] * (len(members) - len(thresholds))], strict=True):
        path = folder / f"{member.name}.onnx"
        arguments = {key: value for key, value in vars(member).items() if key != "name"}
        entry = {
            "name": member.name,
            "file": path.name,
            **write_model(path, **arguments),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "precision": "fp32",
            "threshold": threshold,
        }
        entries.append(entry | ({"reads": "hidden_states"} if member.from_hidden else {}))
    manifest = {
        "format_version": 1,
        "labels": list(labels),
        "pair": pair,
        "max_length": max_length,
        "tokenizer": {"file": tokenizer.name, "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()},
        "members": entries,
        "provenance": {},
    }
    (folder / "cascade.json").write_text(json.dumps(manifest | dict(extra), indent=2), encoding="utf-8")
    return folder


def cascade_members(*, pair: bool = False, shift: int = 0) -> list[Member]:
    """Return the members of `CASCADE`; for pairs, the last two. `shift` gives them other weights."""
    return [
        Member(name, encoder_weights(layers=layers, hidden=hidden, seed=seed + shift))
        for name, layers, hidden, seed in CASCADE[1 if pair else 0 :]
    ]


def write_cascade(
    folder: Path,
    *,
    pair: bool = False,
    shift: int = 0,
    threshold: float = 0.8,
    max_length: int = 32,
    extra: Mapping[str, Any] = {},
) -> Path:
    """Write the bundle of `cascade_members` with the same arguments, with one threshold for all."""
    members = cascade_members(pair=pair, shift=shift)
    thresholds = [threshold] * (len(members) - 1)
    return write_bundle(folder, members, thresholds=thresholds, pair=pair, max_length=max_length, extra=extra)


def segment_members(*, segments: int = 2, layers_each: int = 2, hidden: int = 32, seed: int = 6) -> list[Member]:
    """Return the consecutive segments of one model; their weights are the whole model's, but each has its own head."""
    weights = encoder_weights(layers=segments * layers_each, hidden=hidden, seed=seed)
    return [
        Member(
            f"segment-{index + 1}",
            weights | head_weights(hidden=hidden, seed=1000 * (seed + 1) + index),
            layers=range(index * layers_each, (index + 1) * layers_each),
            from_hidden=index > 0,
            hidden_out=index < segments - 1,
        )
        for index in range(segments)
    ]


def write_segments(
    folder: Path,
    *,
    segments: int = 2,
    layers_each: int = 2,
    seed: int = 6,
    exit_rule: Mapping[str, Any] = {"kind": "patience", "patience": 2},
    pair: bool = False,
    max_length: int = 32,
) -> Path:
    """Write the bundle of `segment_members` with the same arguments, of format version 2, with an exit rule."""
    members = segment_members(segments=segments, layers_each=layers_each, seed=seed)
    extra = {"format_version": 2, "exit_rule": dict(exit_rule)}
    return write_bundle(folder, members, thresholds=(), pair=pair, max_length=max_length, extra=extra)


class _Graph:
    """Collects the nodes of an ONNX graph; its methods return the name of the value they add.

    Weights go by their names in the state dict; `width` is that of an attention head.
    """

    def __init__(self, width: int) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self.width = width

    def node(self, operator: str, *inputs: Any, output: str | None = None, **attributes: Any) -> str:
        """Add an operator; its inputs are names of values and weights, or arrays, which become constants."""
        output = output or f"value_{len(self.nodes)}"
        names = [value if isinstance(value, str) else f"{output}.{index}" for index, value in enumerate(inputs)]
        self.constants |= {n: np.asarray(v) for n, v in zip(names, inputs, strict=True) if not isinstance(v, str)}
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def dense(self, name: str, values: str) -> str:
        """Apply a linear layer."""
        transposed = self.node("Transpose", f"{name}.weight", perm=[1, 0])
        return self.node("Add", self.node("MatMul", values, transposed), f"{name}.bias")

    def norm(self, name: str, one: str, other: str) -> str:
        """Add two values and apply a LayerNorm."""
        total = self.node("Add", one, other)
        return self.node("LayerNormalization", total, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=1e-12)

    def embeddings(self) -> str:
        """Embed words, positions and token types."""
        words = self.node("Gather", "bert.embeddings.word_embeddings.weight", "input_ids")
        types = self.node("Gather", "bert.embeddings.token_type_embeddings.weight", "token_type_ids")
        tokens = self.node("Shape", "input_ids", start=1, end=2)
        positions = self.node("Slice", "bert.embeddings.position_embeddings.weight", np.array([0]), tokens)
        return self.norm("bert.embeddings.LayerNorm", self.node("Add", words, types), positions)

    def layer(self, at: str, states: str, mask: str) -> str:
        """Add an encoder layer; a LayerNorm follows each residual."""
        parts = {}
        for name, axes in {"query": [0, 2, 1, 3], "key": [0, 2, 3, 1], "value": [0, 2, 1, 3]}.items():
            projected = self.dense(f"{at}.attention.self.{name}", states)
            parts[name] = self.node(
                "Transpose", self.node("Reshape", projected, np.array([0, 0, -1, self.width])), perm=axes
            )
        scores = self.node("Div", self.node("MatMul", parts["query"], parts["key"]), np.float32(math.sqrt(self.width)))
        attention = self.node("Softmax", self.node("Add", scores, mask), axis=-1)
        context = self.node("Transpose", self.node("MatMul", attention, parts["value"]), perm=[0, 2, 1, 3])
        context = self.dense(f"{at}.attention.output.dense", self.node("Reshape", context, np.array([0, 0, -1])))
        states = self.norm(f"{at}.attention.output.LayerNorm", context, states)
        inner = self.dense(f"{at}.intermediate.dense", states)
        erf = self.node("Erf", self.node("Div", inner, np.float32(math.sqrt(2))))
        half = self.node("Mul", inner, np.float32(0.5))
        inner = self.node("Mul", half, self.node("Add", erf, np.float32(1)))  # GELU in its exact form
        return self.norm(f"{at}.output.LayerNorm", self.dense(f"{at}.output.dense", inner), states)


def _draw(draw: np.random.Generator, spread: float, name: str, rows: int, columns: int = 0) -> Weights:
    """Draw a linear layer, or make a LayerNorm (which has no columns); biases are zero."""
    weight = draw.normal(0, spread, (rows, columns)) if columns else np.ones(rows)
    return {f"{name}.weight": weight.astype(np.float32), f"{name}.bias": np.zeros(rows, np.float32)}
