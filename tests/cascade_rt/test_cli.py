"""The command line as its users meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from cascade_rt import CascadeRuntime
from cascade_rt.cli import main
from cascade_rt.cost import flops_speedup

from ..conftest import LABELS

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
    assert done.stderr.startswith(b"1 text, exits ")  # the closing line
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


def test_no_field_is_lost_and_every_line_is_strict_json(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "label": "x", "input_label": "y", "n": NaN, "m": [Infinity]}\n')
    assert main(["predict", "--model-dir", str(bundle), "--input", "in.jsonl"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (line["input_label"], line["input_input_label"], line["n"], line["m"]) == ("y", "x", None, [None])
    assert line["label"] in LABELS


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
        ("predict --model-dir BUNDLE --input pairs.csv --pair-column b", "--text-column with it"),
        ("predict --model-dir BUNDLE --input two.jsonl", "found pairs ('text' and 'text_pair'), expected single texts"),
        ("predict --model-dir BUNDLE --input two.txt", "two.txt:1: found a pair"),
        (
            "predict --model-dir BUNDLE --output o.jsonl --input half.jsonl",
            "half.jsonl:1031: found half a surrogate pair",
        ),
        ("evaluate --model-dir BUNDLE --input many.csv", "many.csv:1032: found the label 'bogus'"),
        ("predict --model-dir BUNDLE --threads 99999999999 text", "expected 1 to 1024"),
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
    (tmp_path / "two.jsonl").write_text('{"text": "a", "text_pair": "b"}\n')
    (tmp_path / "two.txt").write_text("a\tb\n")
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n' * 1030 + '{"text": "\\ud83d"}\n')
    (tmp_path / "many.csv").write_text("text,label\n" + "x,good\n" * 1030 + "x,bogus\n")
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


@pytest.mark.parametrize("package", ["transformers", "torch", "sklearn", "optimum"])
@pytest.mark.parametrize("stage", ["train", "export"])
def test_an_offline_stage_that_is_not_installed_names_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str, package: str
) -> None:
    if (stage, package) in {("train", "optimum"), ("export", "sklearn")}:
        pytest.skip("not used there")
    for name in [name for name in sys.modules if name.startswith(("cascade_train.f", "cascade_export.", "optimum"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
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
