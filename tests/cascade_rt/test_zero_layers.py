"""A member without encoder layers: cheap by its FLOPs, legal from the manifest to the reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import BundleError, CascadeRuntime, MaximumProbability, read_bundle
from cascade_rt.benchmark import latency
from cascade_rt.cli import main
from cascade_rt.engine.cost import flops_speedup, layer_speedup
from cascade_rt.engine.exit_rules import replay
from cascade_rt.tuning.operating_points import threshold_for_speedup

from ..toy import WORDS, Member, encoder_weights, write_bundle
from .cli.commands import run

FLOPS = [200, 64]
"""FLOPs of the first member of `with_bag`, as the manifest has them."""
TEXTS = [" ".join(WORDS[at % len(WORDS)] for at in range(start, start + 1 + start % 9)) for start in range(120)]


def described(folder: Path, **changes: Any) -> Path:
    """Change the manifest's entry of the first member."""
    manifest = json.loads((folder / "cascade.json").read_text())
    manifest["members"][0] |= changes
    (folder / "cascade.json").write_text(json.dumps(manifest))
    return folder


def test_texts_that_leave_there_ran_no_layer(with_bag: Path) -> None:
    runtime = CascadeRuntime(with_bag)
    answers = runtime.predict(TEXTS)
    assert {one.exit for one in answers} == {0, 1, 2, 3}
    assert {one.layers for one in answers if one.exit == 0} == {0}
    assert [runtime.predict([text])[0].exit for text in TEXTS] == [one.exit for one in answers]
    alone = runtime.with_thresholds([0.0, 0.0, 0.0])
    alone.predict(TEXTS)
    assert alone.stats().mean_layers == 0


def test_ratios_without_meaning_are_none(with_bag: Path) -> None:
    members, nobody = read_bundle(with_bag).members, np.zeros(4, dtype=int)
    assert layer_speedup(members, nobody) is None
    whole = members[-1].cost(np.full(4, 10)).sum()
    assert flops_speedup(members, nobody, np.full(4, 10)) == pytest.approx(whole / (4 * (200 + 64 * 10)))


def test_reports_show_a_dash(with_bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    runtime = CascadeRuntime(with_bag, thresholds=0.0)
    rows = [{"text": text, "label": one.label} for text, one in zip(TEXTS, runtime.predict(TEXTS), strict=True)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "--model-dir", str(with_bag), "--input", str(source), "--threshold", "0", "--timed"]) == 0
    assert re.search(r"; speed-up on the clock [\d.]+x, layer speed-up -, FLOPs speed-up", capsys.readouterr().out)
    assert main(["info", "--model-dir", str(with_bag)]) == 0
    capsys.readouterr()
    asked = ["--agreement", "--no-cache", "--dry-run", "--max-drop", "1e-9", "--cost", "flops"]
    status = main(["tune", "--model-dir", str(with_bag), "--input", str(source), *asked])
    printed = capsys.readouterr().out
    assert status == 0
    (line,) = (line for line in printed.splitlines() if line.startswith("alone") and line.split()[1] == "bag")
    assert "  -  " in line
    status, (report, *_), _ = run(
        capsys, "tune", "--model-dir", with_bag, "--input", source, "--agreement", "--no-cache", "--json"
    )
    assert report["question"]["cost"] == "latency", "layers say nothing here"
    assert report["alone"][0]["layers_speedup"] is None
    assert report["alone"][0]["flops_speedup"] > 10


def test_the_benchmark_says_what_its_texts_cost(
    with_bag: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_cold_start", lambda *_: {})
    asked = ["--model-dir", str(with_bag), "--texts", "8", "--rounds", "1", "--batch-size", "1", "--threads", "1"]
    assert main(["benchmark", *asked, "--speedup", "2", "100"]) == 0
    printed = capsys.readouterr().out
    assert "100.0x" in printed, "a ratio that only a member without layers reaches"
    for size in ("1", "bulk"):
        assert re.search(rf"a text that leaves at the first member, batch {size}: tokenization \d+\.\d+ ms", printed)


def test_a_guarantee_by_layers_can_name_a_member_without_any(
    with_bag: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    rows = [
        {"text": text, "label": one.label}
        for text, one in zip(TEXTS, CascadeRuntime(with_bag, thresholds=0.0).predict(TEXTS), strict=True)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    asked = ["--cost", "layers", "--max-drop", "0.02", "--confidence", "0.999999", "--no-cache", "--dry-run"]
    status = main(["tune", "--model-dir", str(with_bag), "--input", str(source), *asked])
    printed = capsys.readouterr().out
    assert status == 0
    assert "- could be certified with a file of about" in printed


def test_any_speedup_by_layers_can_be_reached(with_bag: Path) -> None:
    members = read_bundle(with_bag).members
    scores = np.random.default_rng(0).random((4, 200))
    tau = threshold_for_speedup(members, scores, 1000.0)
    exits = np.argmax(np.vstack([scores[:-1] > tau, np.ones(200, dtype=bool)]), axis=0)
    assert (layer_speedup(members, exits) or np.inf) >= 1000
    assert exits.tolist() == replay(MaximumProbability((tau,) * 3), scores).tolist()


def test_the_bundle_is_of_version_3(with_bag: Path) -> None:
    bundle = read_bundle(with_bag)
    assert (bundle.format_version, bundle.members[0].layers, bundle.members[0].flops) == (3, 0, tuple(FLOPS))
    assert bundle.to_json()["members"][0]["flops"] == FLOPS


def test_members_are_ordered_by_layers_or_by_cost(tmp_path: Path, with_bag: Path) -> None:
    narrow = Member("narrow", encoder_weights(layers=4, hidden=16, seed=5))
    wide = Member("wide", encoder_weights(layers=2, hidden=128, seed=6))
    folder = write_bundle(tmp_path / "a", [narrow, wide], thresholds=[0.8], extra={"format_version": 3})
    assert read_bundle(folder).format_version == 3, "ascending by FLOPs alone, which older readers refuse"
    old = write_bundle(tmp_path / "b", [narrow, wide], thresholds=[0.8])
    with pytest.raises(BundleError, match="expected ascending numbers of layers, small to big"):
        read_bundle(old)
    wrong = write_bundle(tmp_path / "c", [wide, narrow], thresholds=[0.8])
    assert read_bundle(wrong).format_version == 1, "as it always was"


def test_layers_below_one_are_refused_in_older_versions(copied: Path) -> None:
    with pytest.raises(BundleError, match="layers: found '0', expected int of at least 1"):
        read_bundle(described(copied, layers=0))
