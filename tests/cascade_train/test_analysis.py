"""The pictures' numbers: bins that add up to the ECE, a curve that `evaluate` confirms, Eq. 13 by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cascade_export.temperature import fit_temperature
from cascade_train.analysis import expected_gain, reliability, speedup_curve
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt import CascadeRuntime
from cascade_rt.bundle import MemberEntry
from cascade_rt.cli import main
from cascade_rt.engine.exit_rules import MaximumProbability
from cascade_rt.engine.task import SingleLabel
from cascade_rt.tuning.evaluation import evaluate
from cascade_rt.tuning.metrics import ece

from ..conftest import LABELS, WORDS

TASK = SingleLabel()

_ANSWERS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@given(_ANSWERS)
def test_the_diagrams_bins_add_up_to_the_ece(answers: list[tuple[float, bool]]) -> None:
    confidences, correct = np.array([sure for sure, _ in answers]), np.array([right for _, right in answers])
    bins = reliability(confidences, correct)
    assert sum(row["texts"] for row in bins) == len(answers)
    gaps = sum(row["texts"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
    assert gaps / len(answers) == pytest.approx(ece(correct, confidences), abs=1e-9)


def _members(*layers: int) -> list[MemberEntry]:
    return [MemberEntry(f"{count}L", "", "", count, 32, 1, "fp32", None) for count in layers]


def test_the_curve_is_what_evaluating_at_its_taus_finds() -> None:
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(3, 90, 3)).astype(np.float32) * 2, draw.integers(0, 3, 90)
    members = _members(1, 2, 6)
    curve = speedup_curve(members, TASK.probabilities(logits), labels)
    assert curve[0]["layer_speedup"] < 1 < curve[-1]["layer_speedup"] == 6
    for point in curve:
        found = evaluate(members, MaximumProbability((point["tau"],) * 2), logits, labels, np.full(90, 7)).cascade
        assert point["accuracy"] == pytest.approx(found.accuracy)
        assert point["layer_speedup"] == pytest.approx(found.layer_speedup)


def test_the_expected_gain_is_equation_13() -> None:
    sure = np.array([[0.9, 0.6, 0.6, 0.6], [0.9, 0.9, 0.6, 0.6], [0.9] * 4])
    right = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool)
    probabilities = np.stack([np.where(right, sure, 1 - sure), np.where(right, 1 - sure, sure)], axis=-1)
    (row,) = expected_gain(_members(2, 6, 12), probabilities, np.zeros(4, dtype=int), [0.8, 0.8])
    assert row["exits"] == [1, 1, 2]
    a_i, added, after = 1 / 4, 3 / 4, 1.0
    assert row["expected_gain"] == pytest.approx((1 * (added - a_i) - 6 / 12 * (2 + 1) * (after - a_i)) / 4)
    assert row["with"] == 1.0


@given(st.floats(0.3, 4), st.integers(0, 50))
def test_the_temperature_that_was_put_in_is_found(temperature: float, seed: int) -> None:
    """Labels drawn from TASK.probabilities(logits): of logits times T, the best temperature is about T."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(4000, 3)) * 2
    labels = (logits + draw.gumbel(size=logits.shape)).argmax(axis=1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.15)


def test_the_command_draws_everything(bundle: Path, member_folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(WORDS, 6)), "label": LABELS[draw.integers(3)]} for _ in range(40)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = [argument for folder in member_folders for argument in ("--member", str(folder))]
    arguments = ["analyse", "--model-dir", str(bundle), "--input", "labelled.jsonl", "--output", "pictures", *members]
    assert main(arguments) == 0
    made = sorted(path.name for path in Path("pictures").iterdir())
    pairs = ["reliability", "representations", "speedup"]
    assert made == sorted(["expected-gain.json", *(f"{name}.{kind}" for name in pairs for kind in ("json", "png"))])
    curves = json.loads(Path("pictures/speedup.json").read_text())
    assert list(curves) == ["tiny + small + big", "tiny + big"]
    points = json.loads(Path("pictures/representations.json").read_text())["points"]
    assert {name: len(places) for name, places in points.items()} == {"tiny": 40, "small": 40, "big": 40}


def test_calibrating_at_export_lowers_the_ece_and_changes_no_label(member_folders: list[Path], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(WORDS, 6)), "label": LABELS[draw.integers(3)]} for _ in range(60)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["export", "--member", str(member_folders[1]), "--check-data", "labelled.jsonl", "--max-length", "32"]
    assert main([*common, "--output", "plain"]) == 0
    assert main([*common, "--output", "scaled", "--calibrate"]) == 0
    plain, scaled = CascadeRuntime("plain"), CascadeRuntime("scaled")
    told = scaled.bundle.members[0].other["temperature"]
    texts = [row["text"] for row in rows]
    before, after = plain.member_logits(texts)[0][0], scaled.member_logits(texts)[0][0]
    np.testing.assert_allclose(after, before / told["value"], atol=1e-4)
    assert told["value"] > 1, "these labels are random, and the member is sure"
    assert told["ece"]["after"] < told["ece"]["before"]
    assert main([*common[:-4], "--output", "none", "--calibrate"]) == 2
