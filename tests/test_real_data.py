"""Real pretrained weights and public data, end to end through the command line (marker: real_data)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cascade_train.tasks import load_evaluation, load_task

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.cli import main
from cascade_rt.engine.task import SingleLabel
from cascade_rt.engine.tokenization import TextTokenizer

TASK = SingleLabel()

pytestmark = pytest.mark.real_data

Find = Callable[[str], Path]


@pytest.fixture(scope="module")
def rte_bundle(real_data: Find, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members on RTE's pairs, the first 1 and 2 layers of MiniLM, trained for one short epoch."""
    root = tmp_path_factory.mktemp("rte")
    for layers in (1, 2):
        arguments = f"--task rte --data {real_data('rte')} --base {minilm} --layers {layers} --output {root}/{layers}L"
        arguments += " --epochs 1 --learning-rate 1e-4 --max-length 64"
        assert main(["train", *arguments.split()]) == 0
    members = f"--member {root}/1L --member {root}/2L --threshold 0.6 --output {root}/bundle"
    assert main(["export", *members.split()]) == 0
    return root / "bundle"


def test_rte_goes_the_whole_way(
    rte_bundle: Path, real_data: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = read_bundle(rte_bundle)
    assert (bundle.pair, bundle.max_length, bundle.labels) == (True, 64, ("entailment", "not_entailment"))
    assert all(member.other["max_probability_difference"] <= 1e-4 for member in bundle.members)
    dev = real_data("rte") / "dev.tsv"
    logits, _ = CascadeRuntime(rte_bundle).member_logits(load_evaluation("rte", dev.parent)["dev"].texts)
    median = float(
        np.median(TASK.confidence(TASK.probabilities(logits[0])))
    )  # so that about half leave at the first member
    running = ["--model-dir", str(rte_bundle), "--input", str(dev), "--threshold", str(median)]
    assert main(["predict", *running, "--output", "out.jsonl"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["index"] for line in lines] == [str(index) for index in range(277)]
    assert sum(line["exit"] for line in lines) == pytest.approx(277 / 2, abs=1)
    assert lines[0]["sentence2"] == "Christopher Reeve had an accident."
    capsys.readouterr()
    assert main(["evaluate", *running, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    right = sum(line["label"] == line["input_label"] for line in lines)
    assert report["cascade"]["accuracy"] == pytest.approx(right / 277)
    assert report["cascade"]["exits"] == [sum(line["exit"] == exit for line in lines) for exit in (0, 1)]


def test_rte_predictions_do_not_depend_on_company(rte_bundle: Path, real_data: Find) -> None:
    runtime = CascadeRuntime(rte_bundle)
    pairs = load_evaluation("rte", real_data("rte"))["dev"].texts[:80]
    alone = [runtime.predict([pair])[0] for pair in pairs]
    for one, other in zip(alone, runtime.predict(pairs), strict=True):
        assert (one.label, one.exit) == (other.label, other.exit)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_two_layers_learn_sst2_from_a_plain_csv(
    real_data: Find, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = load_task("sst-2", real_data("sst2")).train
    with Path("train.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *zip(train.texts[:6000], train.labels[:6000], strict=True)])
    arguments = f"--train-file train.csv --base {minilm} --layers 2 --output 2L --epochs 1 --max-length 64"
    assert main(["train", *arguments.split(), "--learning-rate", "3e-4"]) == 0
    assert main(["export", "--member", "2L", "--output", "bundle"]) == 0
    capsys.readouterr()
    dev = real_data("sst2") / "dev.tsv"
    assert main(["evaluate", "--model-dir", "bundle", "--input", str(dev), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["members"][0]["accuracy"] > 0.7


@pytest.mark.parametrize("name", ["banking77", "clinc150", "goemotions", "mrpc", "qnli", "rte", "sick", "sst2"])
def test_tokens_of_words_are_those_of_texts(name: str, real_data: Find, minilm: Path) -> None:
    files = [file for file in real_data(name).rglob("*") if file.is_file()]
    fields = {field for file in files for line in file.read_text("utf-8").splitlines() for field in line.split("\t")}
    texts = sorted(field for field in fields if any(map(str.isalpha, field)))[:10_000]
    quick, slow = (TextTokenizer(minilm / "tokenizer.json", 64, False, word_cache=on) for on in (True, False))
    found, wanted = quick.encode(texts), slow.encode(texts)
    rows = np.arange(len(texts))
    for array, expected in zip(found.batch(rows).values(), wanted.batch(rows).values(), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert [found.truncated(row) for row in range(len(texts))] == [wanted.truncated(row) for row in range(len(texts))]
    assert found.from_words > 0.98 * len(texts)


@pytest.mark.parametrize(
    ("task", "folder", "rows", "labels"),
    [("rte", "rte", 2490, 2), ("mrpc", "mrpc", 4076, 2)],
)
def test_official_training_files_are_read_whole(
    real_data: Find, task: str, folder: str, rows: int, labels: int
) -> None:
    data = load_task(task, real_data(folder))
    assert len(data.train) + len(data.validation) == rows
    assert len(data.labels) == labels


def test_sst2_holds_out_whole_sentences_with_their_phrases(real_data: Find) -> None:
    data = load_task("sst-2", real_data("sst2"))
    dev = load_evaluation("sst-2", real_data("sst2"))["dev"]
    assert len(dev) == 872
    kept = {f" {text} ".replace("  ", " ") for text in data.train.texts}
    held = [f" {text} ".replace("  ", " ") for text in data.validation.texts]
    assert not kept & set(held)

    def mean_words(texts: object) -> float:
        lengths = [len(str(text).split()) for text in texts]  # type: ignore[attr-defined]
        return sum(lengths) / len(lengths)

    assert mean_words(held) == pytest.approx(mean_words(dev.texts), rel=0.1), "validation looks like dev"
    assert mean_words(kept) < 0.6 * mean_words(held), "which a random split of the phrases would not"
