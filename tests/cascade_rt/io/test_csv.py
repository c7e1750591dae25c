"""CSV as people write it: delimiters, spaces, empty columns, and quotes that are missing or stray."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io import csv_rows
from cascade_rt.io.readers import AS_USUAL, Example, Reading, Reject, read_examples, read_records

_QUOTING: list[Literal[0, 1]] = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL]
_PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def rows(content: str | bytes, reading: Reading = AS_USUAL) -> list[Example | Reject]:
    Path("a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_records("a.csv", reading, pair=False))


def answered(content: str, reading: Reading = AS_USUAL) -> list[str]:
    return [str(row.text) for row in rows(content, reading) if isinstance(row, Example)]


def rejected(content: str) -> list[tuple[str, str]]:
    return [(row.where, row.row) for row in rows(content) if isinstance(row, Reject)]


def table(lines: list[list[str]], quoting: Literal[0, 1] = csv.QUOTE_MINIMAL) -> list[str]:
    """Return each row as Python's own writer writes it."""
    written = []
    for line in lines:
        stream = io.StringIO()
        csv.writer(stream, quoting=quoting, lineterminator="\n").writerow(line)
        written.append(stream.getvalue())
    return written


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoted", [True, False])
def test_the_delimiter_is_found_in_the_header(tmp_path: Path, delimiter: str, quoted: bool) -> None:
    mark = '"' if quoted else ""
    lines = [("id", "text", "label"), ("1", "a good film. really", "pos"), ("2", "a bad one", "neg")]
    content = "".join(delimiter.join(f"{mark}{field}{mark}" for field in line) + "\r\n" for line in lines)
    first, second = rows(content)
    assert isinstance(first, Example)
    assert first.fields == {"id": "1", "text": "a good film. really", "label": "pos"}
    assert isinstance(second, Example)
    assert second.text == "a bad one"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("text;a, b\nx, y;1\n", "x, y"),
        ("id,text,a;b\n1,x; y,2\n", "x; y"),
        ('"text, of all";text\n1;"x; y"\n', "x; y"),
        ('sep=;\n"text";"a, b"\nx;1\n', "x"),
        ("\n\r\ntext,n\nx,1\n", "x"),
        ('"long\nname";text\n1;x\n', "x"),
        ("text\nx\n", "x"),
    ],
)
def test_of_several_delimiters_the_one_that_gives_the_columns_is_taken(tmp_path: Path, content: str, text: str) -> None:
    assert answered(content) == [text]


def test_a_delimiter_that_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    content = "text,a;text\nx,y;z\n"
    with pytest.raises(InputError, match=r"^a.csv:1: found commas and semicolons in the header.*name the delimiter$"):
        rows(content)
    assert answered(content, Reading(delimiter=",")) == ["x"]
    assert answered(content, Reading(delimiter=";")) == ["z"]
    assert answered("text:n\nx, y:1\n", Reading(delimiter=":")) == ["x, y"]
    named = Reading(columns=("q",))
    assert answered("q,a;b\nx,y;z\n", named) == ["x"]


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_a_delimiter_is_one_character(delimiter: str) -> None:
    with pytest.raises(InvalidOption, match="`delimiter`: found .*, expected one character"):
        Reading(delimiter=delimiter)


@pytest.mark.parametrize(("name", "reading"), [("a.txt", Reading(delimiter=";")), ("a.tsv", Reading(delimiter=";"))])
def test_a_delimiter_where_none_is_used_is_refused(tmp_path: Path, name: str, reading: Reading) -> None:
    Path(name).write_text("text\nx\n")
    with pytest.raises(InputError, match=r"found a delimiter for t.*, expected one for csv"):
        list(read_examples(name, reading, pair=False))
    with pytest.raises(InputError, match=r"found a column for txt"):
        list(read_examples(name, Reading("txt", ("text",)), pair=False))
    assert Reading("txt", ("text",), delimiter=";").of_texts(name) == Reading("txt")


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("text, label\nx, pos\n", {"text": "x", "label": "pos"}),
        ('text, "label"\n"x, y", "pos"\n', {"text": "x, y", "label": "pos"}),
        (" text ,label\nx, pos\n", {"text": "x", "label": " pos"}),
        ("text,label,,\nx,pos,,\n", {"text": "x", "label": "pos"}),
        ("text,label,,\nx,pos\n", {"text": "x", "label": "pos"}),
        (",text\n0,x\n", {"": "0", "text": "x"}),
    ],
)
def test_spaces_and_columns_without_a_name(tmp_path: Path, content: str, fields: dict[str, str]) -> None:
    (row,) = rows(content)
    assert isinstance(row, Example)
    assert row.fields == fields


def test_a_value_in_a_column_without_a_name_is_not_dropped(tmp_path: Path) -> None:
    (row,) = rows("text,label,\nx,pos,more\n")
    assert isinstance(row, Reject)
    assert "found a value in column 3, which has no name in the header" in row.reason
    with pytest.raises(InputError, match="found no names for the columns 1 and 2"):
        rows(",,text\n0,1,x\n")


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n", "\ufefftext,label\r\n", "text,label"])
def test_a_file_without_rows_has_none(tmp_path: Path, content: str) -> None:
    assert rows(content) == []


def test_blank_lines_between_rows_are_no_rows_and_line_numbers_stay(tmp_path: Path) -> None:
    assert answered("text,n\n\nx,1\n\r\n\ny,2\n\n") == ["x", "y"]
    assert rejected("text,n\n\nx,1\n\ny\n") == [("a.csv:5", "y")]


def test_nul_is_a_character_and_cr_alone_may_end_lines(tmp_path: Path) -> None:
    assert answered("text,n\na\0b,1\n") == ["a\0b"]
    assert answered('text,n\rx,1\r"y\rz",2\r') == ["x", "y\rz"]
    assert answered('text,n\r\nx,1\ny,2\r"z",3\r\n') == ["x", "y", "z"]


MANY = "".join(f"row {number},neg\n" for number in range(300))


@pytest.mark.parametrize(
    ("stray", "lines"),
    [
        ('"unclosed,pos\n', 1),
        ('unclosed,"pos\n', 1),
        ('"closed" twice",pos\n', 1),
        ('"closed and then"text,pos\n', 1),
        ('"unclosed, with a comma,pos\n', 1),
        ('"one,pos\n"two,pos\n', 2),
        ('"of two\nlines, and more,pos\n', 2),
        ('"closed",pos,"but not this\n', 1),
    ],
)
@pytest.mark.parametrize("after", ["", '"quoted, text",pos\n', '"two\nlines",pos\n', '"say ""hi""",pos\n'])
def test_a_quote_that_is_not_closed_costs_its_line_alone(tmp_path: Path, stray: str, lines: int, after: str) -> None:
    content = f"text,label\nfirst,pos\n{stray}{MANY}{after}last,neg\n"
    expected = ["first", *(f"row {number}" for number in range(300))]
    expected += [text for text, *_ in csv.reader(io.StringIO(after))] + ["last"]
    assert answered(content) == expected
    assert rejected(content) == [(f"a.csv:{3 + at}", line) for at, line in enumerate(stray.splitlines())][:lines]
    with pytest.raises(InputError, match=r"^a.csv:3: malformed CSV: .*; close it, or double it"):
        list(read_examples("a.csv", pair=False))


def test_a_quote_that_another_stray_one_closes_costs_its_line_alone(tmp_path: Path) -> None:
    content = f'text,label\n"a stray one,pos\n{MANY}a screen of 6",neg\nlast,pos\n'
    assert answered(content) == [*(f"row {number}" for number in range(300)), 'a screen of 6"', "last"]
    ((where, line),) = rejected(content)
    assert (where, line) == ("a.csv:2", '"a stray one,pos')


def test_a_quote_inside_a_field_is_a_character(tmp_path: Path) -> None:
    assert answered('text,label\na 5" disk,pos\nshe said "no",neg\n') == ['a 5" disk', 'she said "no"']


def test_a_record_is_not_looked_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "_LONGEST_RECORD", 20)
    content = f'text,label\n"not closed within 20 lines,pos\n{MANY}",neg\n'
    assert len(answered(content)) == 300


@_PROPERTY
@given(st.data())
def test_of_a_table_with_one_damaged_row_no_other_row_is_lost(tmp_path: Path, data: st.DataObject) -> None:
    """Texts begin with a letter: after a quote too many, one that begins with a delimiter can be taken for its end."""
    text = st.from_regex(r'\A[a-c][ab ,;"\n]{0,8}\Z')
    names = data.draw(st.sampled_from([["id", "text"], ["text", "label"], ["id", "text", "label"]]))
    lines: list[list[str]] = [
        [data.draw(text) if name == "text" else f"{name}{at}" for name in names] for at in range(6)
    ]
    written = table(lines, data.draw(st.sampled_from(_QUOTING)))
    damaged = data.draw(st.integers(0, 5))
    row, quotes = written[damaged], [at for at, character in enumerate(written[damaged]) if character == '"']
    if data.draw(st.booleans()) and quotes:
        at = data.draw(st.sampled_from(quotes))
        written[damaged] = row[:at] + row[at + 1 :]
    else:
        at = data.draw(st.integers(0, len(row) - 1))
        written[damaged] = row[:at] + '"' + row[at:]
    found = rows(",".join(names) + "\n" + "".join(written))
    kept = [list(row.fields.values()) for row in found if isinstance(row, Example)]
    refused = [row.row for row in found if isinstance(row, Reject)]
    for at, line in enumerate(lines):
        assert at == damaged or line in kept or set(written[at].splitlines()) <= {*refused, ""}
    with_them = "\n".join([*(field for line in kept for field in line), *refused])
    words = written[damaged].replace('"', " ").replace(",", " ").split()
    assert all(word in with_them for word in words)


@_PROPERTY
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", " ", ", ", ",\n", "\n", '"'])), min_size=1), st.sampled_from(",;\t|")
)
def test_what_is_written_in_the_usual_way_is_read_back(tmp_path: Path, texts: list[list[str]], delimiter: str) -> None:
    """A space or a line end follows each comma, as in prose: lines with others can look like swallowed rows."""
    stream = io.StringIO()
    lines = [[str(at), "".join(text).replace(",", delimiter)] for at, text in enumerate(texts)]
    csv.writer(stream, delimiter=delimiter).writerows([["id", "text"], *lines])
    assert [list(row.fields.values()) for row in rows(stream.getvalue()) if isinstance(row, Example)] == lines


def test_a_text_of_several_lines_with_commas_is_one_text(tmp_path: Path) -> None:
    letter = "Dear all,\n\nthe price is 1,000 EUR, as agreed,\nsee page 6, and page 7\n1,2\nYours, Bob"
    content = "text,label\n" + "".join(table([[letter, "pos"], ["short", "neg"]]))
    assert answered(content) == [letter, "short"]


@pytest.mark.parametrize("columns", ["text,label", "label,text", "id,text,label"])
@pytest.mark.parametrize("lines", [2, 5])
def test_a_text_whose_lines_look_like_rows_is_one_text(columns: str, lines: int) -> None:
    names = columns.split(",")
    prices = "\n".join(",".join(["egg"] * len(names)) for _ in range(lines))
    cells = {"text": prices, "label": "pos", "id": "7"}
    stream = io.StringIO()
    csv.writer(stream).writerows([names, [cells[name] for name in names]])
    assert answered(stream.getvalue()) == [prices]


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-8-sig", "utf-8"), ("utf-16", None), ("utf-16", "utf-16"), ("utf-16-le", None), ("utf-16-be", None),
        ("utf-32", None), ("utf-16-le", "utf-16-le"), ("cp1252", "cp1252"),
    ],
)  # fmt: skip
def test_encodings_are_known_by_their_first_bytes(tmp_path: Path, encoding: str, named: str | None) -> None:
    (row,) = rows('text,n\r\n"na\u00efve, caf\u00e9",1\r\n'.encode(encoding), Reading(encoding=named))
    assert isinstance(row, Example)
    assert row.fields == {"text": "na\u00efve, caf\u00e9", "n": "1"}


@pytest.mark.parametrize("encoding", ["hex", "utf-9", "a\0b"])
def test_what_is_no_encoding_of_text_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(InvalidOption, match="`encoding`"):
        rows("text\nx\n", Reading(encoding=encoding))


@pytest.mark.parametrize(("name", "content"), [("a.txt", b"one\rtwo\r"), ("a.tsv", b"text\tn\rone\t1\rtwo\t2")])
def test_cr_alone_ends_the_lines_of_a_file_that_has_nothing_else(tmp_path: Path, name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert [row.text for row in read_examples(name, pair=False)] == ["one", "two"]
