"""The runtime on exported bundles against torch, which the runtime's own tests do without."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from cascade_export.export import export_bundle
from cascade_export.rounding import LARGEST_EXACT
from cascade_export.single_file import pack
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.engine.providers import _PRODUCT
from cascade_rt.engine.task import SingleLabel

from ..toy import WORDS

TASK = SingleLabel()

TEXTS = ["a great film", "so sad", "the cat sat on the mat and that was not very witty", "", "dull " * 40]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 40))) for _ in range(300)]


def test_predictions_agree_with_torch(exported: Path, member_folders: list[Path], corpus: list[str]) -> None:
    """An independent reference: transformers, one text at a time, Algorithm 1 as a plain loop."""
    models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in member_folders]
    tokenizer = AutoTokenizer.from_pretrained(member_folders[0])
    for text, answer in zip(corpus[:60], CascadeRuntime(exported, thresholds=0.7).predict(corpus[:60]), strict=True):
        batch = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        for exit, model in enumerate(models):
            with torch.inference_mode():
                probabilities = torch.softmax(model(**batch).logits[0].double(), -1)
            if probabilities.max() > 0.7 or exit == 2:
                break
        assert answer.exit == exit
        np.testing.assert_allclose(answer.probabilities, probabilities, atol=1e-5)
        assert answer.label == model.config.id2label[int(probabilities.argmax())]
        assert answer.score == max(answer.probabilities)


def test_tau_one_equals_the_last_member_exported_alone(
    exported: Path, member_folders: list[Path], corpus: list[str], tmp_path: Path
) -> None:
    export_bundle([str(member_folders[-1])], tmp_path / "alone", max_length=32)
    alone = CascadeRuntime(tmp_path / "alone").predict(corpus)
    cascade = CascadeRuntime(exported, thresholds=1.0).predict(corpus)
    assert [row.label for row in cascade] == [row.label for row in alone]
    np.testing.assert_allclose([row.probabilities for row in cascade], [row.probabilities for row in alone], atol=1e-6)
    assert {row.layers for row in alone} == {4}


def test_int8_is_exact_where_the_cpu_would_saturate(
    member_folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle([str(member_folders[1])], tmp_path / "int8", precision="int8-vnni", max_length=32)
    usual = CascadeRuntime(tmp_path / "int8").member_logits(TEXTS)[0]
    monkeypatch.setattr("cascade_rt.engine.providers.int8_saturates", lambda: True)
    runtime = CascadeRuntime(tmp_path / "int8", preload=True)
    options = runtime.plan.stages[0].load().session.get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    np.testing.assert_allclose(CascadeRuntime(tmp_path / "int8").member_logits(TEXTS)[0], usual, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_of_int8_do_not_saturate(sign: int) -> None:
    session = onnxruntime.InferenceSession(_PRODUCT)
    rows, columns = np.full((5, 384), 255, dtype=np.uint8), np.full((384, 40), sign * LARGEST_EXACT, dtype=np.int8)
    np.testing.assert_array_equal(session.run(None, {"a": rows, "b": columns})[0], sign * 384 * 255 * LARGEST_EXACT)


@pytest.mark.parametrize("file", ["member", "single"])
def test_int8_never_saturates(member_folders: list[Path], tmp_path: Path, file: str) -> None:
    """On every CPU, ONNX Runtime's default kernels give the bits of its exact ones."""
    bundle = export_bundle([str(member_folders[2])], tmp_path / "int8", precision="int8", max_length=32)
    (entry,) = bundle.members
    assert entry.weight_bits == 7
    path = tmp_path / "int8" / entry.file
    if file == "single":
        path = tmp_path / "one.onnx"
        pack(tmp_path / "int8", path)
    batch = CascadeRuntime(tmp_path / "int8").plan.tokenizer.encode(TEXTS).batch(np.arange(len(TEXTS)))
    found = []
    for exact in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", exact)
        session = onnxruntime.InferenceSession(str(path), options)
        feed = {**batch, "thresholds": np.zeros(0)}
        found.append(session.run(None, {node.name: feed[node.name] for node in session.get_inputs()})[0])
    np.testing.assert_array_equal(found[0], found[1])


@given(arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32)))
def test_softmax_is_torchs(values: np.ndarray) -> None:
    expected = torch.softmax(torch.tensor(values, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(TASK.probabilities(values), expected, atol=1e-12)
    np.testing.assert_allclose([TASK.probabilities_of_one(row)[0] for row in values], expected, atol=1e-12)


def test_an_exported_manifest_has_the_keys_of_the_contract(exported: Path) -> None:
    manifest = json.loads((exported / "cascade.json").read_text("utf-8"))
    assert manifest["format_version"] == 1
    assert {"labels", "pair", "max_length", "tokenizer", "members", "provenance"} <= manifest.keys()
    assert manifest["tokenizer"].keys() == {"file", "sha256"}
    keys = {"name", "file", "sha256", "layers", "hidden_size", "parameters", "precision", "threshold"}
    assert all(keys <= member.keys() for member in manifest["members"])
    assert [member["layers"] for member in manifest["members"]] == [1, 2, 4]
    assert [member["threshold"] for member in manifest["members"]] == [0.8, 0.8, None]
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        [
            "cascade.json",
            "tokenizer.json",
            *(member["file"] for member in manifest["members"]),
            *{data["file"] for member in manifest["members"] for data in member["data"]},
        ]
    )
    assert list(manifest)[-1] == "sha256"
    assert read_bundle(exported).to_json() == manifest
