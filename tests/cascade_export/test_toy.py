"""The toy models of `tests/toy.py` against transformers, which the runtime's tests do without."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import BertForSequenceClassification, BertTokenizerFast

from ..toy import (
    Weights,
    encoder_weights,
    segment_members,
    vocabulary,
    write_cascade,
    write_model,
    write_segments,
    write_tokenizer,
)
from .torch_toy import bert

Batch = dict[str, NDArray[np.int64]]


@pytest.fixture
def batch() -> Batch:
    """Three rows of 12, 9 and 2 tokens, padded; the second half of each row is of token type 1."""
    draw = np.random.default_rng(0)
    mask = (np.arange(12) < np.array([[12], [9], [2]])).astype(np.int64)
    types = (np.arange(12) >= np.array([[6], [4], [1]])).astype(np.int64)
    return {
        "input_ids": draw.integers(5, len(vocabulary()), mask.shape) * mask,
        "attention_mask": mask,
        "token_type_ids": types * mask,
    }


def run(path: Path, feeds: dict[str, Any]) -> list[NDArray[np.float32]]:
    """Run an ONNX file on the inputs that it has."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[np.float32]] = session.run(
        None, {node.name: feeds[node.name] for node in session.get_inputs()}
    )
    return outputs


def reference(weights: Weights, batch: Batch) -> tuple[NDArray[Any], list[NDArray[Any]], BertForSequenceClassification]:
    """Return transformers' logits, its hidden states (embeddings first, then each layer's) and its model.

    It computes in float64, so that rounding errors are those of the toy alone.
    """
    model = bert(weights).double()
    with torch.inference_mode():
        outputs = model(**{name: torch.from_numpy(ids) for name, ids in batch.items()}, output_hidden_states=True)
    return outputs.logits.numpy(), [states.numpy() for states in outputs.hidden_states], model


@pytest.mark.parametrize(("layers", "hidden"), [(1, 16), (4, 32)])
def test_logits_equal_those_of_transformers(layers: int, hidden: int, batch: Batch, tmp_path: Path) -> None:
    weights = encoder_weights(layers=layers, hidden=hidden, seed=layers)
    sizes = write_model(tmp_path / "model.onnx", weights)
    (logits,) = run(tmp_path / "model.onnx", batch)
    np.testing.assert_allclose(logits, reference(weights, batch)[0], atol=1e-5, rtol=0)
    assert sizes == {
        "layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "parameters": sum(weight.size for weight in weights.values()),
    }


def test_logits_do_not_depend_on_padding(batch: Batch, tmp_path: Path) -> None:
    write_model(tmp_path / "model.onnx", encoder_weights(layers=2, seed=5))
    (padded,) = run(tmp_path / "model.onnx", batch)
    for row, length in enumerate(batch["attention_mask"].sum(axis=1)):
        (alone,) = run(tmp_path / "model.onnx", {name: ids[row : row + 1, :length] for name, ids in batch.items()})
        np.testing.assert_allclose(alone[0], padded[row], atol=1e-5, rtol=0)


def test_chained_segments_equal_the_whole_model(batch: Batch, tmp_path: Path) -> None:
    feeds: dict[str, Any] = dict(batch)
    real = batch["attention_mask"] == 1
    first, last = segment_members()
    assert not np.array_equal(first.weights["classifier.weight"], last.weights["classifier.weight"])
    for member, layers in ((first, 2), (replace(last, hidden_out=True), 4)):  # the last one's states, to compare them
        write_model(
            tmp_path / "segment.onnx",
            member.weights,
            layers=member.layers,
            from_hidden=member.from_hidden,
            hidden_out=member.hidden_out,
        )
        logits, feeds["hidden_states"] = run(tmp_path / "segment.onnx", feeds)
        _, states, model = reference(member.weights, batch)
        np.testing.assert_allclose(feeds["hidden_states"][real], states[layers][real], atol=1e-5, rtol=0)
        with torch.inference_mode():
            expected = model.classifier(model.bert.pooler(torch.from_numpy(states[layers])))
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def test_bundles_are_cascades_and_chains(tmp_path: Path) -> None:
    """The manifest's facts agree with the files, read here by ONNX Runtime alone."""
    for folder in (write_cascade(tmp_path / "cascade"), write_segments(tmp_path / "segments")):
        manifest = json.loads((folder / "cascade.json").read_text())
        previous: list[str] = []
        for entry in [*manifest["members"], manifest["tokenizer"]]:
            assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        for entry in manifest["members"]:
            session = onnxruntime.InferenceSession(folder / entry["file"], providers=["CPUExecutionProvider"])
            reads_hidden = entry.get("reads") == "hidden_states"
            assert {node.name for node in session.get_inputs()} == {
                "attention_mask",
                *(["hidden_states"] if reads_hidden else ["input_ids", "token_type_ids"]),
            }
            assert "last_hidden_state" in previous or not reads_hidden
            previous = [node.name for node in session.get_outputs()]
        assert previous == ["logits"]


def test_the_tokenizer_is_that_of_bert(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json", words=("marvel",))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary(("marvel",))))
    bert = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    texts = ["A great, marvel of zest!", "", "the cat's ÉTÉ 7 文 sat"]
    ours = tokenizer.encode_batch(list(zip(texts, texts[::-1], strict=True)))
    theirs = bert(texts, texts[::-1], padding=True)
    assert [encoding.ids for encoding in ours] == theirs["input_ids"]
    assert [encoding.attention_mask for encoding in ours] == theirs["attention_mask"]
    assert [encoding.type_ids for encoding in ours] == theirs["token_type_ids"]
