"""Files that `predict` and other commands write: what rows may hold, and which names are refused before the work."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_rt.cli import main
from cascade_rt.io import tables
from cascade_rt.io.readers import Reading, read_records
from cascade_rt.jobs import files

from .commands import run

NUL = "\x00" if sys.version_info >= (3, 11) else ""  # before, Python's csv reader refuses it
ODD = [
    {"text": "a film", "id": 2**64 - 1, "n": 9007199254740993, "k\ud800": 1, "label": [1], "more": {"a": None}},
    {"text": "so sad", "id": 7, "n": 1.5, "error": "mine", "more": {}, "nul": NUL, "x" * 5000: "\ud800"},
]


def write_odd_rows() -> None:
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ODD, {"text": None}]))


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "json", "jsonl", "json.gz"])
def test_rows_of_any_kind_are_written(bundle: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_odd_rows()
    rules = ["--on-error", "skip", "--rejects", f"rejects.{ending}"]
    status, _, error = run(
        capsys, "predict", "--model-dir", bundle, "--input", "in.jsonl", "--output", f"out.{ending}", *rules
    )
    assert (status, "1 of 3 rows were rejected" in error) == (0, True)
    records: list[Any] = list(read_records(f"out.{ending}", pair=False))
    assert [record.text for record in records] == ["a film", "so sad"]
    first, second = (record.fields for record in records)
    typed = ending not in ("csv", "tsv")
    assert first["id"] == (ODD[0]["id"] if typed else str(ODD[0]["id"]))
    assert str(first["n"]) == "9007199254740993"
    assert str(first["input_label"]).replace(" ", "") == "[1]"
    assert (second["error"], second["nul"]) == ("mine", NUL)
    (reject,) = read_records(f"rejects.{ending}", Reading(columns=("reason",)), pair=False)
    assert "holds null, expected a text" in getattr(reject, "text", "")
    assert sorted(path.name for path in Path.cwd().iterdir()) == sorted(["in.jsonl", f"out.{ending}", rules[-1]])


def test_a_job_whose_conversion_failed_is_completed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    write_odd_rows()
    command = ["predict", "--model-dir", str(bundle), "--input", "in.jsonl", "--output", "out.parquet"]
    command += ["--on-error", "null"]

    def full(*_: object, **__: object) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "convert", full)
        assert main(command) == 2
    assert "--resume goes on after 3 rows" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 2
    assert "1 of 3 rows were rejected" in capsys.readouterr().err
    (*_, last) = tables.read_parquet(Path("out.parquet"), _fields("out.parquet"))
    assert last["label"] is None
    assert "holds null, expected a text" in last["error"]
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["in.jsonl", "out.parquet"]


def _fields(name: str) -> list[tables.Field]:
    schema = pytest.importorskip("pyarrow.parquet").read_schema(name)
    return [tables.Field(column, column, "string") for column in schema.names]


def test_a_field_called_error_is_not_taken_for_the_reason(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_odd_rows()
    _, lines, _ = run(capsys, "predict", "--model-dir", bundle, "--input", "in.jsonl", "--on-error", "null")
    assert [line.get("input_error") for line in lines] == [None, "mine", None]
    assert ["error" in line for line in lines] == [False, False, True]


def test_values_that_only_parquet_has_become_text(bundle: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = {
        "text": "a film",
        "day": datetime.date(2026, 11, 29),
        "time": datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.timezone.utc),
        "price": decimal.Decimal("1.50"),
        "raw": b"caf\xc3\xa9 \xff",
        "nan": float("nan"),
        "nested": {"bytes": [b"a"], "nan": [float("inf")]},
    }
    parquet.write_table(arrow.Table.from_pylist([row]), "in.parquet")
    for name in ("out.parquet", "out.csv"):
        assert main(["predict", "--model-dir", str(bundle), "--input", "in.parquet", "--output", name]) == 0
    found = parquet.read_table("out.parquet").to_pylist()[0]
    wanted = {"day": "2026-11-29", "price": "1.50", "raw": "caf\xe9 \\xff", "nan": None}
    assert {name: found[name] for name in wanted} == wanted
    assert found["time"].startswith("2026-11-29 12:00:00")
    assert json.loads(found["nested"]) == {"bytes": ["a"], "nan": [None]}
    with Path("out.csv").open(newline="", encoding="utf-8") as stream:
        (again,) = csv.DictReader(stream)
    assert all(again[name] == (wanted[name] or "") for name in wanted)


def test_times_that_python_cannot_hold_become_text(bundle: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "ns": arrow.array([1700000000123456789, None]).cast(arrow.timestamp("ns")),
        "far": arrow.array([0, 2**60]).cast(arrow.timestamp("us")),
        "short": arrow.array([5, 1]).cast(arrow.duration("ns")),
    }
    parquet.write_table(arrow.table({"text": ["a film", "so sad"], **columns}), "in.parquet")
    assert main(["predict", "--model-dir", str(bundle), "--input", "in.parquet", "--output", "out.parquet"]) == 0
    first, second = parquet.read_table("out.parquet").to_pylist()
    assert (first["ns"], second["ns"]) == ("2023-11-14 22:13:20.123456789", None)
    assert first["far"].startswith("1970-01-01 00:00:00")
    assert str(2**60) in second["far"]
    assert "5" in first["short"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "--input", "in.jsonl", "--output", "out.xlsx"], "unknown format '.xlsx', expected one of .jsonl,"),
        (["predict", "--input", "in.jsonl", "--output", "out.txt.gz"], "unknown format '.txt'"),
        (["predict", "--input", "in.jsonl", "--output", "out.parquet.gz"], "name it out.parquet, without .gz"),
        (["predict", "a", "--on-error", "skip", "--rejects", "rejects.xml"], "unknown format '.xml'"),
        (["predict", "a", "--on-error", "skip", "--rejects", "no/rejects.csv"], "does not exist"),
        (["benchmark", "--output", "report.csv"], "found a name that ends in .csv, expected .json"),
        (["benchmark", "--output", "in.jsonl/report.json"], "cannot write in.jsonl"),
        (["tune", "--input", "in.jsonl", "--output", "in.jsonl"], "lies in --input in.jsonl"),
    ],
)
def test_names_that_cannot_be_written_are_refused_before_the_work(
    bundle: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError

    write_odd_rows()
    if arguments[0] == "tune":
        pytest.importorskip("matplotlib")
    for module in ("predict.answer", "benchmark.measure_latency", "tune.collect"):
        monkeypatch.setattr(f"cascade_rt.cli.{module}", work)
    assert main([*arguments, "--model-dir", str(bundle)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in Path.cwd().iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("name", [".answers", ".answers.csv"])
def test_hidden_names_have_the_format_of_others(bundle: Path, name: str) -> None:
    Path("in.txt").write_text("a film\n")
    rules = ["--on-error", "skip", "--rejects", name.removeprefix(".")]
    assert main(["predict", "--model-dir", str(bundle), "--input", "in.txt", "--output", name, *rules]) == 0
    assert Path(name).read_text().startswith("label,score" if name.endswith("csv") else "{")
    assert sorted(path.name for path in Path.cwd().iterdir()) == sorted(["in.txt", name, rules[-1]])
