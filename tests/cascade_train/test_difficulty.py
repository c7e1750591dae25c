"""Difficulty labels: what they say, that a killed run goes on, and that DAR and distillation learn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cascade_train import RECORD
from cascade_train import difficulty as module
from cascade_train.difficulty import Splits, label_difficulty, read_difficulty
from cascade_train.finetune import Objective, Recipe, finetune, logits_of, teacher_logits
from cascade_train.tasks import Examples, TaskData

from cascade_rt.cli import main
from cascade_rt.errors import InputError

from ..cascade_export.families import FAMILIES
from ..conftest import make_member

RECIPE = Recipe(epochs=16, learning_rate=3e-3, batch_size=8, max_length=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_member(tmp_path_factory.mktemp("base") / "2L", layers=2, spread=0.1))


@pytest.fixture(scope="module")
def data() -> TaskData:
    """Texts whose first word tells the class; every eighth label is wrong, so nobody can learn it."""
    draw = np.random.default_rng(0)
    words = np.array(["cat", "dog", "mat", "film", "sat", "runs", "walks", "on", "in", "it"])
    texts, labels = [], []
    for row in range(64):
        label = int(draw.integers(2))
        texts.append(" ".join([("bad", "good")[label], *draw.choice(words, 4)]))
        labels.append(1 - label if row % 8 == 0 else label)
    examples = Examples(texts, labels)
    return TaskData("toy", ("bad", "good"), False, "accuracy", examples.take(range(48)), examples.take(range(48, 64)))


@pytest.fixture(scope="module")
def labelled(base: str, data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "difficulty"
    label_difficulty(base, data, folder, layers=1, recipe=RECIPE, splits=Splits(3, 2))
    return folder


def test_easy_is_what_every_seed_answers_rightly(labelled: Path, data: TaskData) -> None:
    rows = [json.loads(line) for line in (labelled / "difficulty.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == list(range(48))
    for row, label in zip(rows, data.train.labels, strict=True):
        assert row["label"] == data.labels[label]
        assert len(row["predictions"]) == 2
        assert row["difficulty"] == int(any(answer != row["label"] for answer in row["predictions"]))
    mislabelled = [row["difficulty"] for row in rows if row["id"] % 8 == 0]
    others = [row["difficulty"] for row in rows if row["id"] % 8]
    assert np.mean(mislabelled) > np.mean(others) + 0.2
    summary = json.loads((labelled / "summary.json").read_text("utf-8"))
    assert summary["difficult"] == np.mean([row["difficulty"] for row in rows])
    for name, share in summary["difficult_by_class"].items():
        assert share == np.mean([row["difficulty"] for row in rows if row["label"] == name])
    assert read_difficulty(labelled, data.train) == [row["difficulty"] for row in rows]
    assert [path.name for path in labelled.parent.iterdir()] == ["difficulty"]


def test_answers_stay_with_their_texts_whatever_their_lengths(base: str, tmp_path: Path) -> None:
    """Batches are made of like lengths; out of step, the answers would be right for half of the texts."""
    texts = [" ".join([("bad", "good")[row % 2], *["film"] * (row * 7 % 11)]) for row in range(66)]
    examples = Examples(texts, [row % 2 for row in range(66)])
    toy = TaskData("toy", ("bad", "good"), False, "accuracy", examples, examples)
    summary = label_difficulty(base, toy, tmp_path / "labels", layers=1, recipe=RECIPE, splits=Splits(2, 2))
    assert min(summary["accuracy_by_seed"]) > 0.9


def test_a_killed_run_goes_on_and_two_at_a_time_answer_the_same(
    base: str, data: TaskData, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_fold = module._train_fold
    trained: list[tuple[int, int]] = []

    def killed_at_the_fourth(run: Any, seed: int, fold: int) -> None:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((seed, fold))
        train_fold(run, seed, fold)

    settings: dict[str, Any] = {"layers": 1, "recipe": RECIPE, "splits": Splits(3, 2)}
    monkeypatch.setattr(module, "_train_fold", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        label_difficulty(base, data, tmp_path / "again", **settings)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(module, "_train_fold", train_fold)
    with pytest.raises(Exception, match="unfinished run with another folds"):
        label_difficulty(base, data, tmp_path / "again", **settings | {"splits": Splits(4, 2)})
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again.labelling").glob("seed-*.json")}
    assert len(before) == 3
    label_difficulty(base, data, tmp_path / "again", jobs=2, **settings)
    found = (tmp_path / "again" / "difficulty.jsonl").read_text("utf-8")
    assert found == (labelled / "difficulty.jsonl").read_text("utf-8")


def test_what_cannot_be_labelled_is_refused(base: str, data: TaskData, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`folds`: found 40, expected at most \d+, the training instances"):
        label_difficulty(base, data, tmp_path / "out", recipe=RECIPE, splits=Splits(folds=40))
    with pytest.raises(InputError, match="exists; choose another"):
        label_difficulty(base, data, labelled, recipe=RECIPE)
    with pytest.raises(InputError, match="other training examples than these 16"):
        read_difficulty(labelled, data.validation)
    with pytest.raises(InputError, match="no difficulty labels"):
        read_difficulty(tmp_path, data.train)
    assert list(tmp_path.iterdir()) == []


def test_dar_parts_easy_from_difficult(base: str, data: TaskData, labelled: Path, tmp_path: Path) -> None:
    """After training with DAR, easy training instances are surer against difficult ones than without."""
    difficulty = np.array(read_difficulty(labelled, data.train))
    gaps = {}
    for name, objective in (("plain", Objective()), ("dar", Objective(difficulty=difficulty.tolist(), dar_weight=2))):
        record = finetune(base, data, tmp_path / name, layers=1, recipe=RECIPE, objective=objective)
        logits = logits_of(str(tmp_path / name), data, data.train, 16).astype(np.float64)
        sure = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
        gaps[name] = sure[difficulty == 0].mean() - sure[difficulty == 1].mean()
        assert ("dar" in record["objective"]) == (name == "dar")
    assert gaps["dar"] > gaps["plain"]


def test_a_first_layers_member_of_roberta_is_distilled(data: TaskData, tmp_path: Path) -> None:
    """The paper's CascadeRoBERTa (section 5.4): the student comes nearer to its teacher's answers."""
    roberta = FAMILIES["roberta"](tmp_path / "roberta")
    finetune(str(roberta), data, tmp_path / "teacher", recipe=RECIPE)
    teacher = teacher_logits(str(tmp_path / "teacher"), data, RECIPE)
    distances = []
    for name, objective in (
        ("labels", Objective()),
        ("taught", Objective(teacher=teacher, distill_weight=1.0, temperature=2.0)),
    ):
        record = finetune(str(roberta), data, tmp_path / name, layers=1, recipe=RECIPE, objective=objective)
        assert record["layers"] == 1
        answers = logits_of(str(tmp_path / name), data, data.train, 16)
        distances.append(float(np.abs(np.diff(answers) - np.diff(teacher)).mean()))
    assert distances[1] < distances[0]


def test_the_commands_label_and_train(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"{word} film", "label": label} for word, label in (("bad", "no"), ("good", "yes"))] * 12
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--train-file", "toy.jsonl", "--base", base, "--layers", "1", "--max-length", "16", "--epochs", "1"]
    assert main(["difficulty", *common, "--folds", "2", "--seeds", "1", "--output", "labels"]) == 0
    assert "% difficult (no " in capsys.readouterr().out
    assert main(["train", *common, "--output", "big"]) == 0
    learn = ["--difficulty", "labels", "--dar-grid", "--teacher", "big", "--distill-weight", "0.3"]
    assert main(["train", *common, *learn, "--output", "small"]) == 0
    record = json.loads(Path("small", RECORD).read_text("utf-8"))
    assert record["objective"]["dar"]["grid"].keys() == {"0.1", "0.3", "0.5", "0.7"}
    assert record["objective"]["distillation"] == {"temperature": 2.0, "weight": 0.3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "labels", "small", "toy.jsonl"]
    capsys.readouterr()
    for arguments, says in (
        (["--dar-grid"], "--dar-grid requires"),
        (["--difficulty", "big"], "big: no difficulty labels"),
        (["--difficulty", "labels", "--dar-margin", "2"], "--dar-margin: found 2, expected a number from 0 to 1"),
        (["--difficulty", "labels", "--holdout", "0.5"], "labels of 21 other training examples than these 12"),
        (["--teacher", "labels"], "labels: the folder has no config.json"),
    ):
        assert main(["train", *common, *arguments, "--output", "other"]) == 2
        assert says in capsys.readouterr().err
        assert not Path("other").exists()
