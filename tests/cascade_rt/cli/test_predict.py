"""`cascade-rt predict` as its users meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_rt.cli import main

from ...toy import LABELS
from .commands import SENTENCES, close, predictions, run


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


def test_one_threshold_holds_for_all_members(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    for tau, exit in ((0, 0), (1, 2)):
        _, lines, _ = run(capsys, "predict", "--model-dir", bundle, "--threshold", tau, *SENTENCES)
        assert {line["exit"] for line in lines} == {exit}


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


def test_an_error_half_way_keeps_the_answers_before_it_apart(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    lines = ['{"text": "a film"}'] * 3000 + ['{"text": 1}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    status, _, error = run(
        capsys, "predict", "--model-dir", bundle, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert status == 2
    assert "in.jsonl:3001" in error
    assert "--resume goes on after 2,048 rows" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.checkpoint", "out.jsonl.partial"]
    assert len((tmp_path / "out.jsonl.partial").read_text("utf-8").splitlines()) == 3000


def test_a_reader_that_closes_the_pipe_causes_no_traceback(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a film\n" * 20_000)
    command = f"{sys.executable} -m cascade_rt predict --model-dir {bundle} --threshold 0 --input in.txt | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_fields_keep_the_order_of_the_input_and_renamed_ones_their_place(
    bundle: Path, tmp_path: Path, ending: str
) -> None:
    fields = {"layers": "7", "id": "1", "label": "x", "text": "a film", "exit": "y", "note": "z"}
    path = tmp_path / f"in.{ending}"
    separator = "," if ending == "csv" else "\t"
    rows = [separator.join(fields), separator.join(fields.values())]
    path.write_text(json.dumps(fields) if ending == "jsonl" else "\n".join(rows))
    assert main(["predict", "--model-dir", str(bundle), "--input", str(path), "--output", "out.jsonl"]) == 0
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())
    assert list(line) == [
        *("input_layers", "id", "input_label", "text", "input_exit", "note"),
        *("label", "score", "exit", "layers", "truncated"),
    ]
    assert list(line.values())[:6] == list(fields.values())
    assert line["layers"] != "7"
