"""Several labels per text, through every door, against sigmoids by SciPy and figures by scikit-learn."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn import metrics

from cascade_rt import BundleError, CascadeRuntime, Prediction, read_bundle
from cascade_rt.bundle.card import model_card
from cascade_rt.cli import main
from cascade_rt.engine.execution import Execution
from cascade_rt.io.fields import labels
from cascade_rt.serving.client import Client
from cascade_rt.serving.service import Service
from cascade_rt.serving.settings import Settings

from ..toy import LABELS, WORDS, cascade_members, write_bundle
from .cli.commands import run
from .serving.conftest import listening

CUTS = (0.5, 0.3, 0.7)
THRESHOLDS = (0.6, 0.7)
TEXTS = [" ".join(WORDS[at % len(WORDS)] for at in range(start, start + 1 + start % 9)) for start in range(150)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"format_version": 3, "task": "multi_label", "cuts": list(CUTS)}
    folder = tmp_path_factory.mktemp("several") / "bundle"
    return write_bundle(folder, cascade_members(), thresholds=THRESHOLDS, extra=extra)


@pytest.fixture(scope="module")
def probabilities(several: Path) -> NDArray[np.float64]:
    """Return those of each member, (members, texts, labels)."""
    return np.array(expit(CascadeRuntime(several).member_logits(TEXTS)[0].astype(np.float64)))


@pytest.fixture(scope="module")
def answers(probabilities: NDArray[np.float64]) -> list[Prediction]:
    """The right answers, by a plain loop over texts and members."""
    found = []
    for rows in probabilities.transpose(1, 0, 2).tolist():
        for exit, row in enumerate(rows):
            above = [p > cut for p, cut in zip(row, CUTS, strict=True)]
            sure = min(expit(abs(logit(p) - logit(cut))) for p, cut in zip(row, CUTS, strict=True))
            if exit == 2 or sure > THRESHOLDS[exit]:
                break
        best = row.index(max(row))
        chosen = tuple(compress(LABELS, above))
        found.append(Prediction(LABELS[best], row[best], tuple(row), exit, (1, 3, 7)[exit], False, chosen))
    return found


def written(texts: list[str], answers: list[Prediction], target: Path) -> Path:
    """Write a file of texts with these labels, and return it."""
    rows = [{"text": text, "labels": one.labels} for text, one in zip(texts, answers, strict=True)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_answers_are_those_of_a_loop(several: Path, answers: list[Prediction]) -> None:
    runtime = CascadeRuntime(several)
    assert {len(one.labels) for one in answers} >= {0, 1, 2}
    assert {one.exit for one in answers} == {0, 1, 2}
    for found in (runtime.predict(TEXTS), [runtime.predict([text])[0] for text in TEXTS]):
        for one, wanted in zip(found, answers, strict=True):
            assert one._replace(score=0.0, probabilities=()) == wanted._replace(score=0.0, probabilities=())
            assert one.probabilities == pytest.approx(wanted.probabilities, abs=1e-5)


def test_a_call_answers_as_pipelines_do(several: Path, answers: list[Prediction]) -> None:
    runtime = CascadeRuntime(several)
    for found, wanted in zip(runtime(TEXTS, top_k=None), answers, strict=True):
        assert {row["label"]: row["score"] for row in found} == pytest.approx(
            dict(zip(LABELS, wanted.probabilities, strict=True)), abs=1e-5
        )
        assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert runtime(TEXTS[0])["label"] == answers[0].label


def test_lines_have_all_labels(
    several: Path, bundle: Path, answers: list[Prediction], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows, _ = run(capsys, "predict", "--model-dir", several, *TEXTS)
    assert status == 0
    assert [tuple(row["labels"]) for row in rows] == [one.labels for one in answers]
    assert "labels" not in run(capsys, "predict", "--model-dir", bundle, "a")[1][0]
    source = written(TEXTS, answers, tmp_path / "in.jsonl")
    assert run(capsys, "predict", "--model-dir", several, "--input", source, "--output", tmp_path / "out.csv")[0] == 0
    with (tmp_path / "out.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [tuple(json.loads(row["labels"])) for row in table] == [one.labels for one in answers]
    assert table[0]["input_labels"] == json.dumps(list(answers[0].labels))


def test_evaluation_is_scikit_learns(
    several: Path, probabilities: NDArray[np.float64], answers: list[Prediction], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = written(TEXTS, answers[1:] + answers[:1], tmp_path / "in.jsonl")  # each text with another's labels
    truth = np.array([[name in one.labels for name in LABELS] for one in answers[1:] + answers[:1]])
    status, (report,), _ = run(capsys, "evaluate", "--model-dir", several, "--input", source, "--json")
    assert status == 0
    cascade = np.array([[name in one.labels for name in LABELS] for one in answers])
    for row, predicted in zip([*report["members"], report["cascade"]], [*(probabilities > CUTS), cascade], strict=True):
        assert row["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
        assert row["f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro", zero_division=0))
        assert row["f1_micro"] == pytest.approx(metrics.f1_score(truth, predicted, average="micro"))
    status, (report,), _ = run(capsys, "evaluate", "--model-dir", several, "--input", source, "--json", "--by-label")
    figures = metrics.precision_recall_fscore_support(truth, cascade, zero_division=0)
    for row, name, precision, recall, f1, texts in zip(report["by_label"], LABELS, *figures, strict=True):
        assert (row["label"], row["texts"]) == (name, texts)
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1))
    last = metrics.f1_score(truth, probabilities[-1] > CUTS, average=None, zero_division=0)
    assert [row["members"][-1] for row in report["by_label"]] == pytest.approx(last.tolist())
    assert report["cascade"]["exits"] == np.bincount([one.exit for one in answers]).tolist()
    assert main(["evaluate", "--model-dir", str(several), "--input", str(source), "--by-label"]) == 0
    assert "micro F1" in capsys.readouterr().out


@pytest.mark.parametrize("cell", ['["a", "b"]', "a, b", "b,a"])
def test_labels_of_a_table_are_a_list_or_between_commas(cell: str) -> None:
    assert sorted(labels(cell)) == ["a", "b"]
    assert labels("") == labels(None) == labels([]) == []


def test_an_unknown_label_is_refused_with_its_line(
    several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "labels": ["positve"]}\n')
    status, _, error = run(capsys, "evaluate", "--model-dir", several, "--input", source)
    assert status == 2
    assert "in.jsonl:1: found the label 'positve', expected one that the bundle knows" in error


def test_a_guarantee_holds_for_sets_of_labels(
    several: Path, tmp_path: Path, probabilities: NDArray[np.float64], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = TEXTS * 4
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = ["--agreement", "--max-drop", "0.3", "--confidence", "0.9", "--dry-run", "--no-cache", "--json"]
    status, (report, *_), _ = run(capsys, "tune", "--model-dir", several, "--input", source, *asked)
    assert status == 0
    right = (probabilities > CUTS) == (probabilities[-1] > CUTS)
    for alone, same in zip(report["alone"], right.all(axis=-1), strict=True):
        assert alone["accuracy"] == pytest.approx(same.mean())
        assert alone["risk"] == pytest.approx(1 - same.mean())
    assert report["guarantee"]["certified"] > 0
    assert report["chosen"]["risk"] <= 0.3


@pytest.fixture(scope="module")
def client(several: Path) -> Iterator[httpx.Client]:
    with (
        listening(Service({"toy": str(several)}, Settings(execution=Execution(threads=1)))) as address,
        httpx.Client(base_url=f"http://{address}") as found,
    ):
        yield found


def test_our_own_interface_and_client(client: httpx.Client, answers: list[Prediction]) -> None:
    rows = client.post("/v1/classify", json={"texts": TEXTS}).json()["predictions"]
    assert [(tuple(row["labels"]), row["exit"]) for row in rows] == [(one.labels, one.exit) for one in answers]
    with Client(str(client.base_url)) as ours:
        assert [tuple(row.labels or ()) for row in ours.classify(TEXTS)] == [one.labels for one in answers]
    assert client.get("/v1/models").json()["models"][0]["task"] == "multi_label"


def test_other_interfaces_answer_sigmoids(client: httpx.Client, answers: list[Prediction]) -> None:
    expected = [dict(zip(LABELS, one.probabilities, strict=True)) for one in answers[:8]]
    tei = client.post("/predict", json={"inputs": [[text] for text in TEXTS[:8]]}).json()
    hugging = client.post("/models/toy", json={"inputs": TEXTS[:8], "parameters": {"function_to_apply": "sigmoid"}})
    for rows in (tei, hugging.json()):
        assert [{one["label"]: one["score"] for one in row} for row in rows] == [
            pytest.approx(wanted, abs=1e-5) for wanted in expected
        ]
    refused = client.post("/models/toy", json={"inputs": "a", "parameters": {"function_to_apply": "softmax"}})
    assert (refused.status_code, refused.json()["field"]) == (422, "parameters.function_to_apply")
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [8], "data": TEXTS[:8]}]}
    outputs: dict[str, Any] = {
        one["name"]: one for one in client.post("/v2/models/toy/infer", json=body).json()["outputs"]
    }
    assert (outputs["labels"]["datatype"], outputs["labels"]["shape"]) == ("BOOL", [8, 3])
    assert outputs["labels"]["data"] == [name in one.labels for one in answers[:8] for name in LABELS]


def test_the_bundle_is_of_a_version_that_older_readers_refuse(several: Path, copied: Path) -> None:
    bundle = read_bundle(several)
    assert (bundle.format_version, bundle.task, bundle.cuts) == (3, "multi_label", CUTS)
    assert bundle.to_json()["task"] == "multi_label"
    assert read_bundle(copied).format_version == 1
    assert "task" not in read_bundle(copied).to_json()
    assert "of which a text has any number" in model_card(bundle, "a/b")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"task": "ranking"},
            "task: found 'ranking', this cascade-rt knows single_label, multi_label",
        ),
        ({"task": "multi_label", "cuts": [0.5]}, r"cuts: found \[0\.5\], expected 3 numbers from 0 to below 1"),
        ({"task": "multi_label", "cuts": [0.5, 2, 0]}, "cuts: found"),
    ],
)
def test_a_wrong_task_is_refused_by_name(copied: Path, keys: dict[str, Any], says: str) -> None:
    manifest = json.loads((copied / "cascade.json").read_text())
    (copied / "cascade.json").write_text(json.dumps(manifest | keys | {"format_version": 3}))
    with pytest.raises(BundleError, match=says):
        CascadeRuntime(copied)


def test_info_shows_the_task(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model-dir", str(several)]) == 0
    assert "task        multi_label, cuts 0.3 to 0.7" in capsys.readouterr().out
