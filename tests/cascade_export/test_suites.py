"""Suites of complete models with one tokenizer: trained, exported, tuned by nobody, and packed in one file."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cascade_export.export import export_bundle
from cascade_export.pack import packed
from cascade_train import settings
from cascade_train.finetune import Recipe, finetune
from cascade_train.tasks import Examples, TaskData

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.bundle import BATCH_TOLERANCE
from cascade_rt.errors import InputError

from ..conftest import WORDS
from .families import FAMILIES

SUITES = [
    "modernbert",
    "mmbert (modernbert)",
    "multilingual e5 (bert)",
    "xlm-roberta",
    "deberta-v3 (deberta-v2)",
    *(family for family in FAMILIES if family in ("eurobert", "gte")),
]
TEXTS = [" ".join(WORDS[start : start + 1 + start % 11]) for start in range(0, 40)]
DATA = TaskData(
    "toy",
    ("bad", "good"),
    False,
    "accuracy",
    Examples(TEXTS[:24], [index % 2 for index in range(24)]),
    Examples(TEXTS[24:], [index % 2 for index in range(16)]),
)
RECIPE = Recipe(epochs=1, learning_rate=1e-4, batch_size=12, max_length=24, evaluations_per_epoch=1)


@pytest.mark.parametrize("family", SUITES)
def test_a_suite_becomes_a_cascade_in_one_file(family: str, tmp_path: Path) -> None:
    members = []
    for name, shape in (
        ("small", {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}),
        ("big", {}),
    ):
        base = FAMILIES[family](tmp_path / f"{name}-base", **shape)
        finetune(str(base), DATA, tmp_path / name, recipe=RECIPE)
        members.append(str(tmp_path / name))
    bundle = export_bundle(members, tmp_path / "bundle", threshold=0.6, precision={"big": "int8"})
    assert bundle.format_version == 1, "older runtimes read it"
    assert [member.layers for member in bundle.members] == [1, 2]
    gated = family.startswith(("modernbert", "mmbert", "eurobert", "gte"))
    for member in read_bundle(tmp_path / "bundle").members:
        assert bool(member.flops) == (gated or family.startswith("deberta"))
        assert member.other["batch_difference"] <= BATCH_TOLERANCE
    runtime = CascadeRuntime(tmp_path / "bundle")
    inputs = runtime.plan.tokenizer.encode(TEXTS).batch(np.arange(len(TEXTS)))
    line = packed(tmp_path / "bundle", tmp_path / "cascade.onnx", overwrite=False)
    kind = "Unigram" if family.startswith(("multilingual", "xlm", "deberta")) else "BPE"
    assert f"its tokenizer is {kind}: the npm package refuses it" in line
    session = onnxruntime.InferenceSession(str(tmp_path / "cascade.onnx"))
    for tau in (0.0, 0.55, 1.0):
        found, exits, _ = session.run(None, inputs | {"thresholds": np.array([tau])})
        expected = runtime.with_thresholds(tau).predict(TEXTS)
        assert exits.tolist() == [answer.exit for answer in expected]
        np.testing.assert_allclose(found, [answer.probabilities for answer in expected], atol=1e-4)


def with_code(folder: Path, kind: str) -> Path:
    """Let a folder say that a repository has code for its model, as EuroBERT's and Alibaba's GTE do."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    code = {"AutoConfig": "configuration.Config", "AutoModelForSequenceClassification": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": code}), "utf-8")
    return folder


@pytest.mark.parametrize("kind", ["eurobert", "new"])
def test_code_of_a_repository_is_refused_by_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name.endswith("eurobert") else find_spec(name))
    folder = with_code(FAMILIES["bert"](tmp_path / "member"), kind)
    remedy = "install transformers 5" if kind == "eurobert" else "use another one"
    with pytest.raises(InputError, match=f"auto_map for .*never runs.*; {remedy}"):
        export_bundle([str(folder)], tmp_path / "bundle")


@pytest.mark.skipif("eurobert" not in FAMILIES, reason="transformers 4 has no EuroBERT")
def test_code_that_transformers_took_over_is_not_asked_for(tmp_path: Path) -> None:
    folder = with_code(FAMILIES["eurobert"](tmp_path / "member"), "eurobert")
    assert export_bundle([str(folder)], tmp_path / "bundle").members[0].other["fused"]["MultiHeadAttention"] == 2
