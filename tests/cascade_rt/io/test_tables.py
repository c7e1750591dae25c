"""Rows in other formats than JSON lines: whatever they hold, they are written, and every value is found again."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt.errors import InputError, MissingExtraError
from cascade_rt.io import tables
from cascade_rt.io.readers import Reading, read_records
from cascade_rt.io.tables import columns_of, convert, fields_of, open_rows, output_format, read_parquet
from cascade_rt.io.writers import json_line

texts = st.text(st.characters(exclude_categories=[]), max_size=6) | st.sampled_from(
    ["", "\x00", "a\tb", "a\nb", "a\r", '"', "\ud800", "\\ud800", "null", "true", "1", "[1]", "=1"]
)
numbers: st.SearchStrategy[int | float] = st.integers() | st.sampled_from(
    [2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64]
)
numbers |= st.floats(allow_nan=False, allow_infinity=False)
simple = st.none() | st.booleans() | numbers | texts
values = st.recursive(simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
names = texts | st.sampled_from(["id", "k\ud800", "k\\ud800", "k\\ud800_"])
of_one_kind = [st.booleans(), st.integers(), st.integers(0, 2**64), st.floats(allow_nan=False), texts, numbers, values]


@st.composite
def some_rows(draw: Any) -> list[dict[str, Any]]:
    """Rows whose columns are of one kind, or not, and which lack some of them."""
    columns = draw(st.dictionaries(names, st.sampled_from(of_one_kind), max_size=4))
    row = st.fixed_dictionaries({}, optional=columns) | st.dictionaries(names, values, max_size=2)
    rows = draw(st.lists(row, max_size=5))
    return [json.loads(json_line(row, {"label": "x"})) for row in rows]  # infinity becomes null


def written(rows: list[dict[str, Any]], target: str) -> Path:
    lines = Path("rows.jsonl")
    lines.write_text("".join(json_line(row, {}) for row in rows), "utf-8", errors="backslashreplace")
    assert convert(lines, Path(target))
    return Path(target)


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(sign):04x}" if "\ud800" <= sign <= "\udfff" else sign for sign in text)


def expected(column: list[Any]) -> list[Any]:
    """Return a column of a parquet file by the rule of the documentation."""
    kinds = {type(value) for value in column if value is not None}
    present = [value for value in column if value is not None]
    if kinds <= {str}:
        return [None if value is None else escaped(value) for value in column]
    if kinds in ({bool}, {float}):
        return column
    if kinds == {int} and (
        all(-(2**63) <= value < 2**63 for value in present) or all(0 <= value < 2**64 for value in present)
    ):
        return column
    if kinds == {int, float} and all(isinstance(value, float) or abs(value) <= 2**53 for value in present):
        return [None if value is None else float(value) for value in column]
    return [None if value is None else json.dumps(value) for value in column]


def in_order(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


@relaxed
@given(some_rows())
def test_every_value_is_found_again_in_parquet(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(written(rows, "out.parquet"))
    own = in_order(rows)
    assert len(set(table.column_names)) == len(own)
    for name, column, found in zip(own, table.column_names, table.columns, strict=True):
        assert column.rstrip("_") == escaped(name).rstrip("_")
        wanted = expected([row.get(name) for row in rows])
        assert list(map(repr, found.to_pylist())) == list(map(repr, wanted))  # repr tells 1 from 1.0 and True


@relaxed
@given(some_rows(), st.sampled_from(["csv", "tsv"]))
def test_every_value_is_found_again_in_text(tmp_path: Path, rows: list[dict[str, Any]], ending: str) -> None:
    content = written(rows, f"out.{ending}").read_bytes().decode("utf-8")
    null = "\\x00" if ending == "csv" and sys.version_info < (3, 11) else "\x00"  # which Python's csv refuses there
    if ending == "csv":
        header, *lines = list(csv.reader(io.StringIO(content, newline=""), strict=True)) or [[]]
    else:
        header, *lines = [line.split("\t") for line in content.split("\n")[:-1]] or [[]]
    own = in_order(rows)
    assert len(set(header)) == len(header) == len(own)
    assert len(lines) == (len(rows) if own else 0)
    for row, cells in zip(rows, lines, strict=False):
        for value, cell in zip((row.get(name) for name in own), cells or [""], strict=True):  # of one column: no cells
            wanted = "" if value is None else escaped(value) if isinstance(value, str) else json.dumps(value)
            if ending == "tsv" and any(sign in wanted for sign in "\t\n\r"):
                assert json.loads(cell) == value
            else:
                assert cell == wanted.replace("\x00", null)


@relaxed
@given(some_rows())
def test_an_array_holds_the_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    found = json.loads(written(rows, "out.json").read_text("utf-8"))
    assert list(map(repr, found)) == list(map(repr, rows))


@settings(relaxed, max_examples=20)
@given(some_rows(), some_rows())
def test_a_table_can_be_written_for_more_rows_than_its_own(
    tmp_path: Path, some: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    """Two tables of the same job have the same columns, of the same types."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, rows in (("some", some), ("others", others), ("all", some + others)):
        written(rows, f"{name}.parquet")
        Path("rows.jsonl").rename(f"{name}.jsonl")
    joined = columns_of(Path("some.jsonl"))
    for name, column in columns_of(Path("others.jsonl")).items():
        joined[name] = joined[name].joined(column) if name in joined else column
    assert joined == columns_of(Path("all.jsonl"))
    fields = fields_of(joined)
    whole = parquet.read_table("all.parquet")
    again: list[dict[str, Any]] = []
    for name in ("some", "others"):
        own = fields_of(columns_of(Path(f"{name}.jsonl")))
        read = ((row, 1) for row in read_parquet(Path(f"{name}.parquet"), own))
        tables.write_parquet(read, Path("again.parquet"), fields)
        assert parquet.read_schema("again.parquet") == whole.schema
        again += read_parquet(Path("again.parquet"), fields)
    if not any("\ud800" <= sign <= "\udfff" for sign in json.dumps(some + others, ensure_ascii=False)):
        assert again == [{name: row.get(name) for name in joined} for row in some + others]


def test_fields_beyond_the_most_columns_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tables, "MOST_COLUMNS", 3)
    monkeypatch.setattr(tables, "_CELLS", 8)  # two rows at a time
    rows: list[dict[str, Any]] = [{"a": 1, f"k{row}": row, "other_fields": [row], "label": "x"} for row in range(7)]
    Path("rows.jsonl").write_text("".join(map(json_line, rows, [{}] * 7)))
    for name in ("out.parquet", "out.csv"):
        assert convert(Path("rows.jsonl"), Path(name), kept=["label", "score"])
    found = parquet.read_table("out.parquet").to_pylist()
    with Path("out.csv").open(newline="") as stream:
        assert [list(row.values())[:3] for row in csv.DictReader(stream)] == [
            ["1", str(row.get("k0", "")), "x"] for row in rows
        ]
    assert list(found[0]) == ["a", "k0", "label", "other_fields"]
    assert [row | json.loads(row.pop("other_fields")) for row in found] == [{"k0": None} | row for row in rows]
    fields = fields_of(columns_of(Path("rows.jsonl")), ["label"])
    assert list(read_parquet(Path("out.parquet"), fields)) == [{"k0": None} | row for row in rows]


def test_columns_of_one_kind_have_its_type(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"id": 2**63, "n": 1, "x": 1, "s": "a", "b": True, "none": None, "mixed": 1, "big": 2**53 + 1},
        {"id": 7, "n": -1, "x": 0.5, "s": "\ud800", "b": None, "none": None, "mixed": "1", "big": 0.5},
    ]
    schema = parquet.read_schema(written(rows, "out.parquet"))
    types = ["uint64", "int64", "double", "string", "bool", "null", "string", "string"]
    assert [str(kind) for kind in schema.types] == types


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *(("out", "jsonl"), ("out.jsonl", "jsonl"), ("out.NDJSON", "jsonl"), ("out.gz", "jsonl"), (".hidden", "jsonl")),
        *(("out.json", "json"), ("out.csv.gz", "csv"), ("a.b/out.TSV", "tsv"), ("out.parquet", "parquet")),
        *((f"out.{wrong}", None) for wrong in ("xlsx", "txt", "pq", "feather", "csv.bz2", "1", "parquet.gz", "txt.gz")),
    ],
)
def test_a_name_says_its_format_or_is_refused(name: str, found: str | None) -> None:
    if found == "parquet":
        pytest.importorskip("pyarrow")
    if found is not None:
        assert output_format(Path(name)) == found
        return
    with pytest.raises(InputError) as caught:
        output_format(name)
    says = "name it out.parquet, without .gz" if "parquet" in name else "expected one of .jsonl, .json, .csv, .tsv, .pa"
    assert says in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.csv.zst", "zstandard")])
def test_a_missing_package_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="not installed"):
        output_format(name)


def test_rows_appear_when_they_are_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_rows("out.csv.gz") as stream:
        stream.write('{"a": 1}\n')
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for name in ("out.csv.gz", "out", "out.json"):
        with open_rows(name) as stream:
            stream.write('{"a": "\ud800"}\n')
    assert gzip.decompress(Path("out.csv.gz").read_bytes()) == b"a\r\n\\ud800\r\n"
    assert Path("out").read_text() == '{"a": "\\ud800"}\n'
    assert [row.fields for row in read_records("out.json", Reading(columns=("a",)), pair=False) if hasattr(row, "text")]
    assert len(list(tmp_path.iterdir())) == 3
    with open_rows("/dev/null") as stream:
        stream.write("gone")
    with pytest.raises(InputError, match="unknown format"), open_rows("out.xlsx"):
        pass
