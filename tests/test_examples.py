"""The examples run as their README says, and answer as the runtime itself does."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeRuntime, read_bundle

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXTS = [f"{'very ' * (index % 5)}{word} film, {'no ' * (index % 3)}NA" for index, word in enumerate("abcdefghij")]


def run(script: str, *arguments: str | Path) -> None:
    """Run an example as a user would."""
    finished = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.fixture
def fastapi_client(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Return a function that makes a client of the FastAPI example with a bundle; a context manager."""
    pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")

    def client(bundle: Path) -> Any:
        monkeypatch.setenv("CASCADE_BUNDLE", str(bundle))
        monkeypatch.syspath_prepend(EXAMPLES)
        return testclient.TestClient(import_module("fastapi_app").app)

    return client


def test_fastapi_app(bundle: Path, fastapi_client: Callable[[Path], Any]) -> None:
    expected = CascadeRuntime(bundle).predict(TEXTS)
    with fastapi_client(bundle) as client:
        answer = client.post("/classify", json={"texts": TEXTS})
        refused = client.post("/classify", json={"texts": "not a list"})
    assert answer.status_code == 200
    for found, prediction in zip(answer.json(), expected, strict=True):
        assert {**found, "score": 0, "probabilities": 0} == {
            **prediction._asdict(),
            "score": 0,
            "probabilities": 0,
            "labels": [prediction.label],
        }
        assert found["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)
        assert found["score"] == max(found["probabilities"])
    assert refused.status_code == 422


def test_fastapi_app_names_an_invalid_text(pair_bundle: Path, fastapi_client: Callable[[Path], Any]) -> None:
    with fastapi_client(pair_bundle) as client:
        answer = client.post("/classify", json={"texts": ["a text without its pair"]})
    assert answer.status_code == 422
    assert "text 0" in answer.json()["detail"]


def test_pandas_column(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    rows = [{"id": f"00{index}", "text": text} for index, text in enumerate([*TEXTS, "NA"])]
    with Path("texts.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    run("pandas_column.py", bundle, tmp_path / "texts.csv", tmp_path / "out.csv")

    expected = CascadeRuntime(bundle).predict([row["text"] for row in rows])
    with Path("out.csv").open(encoding="utf-8", newline="") as stream:
        assert list(csv.DictReader(stream)) == [
            {**row, "prediction": p.label, "exit": str(p.exit)} for row, p in zip(rows, expected, strict=True)
        ]


def test_batch_job_keeps_the_order(bundle: Path, tmp_path: Path) -> None:
    texts = [*TEXTS, "", "très bon, 好"]
    Path("texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    run("batch_job.py", bundle, tmp_path / "texts.txt", tmp_path / "out.jsonl", "--processes", "2", "--chunk-size", "1")

    expected = CascadeRuntime(bundle).predict(texts)
    found = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [(line["label"], line["exit"]) for line in found] == [(p.label, p.exit) for p in expected]
    assert [line["score"] for line in found] == pytest.approx([p.score for p in expected], abs=1e-5)
    assert len({p.score for p in expected}) > 1  # or the order would not matter


def test_single_file(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from cascade_export.single_file import pack

    pack(bundle, tmp_path / "cascade.onnx")
    files = [EXAMPLES / "single_file.py", tmp_path / "cascade.onnx", bundle / "tokenizer.json"]
    finished = subprocess.run([sys.executable, *map(str, files), *TEXTS], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in finished.stdout.splitlines()]
    runtime = CascadeRuntime(bundle)
    names = [member.name for member in runtime.bundle.members]
    expected = [
        [text, found.label, names[found.exit]] for text, found in zip(TEXTS, runtime.predict(TEXTS), strict=True)
    ]
    assert [[text, label, name] for text, label, _, name in rows] == expected


def test_the_ready_bundle_is_small_and_answers() -> None:
    from cascade_train.smart_home import load

    bundle = EXAMPLES / "smart-home"
    assert sum(file.stat().st_size for file in bundle.iterdir()) <= 5_000_000
    read_bundle(bundle)
    runtime = CascadeRuntime(bundle)
    assert runtime("it's getting dark in here")["label"] == "lights_on"
    texts, labels = zip(*load("heldout"), strict=True)
    found = runtime.predict(texts)
    right = sum(answer.label == label for answer, label in zip(found, labels, strict=True)) / len(texts)
    assert right > 0.78
    assert {answer.exit for answer in found} == {0, 1}
