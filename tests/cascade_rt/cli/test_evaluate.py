"""`cascade-rt evaluate`: its figures against scikit-learn and plain counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.engine.cost import flops_speedup

from ...toy import LABELS
from .commands import SENTENCES, run


def test_evaluate_measures_members_and_cascade(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    truth = ["good", "bad", "fine", "bad", "good"]
    path = tmp_path / "labelled.tsv"
    path.write_text(
        "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in zip(SENTENCES, truth, strict=True))
    )
    _, (report,), _ = run(capsys, "evaluate", "--model-dir", bundle, "--input", path, "--threshold", 0.7, "--json")
    answers = CascadeRuntime(bundle, thresholds=0.7).predict(SENTENCES)
    right = [row.label == label for row, label in zip(answers, truth, strict=True)]
    cascade = report["cascade"]
    assert cascade["accuracy"] == pytest.approx(sum(right) / 5)
    assert cascade["exits"] == [sum(row.exit == index for row in answers) for index in range(3)]
    assert cascade["layer_speedup"] == pytest.approx(5 * 4 / sum(row.layers for row in answers))
    assert cascade["mean_layers"] == pytest.approx(sum(row.layers for row in answers) / 5)
    ids = [LABELS.index(label) for label in truth]
    left = np.array([row.exit for row in answers])
    members = CascadeRuntime(bundle).bundle.members
    lengths = np.array([len(text.split()) + 2 for text in SENTENCES])
    assert cascade["flops_speedup"] == pytest.approx(flops_speedup(members, left, lengths))
    logits = CascadeRuntime(bundle).member_logits(SENTENCES)[0].astype(float)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = probabilities[left, np.arange(5)]
    for quality, row in [(cascade, chosen), *zip(report["members"], probabilities, strict=True)]:
        hits = row.argmax(-1) == np.array(ids)
        f1 = f1_score(ids, row.argmax(-1), average="macro", labels=range(3), zero_division=0)
        assert quality["accuracy"] == pytest.approx(hits.mean())
        assert quality["f1"] == pytest.approx(f1)
        auc = roc_auc_score(hits, row.max(-1)) if 0 < hits.sum() < 5 else None
        assert quality["dis"] == (None if auc is None else pytest.approx(auc))
        bins = np.ceil(row.max(-1) * 15)
        gaps = [abs(hits[bins == b].mean() - row.max(-1)[bins == b].mean()) * (bins == b).sum() for b in set(bins)]
        assert quality["ece"] == pytest.approx(sum(gaps) / 5)
    alone = CascadeRuntime(bundle, thresholds=0.0).predict(SENTENCES)
    assert report["members"][0]["accuracy"] == pytest.approx(
        sum(row.label == label for row, label in zip(alone, truth, strict=True)) / 5
    )
    assert main(["evaluate", "--model-dir", str(bundle), "--input", str(path)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("tiny", "cascade", "accuracy", "F1", "DIS", "ECE", "layer speed-up", "FLOPs"))


def test_evaluate_takes_class_ids_where_labels_are_names(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    reports = []
    for name, labels in (("names.csv", ["good", "bad"]), ("ids.csv", ["2", "0"])):
        (tmp_path / name).write_text(f"text,y\na film,{labels[0]}\na cat,{labels[1]}\n")
        reports.append(
            run(capsys, "evaluate", "--model-dir", bundle, "--input", tmp_path / name, "--label-column", "y", "--json")[
                1
            ]
        )
    assert reports[0] == reports[1]
