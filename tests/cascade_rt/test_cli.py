"""The command line as its users meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main

SENTENCES = ["a good film", "a bad , bad film", "the cat sat on the mat", "so sad", "not very witty but lovely"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")], captured.err


def predictions(bundle: Path, texts: list[Any]) -> list[dict[str, Any]]:
    names = ("label", "score", "exit", "layers", "truncated")
    return [{name: getattr(row, name) for name in names} for row in CascadeRuntime(bundle).predict(texts)]


def close(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    return [{**row, "score": pytest.approx(row["score"], abs=1e-5)} for row in wanted] == got


def test_texts_as_arguments(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    status, lines, _ = run(capsys, "predict", "--model-dir", bundle, *SENTENCES)
    assert status == 0
    assert close(lines, predictions(bundle, SENTENCES))


def test_pairs_as_arguments(capsys: pytest.CaptureFixture[str], pair_bundle: Path) -> None:
    _, lines, _ = run(capsys, "predict", "--model-dir", pair_bundle, "a cat", "a dog", "so sad", "so happy")
    assert close(lines, predictions(pair_bundle, [("a cat", "a dog"), ("so sad", "so happy")]))
    status, _, error = run(capsys, "predict", "--model-dir", pair_bundle, "a cat")
    assert (status, error.count("\n")) == (2, 1)
    assert "expected pairs" in error


@pytest.mark.parametrize("ending", ["txt", "tsv", "csv", "jsonl"])
@pytest.mark.parametrize("pair", [False, True])
def test_files_keep_order_and_their_own_fields(
    capsys: pytest.CaptureFixture[str], bundle: Path, pair_bundle: Path, tmp_path: Path, ending: str, pair: bool
) -> None:
    texts: list[Any] = [(one, two) for one, two in zip(SENTENCES, SENTENCES[::-1], strict=True)] if pair else SENTENCES
    columns = ["sentence1", "sentence2"] if pair else ["sentence"]
    rows = [list(text) if pair else [text] for text in texts]
    header, kept = [*columns, "id", "label"], [{"id": str(index), "label": "x"} for index in range(len(rows))]
    path = tmp_path / f"in.{ending}"
    if ending == "txt":
        path.write_text("".join("\t".join(row) + "\n" for row in rows))
        own: list[dict[str, Any]] = [{} for _ in rows]
    elif ending == "jsonl":
        own = [dict(zip(columns, row, strict=True)) | extra for row, extra in zip(rows, kept, strict=True)]
        path.write_text("".join(json.dumps(fields) + "\n" for fields in own))
    else:
        separator = {"tsv": "\t", "csv": ","}[ending]
        quote = '"' if ending == "csv" else ""
        table = [header, *([*row, str(index), "x"] for index, row in enumerate(rows))]
        path.write_text("".join(separator.join(f"{quote}{cell}{quote}" for cell in row) + "\n" for row in table))
        own = [dict(zip(columns, row, strict=True)) | extra for row, extra in zip(rows, kept, strict=True)]
    folder = pair_bundle if pair else bundle
    status, _, _ = run(capsys, "predict", "--model-dir", folder, "--input", path, "--output", tmp_path / "out.jsonl")
    assert status == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for fields in own:  # the file's label does not hide the predicted one, and is not lost
        if "label" in fields:
            fields["input_label"] = fields.pop("label")
    assert close(lines, [fields | answer for fields, answer in zip(own, predictions(folder, texts), strict=True)])


def test_standard_input_as_a_real_process(bundle: Path) -> None:
    command = [sys.executable, "-m", "cascade_rt", "predict", "--model-dir", str(bundle), "--input", "-"]
    done = subprocess.run(command, input=b"a gorgeous , witty film\n", capture_output=True, check=True)
    (line,) = done.stdout.splitlines()
    assert json.loads(line).keys() == {"label", "score", "exit", "layers", "truncated"}
    assert done.stderr == b""
    jsonl = subprocess.run(
        [*command, "--format", "jsonl"], input='{"text": "🙂"}'.encode(), capture_output=True, check=True
    )
    assert json.loads(jsonl.stdout)["text"] == "🙂"
    bad = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, check=False)
    assert (bad.returncode, bad.stdout, bad.stderr.count(b"\n")) == (2, b"", 1)


def test_threshold_rules_all_gates(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    for tau, exit in ((0, 0), (1, 2)):
        _, lines, _ = run(capsys, "predict", "--model-dir", bundle, "--threshold", tau, *SENTENCES)
        assert {line["exit"] for line in lines} == {exit}


def test_info_shows_the_manifest(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    _, (manifest,), _ = run(capsys, "info", "--model-dir", bundle, "--json")
    assert manifest == json.loads((bundle / "cascade.json").read_text("utf-8"))
    assert main(["info", "--model-dir", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "single, up to 32 tokens" in shown
    assert all(name in shown for name in ("tiny", "small", "big", "bad, fine, good", "0.8000"))


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("predict --model-dir nowhere text", "nowhere: no bundle there"),
        ("predict --model-dir BUNDLE", "no text"),
        ("predict --model-dir BUNDLE text --input -", "not both"),
        ("predict --model-dir BUNDLE --threshold 1.5 text", "threshold 1.5, expected a number from 0 to 1"),
        ("predict --model-dir BUNDLE --threshold high text", "invalid float value: 'high'"),
        ("predict --model-dir BUNDLE --input gone.csv", "gone.csv: no such file"),
        ("predict --model-dir BUNDLE --input pairs.csv --text-column a --pair-column b", "texts here are single"),
        ("predict --model-dir BUNDLE --input pairs.csv --text-column c", "no column 'c'; found 'a', 'b'"),
        ("predict --model-dir PAIRS --input single.txt", "expected a pair"),
        ("predict --model-dir PAIRS --input labelled.csv", "expected a pair"),
        ("predict --model-dir BUNDLE --input latin.txt", "expected UTF-8"),
        ("predict --model-dir BUNDLE --output no/out text", "does not exist; create it first"),
        ("predict --model-dir BUNDLE --output . text", "it is a folder"),
        ("predict --model-dir BUNDLE --provider cuda text", "'cuda' is not available; found"),
        (
            "evaluate --model-dir BUNDLE --input labelled.csv",
            "found the label 'splendid', expected one that the bundle",
        ),
        ("evaluate --model-dir BUNDLE --input single.txt", "no column 'label'"),
        ("evaluate --model-dir BUNDLE --input labelled.csv --label-column y", "no column 'y'; found 'text', 'label'"),
        ("evaluate --model-dir BUNDLE --input empty.csv", "found no examples"),
        ("info", "--model-dir"),
        ("brew", "brew"),
        ("", "COMMAND"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(
    capsys: pytest.CaptureFixture[str], bundle: Path, pair_bundle: Path, tmp_path: Path, arguments: str, says: str
) -> None:
    (tmp_path / "pairs.csv").write_text("a,b\nx,y\n")
    (tmp_path / "single.txt").write_text("one text\n")
    (tmp_path / "labelled.csv").write_text("text,label\nx,splendid\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    places = {"BUNDLE": str(bundle), "PAIRS": str(pair_bundle)}
    before = sorted(path.name for path in tmp_path.iterdir())
    status, lines, error = run(capsys, *(places.get(word, word) for word in arguments.split()))
    assert (status, lines, error.count("\n")) == (2, [], 1)
    assert error.startswith("cascade-rt: error: ")
    assert says in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_error_on_the_way_leaves_no_output_file(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    lines = ['{"text": "a film"}'] * 3000 + ['{"text": 1}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    status, _, error = run(
        capsys, "predict", "--model-dir", bundle, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert status == 2
    assert "in.jsonl:3001" in error
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_reader_that_goes_away_is_no_crash(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a film\n" * 20_000)
    command = f"{sys.executable} -m cascade_rt predict --model-dir {bundle} --threshold 0 --input in.txt | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", ["train", "export"])
def test_an_offline_stage_that_is_not_installed_names_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    for name in ("cascade_train.finetune", "cascade_export.export"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = {
        "train": ["--base", "x", "--task", "smart-home", "--output", "out"],
        "export": ["--member", "x", "--output", "out"],
    }[stage]
    status, _, error = run(capsys, stage, *arguments)
    assert status == 2
    assert "pip install 'cascade-rt[export]'" in error


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["predict", "--help"], ["train", "--help"], ["export", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "cascade-rt" in capsys.readouterr().out
