"""Files in and out: every format, every usual mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt.errors import InputError
from cascade_rt.io.readers import Reading, read_examples

_NOT_IN_CSV = "\0" if sys.version_info < (3, 11) else ""  # the csv module of Python 3.10 cannot write it


def read(path: Path, content: str | bytes, *, pair: bool = False, **options: Any) -> list[tuple[Any, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(row.text, row.fields) for row in read_examples(path, Reading(**options), pair=pair)]


def test_txt_has_a_text_a_line_and_empty_lines_are_texts(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", "one\n\ntwo\r\n\u2028 three\rstill three") == [
        ("one", {}),
        ("", {}),
        ("two", {}),
        ("\u2028 three\rstill three", {}),
    ]
    assert read(tmp_path / "a.txt", "a\tb\n", pair=True) == [(("a", "b"), {})]


def test_tsv_is_unquoted_and_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfsentence\tlabel\nhe said "no\t0\r\n\n'
    assert read(tmp_path / "a.tsv", content) == [('he said "no', {"sentence": 'he said "no', "label": "0"})]


def test_csv_is_quoted_and_fields_may_hold_lines_and_megabytes(tmp_path: Path) -> None:
    long = "x" * 200_000
    rows = read(tmp_path / "a.csv", f'id,text\r\n1,"a, ""b""\nc"\r\n2,{long}\r\n')
    assert rows == [('a, "b"\nc', {"id": "1", "text": 'a, "b"\nc'}), (long, {"id": "2", "text": long})]


def test_jsonl_keeps_values_of_any_type_and_skips_blank_lines(tmp_path: Path) -> None:
    content = '{"text": "a", "n": [1, null]}\n\n{"text": "b"}\n'
    assert read(tmp_path / "a.jsonl", content) == [
        ("a", {"text": "a", "n": [1, None]}),
        ("b", {"text": "b"}),
    ]


def test_parquet_is_read_like_the_others(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        arrow.table({"premise": ["a", "b"], "hypothesis": ["c", "d"], "n": [1, 2]}), tmp_path / "a.parquet"
    )
    rows = list(read_examples(tmp_path / "a.parquet", pair=True))
    assert [row.text for row in rows] == [("a", "c"), ("b", "d")]
    assert rows[1].fields == {"premise": "b", "hypothesis": "d", "n": 2}
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="not a readable parquet file"):
        list(read_examples(tmp_path / "b.parquet", pair=False))
    with parquet.ParquetWriter(tmp_path / "c.parquet", arrow.schema([("text", arrow.string())])):
        pass  # no row group
    assert not list(read_examples(tmp_path / "c.parquet", pair=False))


@pytest.mark.parametrize(
    "columns",
    ["text text_pair", "sentence1 sentence2", "premise hypothesis", "question sentence", "question1 question2"],
)
def test_the_usual_pair_columns_are_found(tmp_path: Path, columns: str) -> None:
    content = columns.replace(" ", ",") + "\nx,y\n"
    assert read(tmp_path / "a.csv", content, pair=True)[0][0] == ("x", "y")


def test_columns_can_be_named(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "q,text\nx,y\n", columns=("q",))[0][0] == "x"
    assert read(tmp_path / "a.csv", "q,a\nx,y\n", pair=True, columns=("q", "a"))[0][0] == ("x", "y")


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("a.csv", b"q,label\nx,0\n", {}, r"a.csv:2: found the columns 'q', 'label', expected a text in text, sentence"),
        ("a.csv", b"q\nx\n", {"columns": ("text",)}, r"a.csv:2: no column 'text'; found 'q'"),
        ("a.csv", b"text\nx\n", {"pair": True}, "expected a pair in text\\+text_pair"),
        (
            "a.csv",
            b"text\nx\n",
            {"pair": True, "columns": ("text",)},
            "`columns`: found .'text'., expected two names: of the text's column and of its pair's",
        ),
        (
            "a.csv",
            b"text,b\nx,y\n",
            {"columns": ("text", "b")},
            "`columns`: found .'text', 'b'., expected one name: texts here are single",
        ),
        ("a.csv", b"text,b\nx\n", {}, "a.csv:2: found 1 fields, expected 2"),
        ("a.csv", b'text,b\n"x,y\n', {}, "malformed CSV"),
        ("a.csv", b"text,text\nx,y\n", {}, "occurs twice"),
        ("a.tsv", b"text\tb\nx\ty\tz\n", {}, "a.tsv:2: found 3 fields, expected 2"),
        ("a.txt", b"one\n", {"pair": True}, "a.txt:1: found 1 text.*tab"),
        ("a.txt", b"a\tb\tc\n", {"pair": True}, "a.txt:1: found 3 text"),
        ("a.txt", b"fine\ncaf\xe9\n", {}, "found byte 0xe9 .*expected UTF-8"),
        ("a.csv", b"text\ncaf\xe9\n", {}, "found byte 0xe9 .*expected UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, "found byte 0xff .*expected UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', {}, "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, {}, "a.jsonl:1: not JSON"),
        ("a.jsonl", b'["text"]\n', {}, "found JSON of type list"),
        ("a.jsonl", b'{"text": 3}\n', {}, r"column 'text' holds 3 \(int\), expected a text"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', {}, "a.jsonl:2: no column 'text'; found 'txt'"),
        ("a.pdf", b"", {}, r"a\.pdf: unknown format '\.pdf'; expected \.jsonl, .*format"),
        ("a.txt", b"", {"format": "xml"}, "`format`: found 'xml', expected one of jsonl, json, csv"),
    ],
)
def test_each_mistake_has_its_own_line(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path / name, content, **options)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone.txt: no such file"):
        list(read_examples(tmp_path / "gone.txt", pair=False))
    (tmp_path / "dir.txt").mkdir()
    with pytest.raises(InputError, match="dir.txt: found no files"):
        list(read_examples(tmp_path / "dir.txt", pair=False))


def test_malformed_table_rows_can_be_skipped(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.tsv", "text\tlabel\na\t0\nbroken\nb\t1\n", skip_malformed=True)
    assert [text for text, _ in rows] == ["a", "b"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters=_NOT_IN_CSV)), max_size=20))
def test_any_unicode_passes_through_jsonl_and_csv(tmp_path: Path, texts: list[str]) -> None:
    import csv

    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    assert [text for text, _ in read(tmp_path / "a.jsonl", lines)] == texts
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["id", "text"], *([str(index), text] for index, text in enumerate(texts))])
    assert [row.text for row in read_examples(tmp_path / "a.csv", pair=False)] == texts
