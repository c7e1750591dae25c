"""ONNX graphs of any tool: what the runtime would answer wrongly is refused by name, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cascade_export.export import export_bundle
from cascade_export.onnx_checkpoint import open_onnx
from onnx import TensorProto, helper, numpy_helper

from cascade_rt import CascadeRuntime
from cascade_rt.errors import InputError

from ..toy import LABELS, vocabulary, write_tokenizer

USUAL = ("input_ids", "attention_mask", "token_type_ids")
CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "hidden_size": 3,
    "max_position_embeddings": 40,
    "id2label": {str(index): label for index, label in enumerate(LABELS)},
}


def a_folder(
    folder: Path,
    *,
    inputs: Sequence[str] = USUAL,
    kind: int = TensorProto.INT64,
    shape: Sequence[Any] = ("rows", "tokens"),
    ends: Sequence[str] = (),
    rows: int | None = None,
    types: int = 2,
    whole: bool = False,
    config: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
) -> Path:
    """Write a folder whose graph adds up a row of a table for each token, and for its type.

    `ends`: operators after the sum. `rows`: of the table. `types`: of the types' table. `whole`: logits of each token.
    """
    draw = np.random.default_rng(0)
    ids, mask, segments = (*inputs, "", "")[:3]
    tables = {
        "words": draw.normal(0, 1, (rows or len(vocabulary()), 3)),
        "types": draw.normal(0, 1, (types, 3)),
        "last": np.array([-1]),
        "tokens": np.array([1]),
    }
    nodes = [helper.make_node("Gather", ["words", ids], ["seen"])]
    if segments:
        nodes += [
            helper.make_node("Gather", ["types", segments], ["typed"]),
            helper.make_node("Add", ["seen", "typed"], ["both"]),
        ]
    seen = "both" if segments else "seen"
    if mask:
        nodes += [
            helper.make_node("Cast", [mask], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["real", "last"], ["column"]),
            helper.make_node("Mul", [seen, "column"], ["masked"]),
        ]
    value = "masked" if mask else seen
    if not whole:
        nodes.append(helper.make_node("ReduceSum", [value, "tokens"], ["sum"], keepdims=0))
        value = "sum"
    for at, operator in enumerate([*ends, "Identity"]):
        output = "logits" if at == len(ends) else f"end{at}"
        nodes.append(helper.make_node(operator, [value], [output]))
        value = output
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(table.astype(np.float32 if table.ndim > 1 else np.int64), name)
            for name, table in tables.items()
        ],
    )
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "model.onnx"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    write_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {"tokenizer_class": "BertTokenizer"}))
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"inputs": ("input_ids", "input_mask", "segment_ids")}, r"input_mask, segment_ids; .*rename the others"),
        ({"inputs": (*USUAL, "position_ids")}, "position_ids; .*positions are counted in the graph"),
        ({"inputs": ("ids",)}, "has the inputs ids; expected input_ids"),
        ({"kind": TensorProto.INT32}, r"input_ids as tensor\(int32\).*tensor\(int64\)"),
        ({"shape": ("rows", 16)}, r"takes input_ids in the shape \['rows', 16\]; .*dynamic axes"),
        ({"shape": (1, "tokens")}, r"takes input_ids in the shape \[1, 'tokens'\]; .*dynamic axes"),
        ({"ends": ("Softmax",)}, r"answers probabilities \(softmax in the graph\), expected logits"),
        ({"ends": ("Softmax", "Identity")}, r"softmax in the graph"),
        ({"ends": ("Sigmoid",)}, r"answers probabilities \(sigmoid in the graph\), expected logits"),
        ({"ends": ("Log",)}, "answers NaN or infinity"),
        ({"whole": True}, "answers for each token, .*expected logits of the 3 labels"),
        ({"config": {"id2label": None, "num_labels": 2}}, r"shape \(1, 3\), expected \(1, 2\), .* the 2 labels"),
        ({"config": {"id2label": None}}, r"shape \(1, 3\), expected \(1, 2\), .* the 2 labels"),
        ({"config": {"id2label": {"1": "a", "2": "b", "3": "c"}}}, r"ids \[1, 2, 3\]; expected all from 0"),
        ({"config": {"problem_type": "regression"}}, "problem_type .*labels, not numbers"),
        ({"config": {"architectures": ["BertForTokenClassification"]}}, "found the architecture BertForToken"),
        ({"inputs": ("input_ids",)}, "has no input attention_mask"),
        ({"rows": 40}, r"has no embedding for '##z', token \d+ of tokenizer.json"),
        ({"tokenizer_config": {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}}, "auto_map for AutoTokenizer"),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens"),
        ({"tokenizer_config": {"cls_token": "[BEGIN]"}}, r"added tokens that tokenizer.json has not.*'\[BEGIN\]'"),
    ],
)
def test_what_would_be_answered_wrongly_is_refused_by_name(tmp_path: Path, settings: Any, says: str) -> None:
    folder = a_folder(tmp_path / "member", **settings)
    with pytest.raises(InputError, match=says) as caught:
        open_onnx(str(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_types_that_the_graph_has_no_embedding_for_are_refused_for_pairs(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "member", types=1)
    assert open_onnx(str(folder)).labels == LABELS
    with pytest.raises(InputError, match="has no embedding for the token type 1, which tokenizer.json gives"):
        open_onnx(str(folder), pair=True)


def test_a_logarithm_of_softmax_and_other_names_of_labels_are_taken(tmp_path: Path) -> None:
    names = {"id2label": {"0": 1, "1": True, "2": "yes"}}
    export_bundle([str(a_folder(tmp_path / "member", ends=("LogSoftmax",), config=names))], tmp_path / "bundle")
    export_bundle([str(a_folder(tmp_path / "plain"))], tmp_path / "as-usual")
    log, usual = (CascadeRuntime(tmp_path / name) for name in ("bundle", "as-usual"))
    assert log.bundle.labels == ("1", "true", "yes")
    for text in ("a great film", "sad", ""):
        (one,), (other,) = log.predict([text]), usual.predict([text])
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-6)


def test_labels_without_names_get_those_of_transformers(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "member", config={"id2label": None, "num_labels": 3})
    assert open_onnx(str(folder)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
