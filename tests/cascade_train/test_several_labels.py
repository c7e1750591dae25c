"""Several labels per text, from a file to a bundle's answers: against torch, SciPy, scikit-learn and plain loops."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.averaging import AveragingForSequenceClassification, Network
from cascade_train.averaging_training import AveragingRecipe, train_averaging
from cascade_train.difficulty import Splits, label_difficulty, read_difficulty
from cascade_train.exits import train_exits
from cascade_train.finetune import (
    Objective,
    Recipe,
    finetune,
    load_base,
    logits_of,
    start_at_rates,
    teacher_logits,
)
from cascade_train.losses import confidence, difficulty_aware_regularization, distillation_of_sets
from cascade_train.tasks import Examples, TaskData, hold_out, load_file, strata_of
from cascade_train.unlabelled import with_answers, with_unlabelled
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.errors import CascadeError, InputError, InvalidOption
from cascade_rt.io.readers import Reading
from cascade_rt.tuning.cuts import best_cuts

from ..conftest import WORDS, make_member

LABELS = ("cat", "dog", "film")
RECIPE = Recipe(epochs=20, learning_rate=3e-3, batch_size=8, max_length=16)


def texts_and_labels(count: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """Texts that have each label whose name is among their words: 0 to 3 of them."""
    draw = np.random.default_rng(seed)
    others = [word for word in WORDS if word not in LABELS][:12]
    rows = []
    for _ in range(count):
        has = [name for name in LABELS if draw.random() < 0.4]
        rows.append((" ".join(draw.permutation([*has, *draw.choice(others, 4)])), has))
    return rows


ROWS = texts_and_labels(160)


def written_as(kind: str, folder: Path, rows: list[tuple[str, list[str]]], name: str = "data") -> tuple[Path, Reading]:
    """Write the rows in one of the ways of writing several labels; return the file, and how to read it."""
    if kind == "lists":
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text, "labels": has}) + "\n" for text, has in rows))
        return file, Reading()
    file = folder / f"{name}.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        if kind == "columns":
            writer.writerows([("text", *LABELS), *((text, *(int(one in has) for one in LABELS)) for text, has in rows)])
            return file, Reading(label_columns=LABELS)
        writer.writerows([("text", "tags"), *((text, ";".join(has)) for text, has in rows)])
        return file, Reading(label_column="tags", label_separator=";")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return load_file(written_as("lists", tmp_path_factory.mktemp("data"), ROWS)[0], holdout=0.25)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_member(tmp_path_factory.mktemp("base") / "2L", layers=2, spread=0.1))


@pytest.fixture(scope="module")
def members(base: str, data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A network without layers, one layer and two; the first two learn from the last."""
    folder = tmp_path_factory.mktemp("members")
    big, small, network = folder / "big", folder / "small", folder / "network"
    finetune(base, data, big, recipe=RECIPE)
    objective = Objective(teacher=teacher_logits(str(big), data, RECIPE))
    finetune(base, data, small, layers=1, recipe=RECIPE, objective=objective)
    train_averaging(
        data,
        network,
        tokenizer=base,
        network=Network(ngrams=2, buckets=64, dimension=16, hidden=16),
        recipe=AveragingRecipe(epochs=20, learning_rate=1e-2, batch_size=16, max_length=16),
        objective=objective,
    )
    return [network, small, big]


@pytest.fixture(scope="module")
def bundle(members: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "bundle"
    export_bundle([str(member) for member in members], output)
    return output


def recorded_cuts(member: Path) -> list[float]:
    cuts: list[float] = json.loads((member / RECORD).read_text("utf-8"))["cuts"]
    return cuts


@pytest.mark.parametrize("kind", ["separator", "columns"])
def test_labels_can_be_written_in_three_ways(kind: str, data: TaskData, tmp_path: Path) -> None:
    file, reading = written_as(kind, tmp_path, ROWS)
    found = load_file(file, reading=reading, holdout=0.25)
    assert (found.labels, found.metric, found.several) == (data.labels, "f1", True) == (LABELS, "f1", True)
    assert found.train == data.train
    assert found.validation == data.validation
    rows = {**dict(zip(data.train.texts, data.train.labels, strict=True))}
    rows |= dict(zip(data.validation.texts, data.validation.labels, strict=True))
    assert rows == {text: tuple(LABELS.index(name) for name in has) for text, has in ROWS}


@pytest.mark.parametrize(
    ("reading", "row", "says"),
    [
        ({"label_columns": ("a", "b")}, "x,2,0", "data.csv:3: column 'a' holds '2', expected 1 where the text has"),
        ({"label_columns": ("a", "c")}, "x,1,0", "has no column 'c'|no column 'c'"),
    ],
)
def test_columns_of_labels_are_checked(reading: dict[str, Any], row: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(f"text,a,b\ny,1,1\n{row}\n")
    with pytest.raises(InputError, match=says):
        load_file(tmp_path / "data.csv", reading=Reading(**reading))


@pytest.mark.parametrize(
    "wrong",
    [{"label_columns": ("a",)}, {"label_columns": ("a", "a")}, {"label_separator": ""}],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        Reading(**wrong)
    with pytest.raises(InputError, match="expected either"):
        Reading(label_columns=("a", "b"), label_column="c")


@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=40))
def test_strata_have_at_least_two_texts_or_all_are_one(sets: list[set[int]]) -> None:
    labels = [tuple(sorted(some)) for some in sets]
    strata = strata_of(labels)
    counts = {stratum: strata.count(stratum) for stratum in strata}
    assert len(strata) == len(labels)
    assert min(counts.values()) > 1 or len(counts) == 1


def test_every_label_is_in_both_parts() -> None:
    labels: list[tuple[int, ...]] = [(0, 1) if row < 4 else (1,) if row % 2 else () for row in range(60)]
    rare = Examples([f"text {row}" for row in range(60)], labels)
    for seed in range(5):
        kept, held = hold_out(rare, 0.3, seed)
        assert len(kept) + len(held) == 60
        assert all(any(label in some for some in part.labels) for part in (kept, held) for label in (0, 1))


@given(st.integers(0, 2**32 - 1), st.integers(1, 25), st.booleans())
def test_cuts_are_the_best_of_all(seed: int, texts: int, equal: bool) -> None:
    draw = np.random.default_rng(seed)
    probabilities = draw.choice([0.2, 0.5, 0.8], (texts, 2)) if equal else draw.uniform(0.02, 0.98, (texts, 2))
    labels = draw.random((texts, 2)) < 0.4
    for label, cut in enumerate(best_cuts(probabilities, labels)):
        if not labels[:, label].any():
            assert cut == 0.5
            continue
        tried = [0.01, *probabilities[:, label], 0.99]
        scores = [metrics.f1_score(labels[:, label], probabilities[:, label] > one, zero_division=0) for one in tried]
        assert metrics.f1_score(labels[:, label], probabilities[:, label] > cut) == pytest.approx(max(scores))


def test_soft_losses_are_those_of_bernoulli_distributions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    ours, theirs = (torch.distributions.Bernoulli(logits=logits / 3.0) for logits in (student, teacher))
    expected = torch.distributions.kl_divergence(theirs, ours).mean() * 9.0
    assert distillation_of_sets(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_of_sets(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-7)
    probabilities = expit(student.numpy())
    sure = confidence(student, several=True).numpy()
    assert sure == pytest.approx(np.maximum(probabilities, 1 - probabilities).min(axis=1))
    difficulty = torch.tensor([0, 1, 0, 1, 0])
    pairs = [max(0.0, sure[hard] - sure[easy] + 0.3) for easy in (0, 2, 4) for hard in (1, 3)]
    found = difficulty_aware_regularization(student, difficulty, 0.3, several=True)
    assert found.item() == pytest.approx(np.mean(pairs), rel=1e-5)


def test_members_learn_and_keep_their_cuts(members: list[Path], data: TaskData) -> None:
    for folder in members:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        assert record["validation"]["best"] > 0.9  # of F1: the words say the labels
        truth = np.array([[index in some for index in range(3)] for some in data.validation.labels])
        logits = logits_of(str(folder), data, data.validation, 16)
        assert record["cuts"] == pytest.approx(best_cuts(expit(logits.astype(np.float64)), truth), abs=1e-4)
        found = metrics.f1_score(truth, expit(logits) > record["cuts"], average="macro")
        assert record["validation"]["best"] == pytest.approx(found, abs=1e-6)


def test_a_bundle_answers_as_torch(bundle: Path, members: list[Path], data: TaskData) -> None:
    runtime = CascadeRuntime(bundle)
    assert (runtime.task.name, runtime.bundle.labels) == ("multi_label", LABELS)
    shared = runtime.bundle.cuts
    assert list(shared) == recorded_cuts(members[-1])
    texts = list(data.validation.texts)
    for found, folder in zip(runtime.member_logits(texts)[0], members, strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        batch.pop("token_type_ids") if isinstance(model, AveragingForSequenceClassification) else None
        with torch.inference_mode():
            logits = model(**batch).logits.numpy()
        cuts = recorded_cuts(folder)  # its own, which are read at those that all share
        assert expit(found) == pytest.approx(expit(logits + logit(shared) - logit(cuts)), abs=1e-4)
        assert (expit(found.astype(np.float64)) > shared).tolist() == (expit(logits) > cuts).tolist()
    own = [entry.other.get("own_cuts", list(shared)) for entry in runtime.bundle.members]
    assert own == [recorded_cuts(folder) for folder in members]
    answered = [one.labels for one in runtime.without_exits().predict(texts)]
    expected = [tuple(LABELS[index] for index in some) for some in data.validation.labels]
    assert np.mean([one == other for one, other in zip(answered, expected, strict=True)]) > 0.8


def test_commands_lead_from_a_table_to_an_evaluation(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, _ = written_as("columns", tmp_path, ROWS)
    held, _ = written_as("separator", tmp_path, texts_and_labels(60, 1), "held")
    columns = ["--label-columns", *LABELS]
    recipe = ["--epochs", "8", "--learning-rate", "3e-3", "--batch-size", "16", "--max-length", "16"]
    assert main(["train", "--base", base, "--train-file", str(table), *columns, *recipe, "--output", "small"]) == 0
    assert "best validation f1" in capsys.readouterr().out
    assert main(["export", "--member", "small", "--output", "bundle", "--check-data", str(table), *columns]) == 0
    capsys.readouterr()
    asked = ["--input", str(held), "--label-column", "tags", "--label-separator", ";", "--json"]
    assert main(["evaluate", "--model-dir", "bundle", *asked]) == 0
    report = json.loads(capsys.readouterr().out)
    runtime = CascadeRuntime("bundle")
    answers = [one.labels for one in runtime.predict(text for text, _ in texts_and_labels(60, 1))]
    truth = [[name in has for name in LABELS] for _, has in texts_and_labels(60, 1)]
    found = [[name in has for name in LABELS] for has in answers]
    assert report["cascade"]["f1"] == pytest.approx(metrics.f1_score(truth, found, average="macro"))
    check = json.loads(Path("bundle/cascade.json").read_text("utf-8"))["members"][0]["check"]
    assert check["f1"]["exported"] == pytest.approx(check["f1"]["original"])


def test_cuts_can_be_chosen_at_export(members: list[Path], data: TaskData, tmp_path: Path) -> None:
    file, reading = written_as("separator", tmp_path, ROWS)
    check = Check(file, reading, choose_cuts=True)
    bundle = export_bundle([str(member) for member in members], tmp_path / "bundle", check=check)
    examples = Examples([text for text, _ in ROWS], [tuple(LABELS.index(name) for name in has) for _, has in ROWS])
    own = [entry.other["own_cuts"] for entry in bundle.members[:-1]]
    for folder, cuts in zip(members, [*own, bundle.cuts], strict=True):
        logits = logits_of(str(folder), data, examples, 16).astype(np.float64)
        assert cuts == pytest.approx(best_cuts(expit(logits), examples.answers(3)), abs=1e-4)
    (tmp_path / "texts.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match="found no labelled texts to choose cuts on"):
        check = Check(tmp_path / "texts.txt", choose_cuts=True)
        export_bundle([str(members[-1])], tmp_path / "other", check=check)
    assert not (tmp_path / "other").exists()


def test_difficulty_and_its_regularization_are_those_of_sets(base: str, data: TaskData, tmp_path: Path) -> None:
    label_difficulty(base, data, tmp_path / "difficulty", layers=1, recipe=RECIPE, splits=Splits(2, 1))
    rows = [json.loads(line) for line in (tmp_path / "difficulty" / "difficulty.jsonl").read_text("utf-8").splitlines()]
    for row, label in zip(rows, data.train.labels, strict=True):
        assert row["label"] == [LABELS[index] for index in label]
        assert row["difficulty"] == int(row["predictions"] != [row["label"]])
    summary = json.loads((tmp_path / "difficulty" / "summary.json").read_text("utf-8"))
    of_cats = [row["difficulty"] for row in rows if "cat" in row["label"]]
    assert summary["difficult_by_class"]["cat"] == pytest.approx(np.mean(of_cats))
    difficulty = read_difficulty(tmp_path / "difficulty", data.train)
    recipe = Recipe(epochs=1, max_length=16)
    record = finetune(base, data, tmp_path / "dar", recipe=recipe, objective=Objective(difficulty=difficulty))
    assert record["objective"]["dar"]["difficult"] == pytest.approx(summary["difficult"])


def test_unlabelled_texts_get_the_teachers_probabilities(data: TaskData) -> None:
    more = with_unlabelled(data, ["a text", "another"])
    teacher = np.zeros((len(more.train), 3), dtype=np.float32)
    teacher[-1] = [2.0, -1.0, 0.0]
    labels = with_answers(more, teacher, len(data.train)).train.labels
    assert list(labels[:-2]) == list(data.train.labels)
    assert labels[-2:] == [[0.5] * 3, pytest.approx(expit([2.0, -1.0, 0.0]).tolist())]


def test_a_new_classifier_answers_the_rates_of_training(base: str, data: TaskData) -> None:
    _, model = load_base(base, LABELS, None, several=True)
    start_at_rates(model, data)
    rates = [(1 + sum(index in some for some in data.train.labels)) / (len(data.train) + 2) for index in range(3)]
    assert torch.sigmoid(model.classifier.bias).tolist() == pytest.approx(rates)


def test_members_of_another_task_are_refused(base: str, members: list[Path], data: TaskData, tmp_path: Path) -> None:
    examples = Examples(["cat", "dog", "film"], [0, 1, 2])
    one = TaskData("one", LABELS, False, "accuracy", examples, examples)
    with pytest.raises(InvalidOption, match="one label per text, as the data have"):
        logits_of(str(members[-1]), one, one.train, 16)
    finetune(base, one, tmp_path / "one", recipe=Recipe(epochs=1, max_length=16))
    with pytest.raises(CascadeError, match=r"do not fit together: .* per text \((sigmoid|softmax)\) against"):
        export_bundle([str(tmp_path / "one"), str(members[-1])], tmp_path / "bundle")
    with pytest.raises(InputError, match="found several labels per text, expected one: exits"):
        train_exits(base, data, tmp_path / "exits", kind="pabee", recipe=RECIPE)
