"""Empty texts are texts, missing ones are not, in every format: the table in docs/reference/files.md."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cascade_rt import CascadeRuntime, TextError
from cascade_rt.io.readers import Reject, read_records

BLANK = ["", " ", "\u200b"]


def read(name: str, content: str | bytes, *, pair: bool = False) -> list[Any]:
    """Return the texts, and None for each row that cannot be used."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [None if isinstance(record, Reject) else record.text for record in read_records(name, pair=pair)]


def test_jsonl_and_json() -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in BLANK]
    rows += [{"text": None}, {"text": float("nan")}, {"text": 1}, {"text": ["a"]}, {"text": {}}, {"id": 1}]
    assert read("a.json", json.dumps(rows)) == [*BLANK, *[None] * 6]
    assert read("a.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n \n") == [*BLANK, *[None] * 6]


def test_tables() -> None:
    assert read("a.csv", 'id,text\n1,\n\n2," "\n3,""\n4\n') == ["", " ", "", None]
    assert read("a.csv", 'text\n""\n\na\n') == ["", "a"]
    assert read("a.tsv", "id\ttext\n1\t\n\n2\t \n3\n") == ["", " ", None]
    assert read("a.tsv", "text\n\na\n") == ["", "a"]


def test_txt_and_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("a.txt", "a\n\n \nb\n") == ["a", "", " ", "b"]
    assert read("a.txt", "a\t\n\n\tb\n", pair=True) == [("a", ""), None, ("", "b")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\nb")))
    records: list[Any] = list(read_records("-", pair=False))
    assert [record.text for record in records] == ["a", "", "b"]


def test_parquet() -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["", " ", None]}), "a.parquet")
    parquet.write_table(arrow.table({"text": [1.5, float("nan"), None]}), "b.parquet")
    assert read("a.parquet", Path("a.parquet").read_bytes()) == ["", " ", None]
    assert read("b.parquet", Path("b.parquet").read_bytes()) == [None] * 3
    (*_, last) = read_records("a.parquet", pair=False)
    assert isinstance(last, Reject)
    assert last.reason == "column 'text' holds null, expected a text; fill it, or leave the row out"


def test_python(bundle: Path, pair_bundle: Path) -> None:
    with CascadeRuntime(bundle, threads=1) as runtime:
        assert len(runtime.predict([*BLANK, "a"])) == 4
        assert runtime.predict([]) == []
        for missing in (None, float("nan"), 1, b"a"):
            with pytest.raises(TextError, match="text 1: found .*, expected a text"):
                runtime.predict(["a", missing])  # type: ignore[list-item]
    with CascadeRuntime(pair_bundle, threads=1) as runtime:
        assert len(runtime.predict([("", ""), ("a", " ")])) == 2
        with pytest.raises(TextError, match="text 0"):
            runtime.predict([("a", None)])  # type: ignore[list-item]
