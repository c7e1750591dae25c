"""From labelled texts to a bundle: what is split, trained, chosen and reported, and what a kill leaves."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import cascade_build.build as module
import numpy as np
import pytest
import torch
from cascade_build.plan import plan_members, split
from cascade_build.report import BuildReport, WrongEarly, write_report
from cascade_train.finetune import Recipe
from cascade_train.tasks import Examples, TaskData
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cascade_rt import CascadeRuntime, read_bundle
from cascade_rt.cli import main
from cascade_rt.errors import InputError, InvalidOption

from ..conftest import WORDS, make_member

FILLERS = [word for word in WORDS if word not in {"good", "bad", "lovely", "boring"}]
REPORTS: list[BuildReport] = []  # of the build that the tests look at
TRAINED = "--epochs 3 --learning-rate 6e-3 --batch-size 16 --max-length 16 --no-bf16"
BRIEFLY = TRAINED.replace("--epochs 3", "--epochs 1")  # where nothing depends on what was learnt


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Return distinct texts that say good or lovely, bad or boring; every tenth is labelled wrongly."""
    draw = Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < count:
        label = draw.choice(("down", "up"))
        words = draw.sample(FILLERS, 4)
        words[draw.randrange(4)] = draw.choice(("good", "lovely") if label == "up" else ("bad", "boring"))
        texts[" ".join(words)] = label if len(texts) % 10 else "up"
    return list(texts.items())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two encoders of one family: 4 layers and 1 layer."""
    root = tmp_path_factory.mktemp("bases")
    return tuple(str(make_member(root / f"{layers}", layers=layers, spread=0.05)) for layers in (4, 1))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def built(bases: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished build: data.csv, bundle and bundle.build; read only."""
    folder = tmp_path_factory.mktemp("built")
    _write(folder / "data.csv", rows(700, 1))
    (folder / "more.txt").write_text("\n".join(text for text, _ in rows(60, 2)))
    arguments = f"--train-file {folder}/data.csv --big {bases[0]} --small {bases[1]} --output {folder}/bundle {TRAINED}"
    arguments += f" --unlabelled {folder}/more.txt --max-drop 0.05 --confidence 0.9 --cost layers --precision auto"

    def kept(report: BuildReport, path: Path) -> None:
        REPORTS.append(report)
        write_report(report, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_report", kept)
        assert main(["build", *arguments.split()]) == 0
    return folder


def _write(path: Path, examples: list[tuple[str, str]]) -> None:
    path.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in examples)]))


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_a_build_ends_in_a_tuned_bundle(built: Path) -> None:
    bundle = read_bundle(built / "bundle")
    assert [member.layers for member in bundle.members] == [0, 1, 4]
    assert all("temperature" in member.other and "auto" in member.other for member in bundle.members)
    assert bundle.tuning is not None
    answers = CascadeRuntime(built / "bundle").predict(["the film is lovely", "a bad day"])
    assert [answer.label for answer in answers] == ["up", "down"]
    assert sorted(path.name for path in built.iterdir()) == ["bundle", "bundle.build", "data.csv", "more.txt"]


def test_a_build_of_several_labels_per_text(bases: tuple[str, str], tmp_path: Path) -> None:
    kinds = {"good": "praise", "lovely": "praise", "bad": "blame"}
    draw, texts = Random(0), dict[str, list[str]]()
    while len(texts) < 520:
        words = draw.sample([*FILLERS[:20], *kinds], 5)
        texts[" ".join(words)] = sorted({kinds[word] for word in words if word in kinds})
    rows = [{"text": text, "labels": labels} for text, labels in texts.items()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        f"--train-file {tmp_path}/data.jsonl --big {bases[0]} --small {bases[1]} --output {tmp_path}/bundle {TRAINED}"
    )
    assert main(["build", *arguments.split(), "--max-drop", "0.05", "--cost", "layers", "--augment", "1"]) == 0
    runtime = CascadeRuntime(tmp_path / "bundle")
    assert (runtime.task.name, runtime.bundle.labels) == ("multi_label", ("blame", "praise"))
    held = [
        json.loads(line) for line in (tmp_path / "bundle.build/certification.jsonl").read_text("utf-8").splitlines()
    ]
    answers = runtime.predict([row["text"] for row in held])
    right = [list(answer.labels) == row["labels"] for answer, row in zip(answers, held, strict=True)]
    report = json.loads((tmp_path / "bundle.build/report.json").read_text("utf-8"))
    assert report["cascade"]["accuracy"] == pytest.approx(np.mean(right))
    assert report["metric"] == "f1"
    assert {row["label"] for row in report["wrong_early"]} <= {"no label", "blame", "praise", "blame, praise"}


def test_no_text_is_in_two_parts(built: Path) -> None:
    work = built / "bundle.build"
    parts = [_texts(work / "tuning.jsonl"), _texts(work / "certification.jsonl")]
    parts.append(_texts(work / "members" / "4L" / "validation.jsonl"))
    held = [text for part in parts for text in part]
    assert len(set(held)) == len(held)
    assert [len(part) for part in parts] == [70, 70, 70]
    everything = {text for text, _ in rows(700, 1)}
    assert set(held) < everything
    recorded = json.loads((work / "data.json").read_text("utf-8"))["data"]
    assert recorded["train"]["rows"] == 490


def test_the_small_member_learns_from_unlabelled_texts_too(built: Path) -> None:
    record = json.loads((built / "bundle.build/members/1L/cascade_train.json").read_text("utf-8"))
    unlabelled = {text for text, _ in rows(60, 2)} - {text for text, _ in rows(700, 1)}
    assert record["data"]["train"]["rows"] == 490 + len(unlabelled) > 490
    assert record["objective"]["distillation"] == {"temperature": 3.0, "weight": 0.9}
    answers = np.load(built / "bundle.build/answers-4L.npy")
    assert answers.shape == (490 + len(unlabelled), 2)


def test_the_report_measures_on_the_certification_part(built: Path) -> None:
    report = json.loads((built / "bundle.build/report.json").read_text("utf-8"))
    held = [json.loads(line) for line in (built / "bundle.build/certification.jsonl").read_text("utf-8").splitlines()]
    answers = CascadeRuntime(built / "bundle").predict([row["text"] for row in held])
    right = [answer.label == row["label"] for answer, row in zip(answers, held, strict=True)]
    assert report["cascade"]["accuracy"] == pytest.approx(np.mean(right))
    assert report["tuning"]["held_out"]["accuracy"] == pytest.approx(np.mean(right))
    chosen = report["tuning"]["chosen"]["members"]
    last = len(chosen) - 1
    wrong = [
        (row["text"], answer.score)
        for answer, row, well in zip(answers, held, right, strict=True)
        if not well and answer.exit < last
    ]
    assert report["early_errors"] == len(wrong)
    surest = sorted(wrong, key=lambda pair: -pair[1])[:20]
    assert [row["score"] for row in report["wrong_early"]] == pytest.approx([score for _, score in surest])
    assert report["tuning"]["guarantee"]["texts"] == 70


def test_the_page_needs_no_other_file(built: Path) -> None:
    page = (built / "bundle.build/report.html").read_text("utf-8")
    report = json.loads((built / "bundle.build/report.json").read_text("utf-8"))
    assert report["tuning"]["verdict"] in page.replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<")
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "no outside files"
    for step in ("train 4L", "answers of 4L", "train 1L", "export"):
        assert f"<td>{step}</td>" in page


def test_texts_are_escaped_in_the_page(built: Path, tmp_path: Path) -> None:
    wrong = WrongEarly("<script>x</script>", "up", "down", 0.9, "1L", "up")
    write_report(replace(REPORTS[0], wrong_early=[wrong]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;x" in page


def test_a_member_cut_out_of_the_big_one_starts_from_its_fine_tuned_layers(
    bases: tuple[str, str], tmp_path: Path
) -> None:
    _write(tmp_path / "data.csv", rows(600, 5))
    still = "--small-epochs 0.001 --small-learning-rate 1e-12"
    arguments = (
        f"--train-file data.csv --big {bases[0]} --small {bases[0]}=1 --output bundle --augment 1 {BRIEFLY} {still}"
    )
    assert main(["build", *arguments.split()]) == 0
    members = tmp_path / "bundle.build/members"
    big, small = (load_file(members / name / "model.safetensors") for name in ("4L", "1L"))
    assert set(small) < set(big)
    assert all(torch.allclose(small[name], big[name], atol=1e-6) for name in small)
    record = json.loads((members / "1L/cascade_train.json").read_text("utf-8"))
    assert record["data"]["train"]["rows"] > 420 * 1.7, "with a variant of almost every text"


class _Killed(BaseException):
    pass


def test_a_killed_build_goes_on_where_it_was(
    bases: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "data.csv", rows(600, 3))
    arguments = f"build --train-file data.csv --big {bases[0]} --small {bases[1]} --output bundle {BRIEFLY}".split()
    work = tmp_path / "bundle.build"
    times: dict[Path, int] = {}

    def killing(name: str) -> None:
        def kill(*_: object, **__: object) -> None:
            raise _Killed

        monkeypatch.setattr(module, name, kill)

    original = {name: getattr(module, name) for name in ("logits_of", "export_bundle", "write_report", "write_bundle")}
    for name, function in original.items():
        killing(name)
        with pytest.raises(_Killed):
            main(arguments)
        monkeypatch.setattr(module, name, function)
        assert not (tmp_path / "bundle").exists()
        for folder in (work / "members").iterdir():
            stamp = folder.stat().st_mtime_ns
            assert times.setdefault(folder, stamp) == stamp, "no member is trained twice"
    said = capsys.readouterr().err
    assert "2 labels; " in said
    assert said.count("together about") == 1, "the plan is said when the work begins"
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err.count("done before") == 6
    assert "verdict: " in shown.out
    CascadeRuntime(tmp_path / "bundle").predict(["good"])
    assert main(arguments) == 2
    assert "bundle exists" in capsys.readouterr().err


def test_a_build_on_other_data_does_not_continue_it(
    built: Path, bases: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "data.csv", rows(650, 9))
    arguments = f"--train-file data.csv --big {bases[0]} --small {bases[1]} --output {built}/bundle {TRAINED}"
    assert main(["build", *arguments.split(), "--overwrite"]) == 2
    assert "belongs to a build on other data" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_steps_whose_settings_changed_are_repeated_and_only_those(
    built: Path, bases: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(built, tmp_path / "again")
    arguments = (
        f"build --train-file {built}/data.csv --big {bases[0]} --small {bases[1]} --output {folder}/bundle {TRAINED}"
    )
    arguments += f" --unlabelled {built}/more.txt --max-drop 0.05 --confidence 0.999 --cost layers --small-epochs 1"
    capsys.readouterr()
    assert main([*arguments.split(), "--overwrite"]) == 0
    steps = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training ")]
    assert steps == [
        "try the export: done before",
        "train 4L: done before",
        "answers of 4L: done before",
        "train 1L: again, because its settings have changed",
        "train DAN: done before",
        "export: again, because its settings have changed",
        "tune",
    ]
    report = json.loads((folder / "bundle.build/report.json").read_text("utf-8"))
    assert report["tuning"]["guarantee"]["certified"] == 0, "70 texts cannot certify that"
    assert report["tuning"]["chosen"]["members"] == ["4L"]
    assert report["cascade"]["accuracy"] == report["members"][-1]["quality"]["accuracy"]
    assert read_bundle(folder / "bundle").members[0].precision == "fp32"


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    bases: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "data.csv", rows(600, 3))
    arguments = (
        f"build --train-file data.csv --big {bases[0]} --small {bases[0]}=2 --small {bases[1]} --output b --dry-run"
    )
    assert main([*arguments.split(), "--json", *TRAINED.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [step["name"] for step in found["steps"]]
    assert names == [
        "try the export",
        "train 4L",
        "answers of 4L",
        "train 2L",
        "train 1L",
        "train DAN",
        "export",
        "tune",
    ]
    assert all(step["seconds"] > 0 for step in found["steps"])
    assert main([*arguments.split(), *TRAINED.split()]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"data: 2 labels; 4\d\d texts to train on, 60 to choose checkpoints by, \d\d to tune on", shown)
    assert "together about" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--small BIG", "--small: found"),
        ("--small BIG=9", "expected 1 to 4 layers of"),
        ("--small nowhere/at-all", "nowhere/at-all: no such folder"),
        ("--small SMALL --max-length 100", "--max-length: found 100, expected at most 64"),
        ("--small SMALL --precision int3", "--precision: found 'int3', expected one of fp32"),
        ("--small SMALL --reserve 0.5", "--reserve: found 0.5"),
        ("--small SMALL --reserve 0.05", "found 540 training texts, expected at least 951"),
        ("--small SMALL --distill-weight 2", "--distill-weight: found 2"),
        ("--small SMALL --max-drop 2", "--max-drop: found 2"),
        ("--dan-epochs -1", "--dan-epochs: found -1"),
        ("--speedup 0", "--speedup: found 0"),
        ("--speedup 2 --max-drop 0.1", "one objective"),
        ("--speedup 2 --confidence 0.9", "--confidence: found 0.9, expected a maximum drop with it"),
    ],
)
def test_what_would_fail_later_fails_at_once(
    bases: tuple[str, str], arguments: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "data.csv", rows(600, 3))
    length = "" if "--max-length" in arguments else "--max-length 16"
    written = arguments.replace("BIG", bases[0]).replace("SMALL", bases[1])
    command = f"build --train-file data.csv --big {bases[0]} {length} {written} --output bundle --no-bf16"
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


@settings(max_examples=30)
@given(rare=st.integers(2, 20), seed=st.integers(0, 100))
def test_rare_labels_are_refused_before_anything_is_trained_or_in_every_part(rare: int, seed: int) -> None:
    labels = [0] * 600 + [1] * (600 - rare) + [2] * rare
    examples = Examples([f"text {index}" for index in range(1200)], labels)
    data = TaskData("rare", ("a", "b", "c"), False, "accuracy", examples, Examples(["x"], [0]))
    if rare < 9:
        with pytest.raises(InputError, match=rf"few training texts \('c' {rare}\), expected at least 9"):
            split(data, [], share=0.1, seed=seed)
        return
    parts = split(data, [], share=0.1, seed=seed)
    assert all({0, 1, 2} <= set(part.labels) for part in (parts.data.train, parts.tuning, parts.certification))


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), share=st.floats(0.1, 0.3), copies=st.integers(1, 3))
def test_parts_share_no_text_whatever_is_repeated(seed: int, share: float, copies: int) -> None:
    draw = Random(seed)
    texts = [f"text {draw.randrange(2000)}" for _ in range(1500)] * copies
    labels = [int(text.split()[1]) % 2 for text in texts]
    validation = Examples(texts[:50], labels[:50])
    data = TaskData("toy", ("even", "odd"), False, "accuracy", Examples(texts[50:], labels[50:]), validation)
    unlabelled = [f"text {index}" for index in range(2100)]
    parts = split(data, unlabelled, share=share, seed=seed)
    learnt = set(parts.data.train.texts) | set(parts.unlabelled)
    held = {text for part in (parts.data.validation, parts.tuning, parts.certification) for text in part.texts}
    assert not learnt & held
    assert not set(parts.data.train.texts) & set(parts.unlabelled)
    assert len(set(parts.unlabelled)) == len(parts.unlabelled)
    assert set(unlabelled) <= learnt | held


def test_deeper_and_wider_members_get_lower_rates(bases: tuple[str, str], tmp_path: Path) -> None:
    wide = make_member(tmp_path / "wide", layers=4, hidden=64)
    big, small = plan_members(str(wide), [f"{bases[0]}=3"], 4096, 0, recipe=Recipe(max_length=16))
    assert (big.name, small.name) == ("4L", "3L")
    assert small.recipe.learning_rate >= big.recipe.learning_rate
    assert big.recipe.epochs == 10, "3,000 steps would be 23 epochs"
    with pytest.raises(InvalidOption, match="smaller than"):
        plan_members(bases[0], [bases[0]], 100, 0, recipe=Recipe(max_length=16))
