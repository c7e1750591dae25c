"""Read texts from jsonl, csv, tsv, txt and parquet, one record at a time.

Everything streams, so a file of any size is read in constant memory. TSV is read as GLUE writes it: a header line and
no quoting. CSV is quoted in the usual way. TXT holds one text per line, for pairs two texts with a tab between them.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError, InvalidOption, MissingExtraError
from ..types import Text

FORMATS = ("jsonl", "csv", "tsv", "txt", "parquet")

_USUAL_COLUMNS: dict[bool, tuple[tuple[str, ...], ...]] = {
    False: (("text",), ("sentence",)),
    True: (
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question", "sentence"),
        ("question1", "question2"),
        ("#1 String", "#2 String"),
    ),
}


@dataclass(frozen=True)
class Example:
    """One record of a file: its text (or pair), its own fields, and its position ("file:line")."""

    text: Text
    fields: dict[str, Any]
    where: str

    def field(self, column: str) -> str:
        """Return a field as text, for instance a label; raise InputError if the record does not have it."""
        return _field(self.fields, column, self.where)


def read_examples(
    source: str | Path,
    *,
    pair: bool,
    format: str | None = None,
    columns: tuple[str, ...] | None = None,
    skip_malformed: bool = False,
) -> Iterator[Example]:
    """Yield the examples of a file, or of standard input when `source` is "-".

    `format`: one of FORMATS, None for that of the file's extension (txt for standard input). `columns`: name of the
    text's column, or of the pair's two; None tries the usual names ("text", "sentence", "sentence1"/"sentence2",
    "premise"/"hypothesis", ...). `skip_malformed` skips table rows with a wrong number of fields (QQP's official file
    has some). Raises InputError for a missing file, a missing column, a malformed line or bytes that are not UTF-8.
    """
    expected = 2 if pair else 1
    if columns is not None and len(columns) != expected:
        wanted = "two names: of the text's column and of its pair's" if pair else "one name: texts here are single"
        raise InvalidOption("columns", list(columns), wanted)
    kind = format or _format_of(source)
    if kind not in FORMATS:
        raise InvalidOption("format", kind, f"one of {', '.join(FORMATS)}")
    name = "standard input" if str(source) == "-" else str(source)
    if kind == "txt":
        for number, line in _read_lines(source, name):
            where = f"{name}:{number}"
            yield Example(_text_line(line, pair, where), {}, where)
        return
    for number, fields in _read_fields(source, name, kind, skip_malformed):
        where = f"{name}:{number}"
        columns = columns or _find_columns(fields, pair, where)
        texts = tuple(_text_field(fields, column, where) for column in columns)
        yield Example((texts[0], texts[1]) if pair else texts[0], fields, where)


def _format_of(source: str | Path) -> str:
    if str(source) == "-":
        return "txt"
    ending = Path(source).suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise InputError(
            f"{source}: unknown format {Path(source).suffix!r}; "
            f"expected {', '.join('.' + known for known in FORMATS)}, or a `format`"
        )
    return ending


def _read_fields(
    source: str | Path, name: str, kind: str, skip_malformed: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, fields) of every record of a jsonl, csv, tsv or parquet file."""
    if kind == "parquet":
        yield from _read_parquet(source, name)
    elif kind == "jsonl":
        for number, line in _read_lines(source, name):
            if line.strip():
                yield number, _json_object(line, f"{name}:{number}")
    elif kind == "tsv":
        rows = ((number, line.split("\t")) for number, line in _read_lines(source, name))
        yield from _read_table(rows, name, skip_malformed)
    else:
        yield from _read_table(_csv_rows(source, name), name, skip_malformed)


def _read_table(
    rows: Iterator[tuple[int, list[str]]], name: str, skip_malformed: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    _, header = next(rows, (0, []))
    _check_header(header, name)
    for number, row in rows:
        if len(row) == len(header):
            yield number, dict(zip(header, row, strict=True))
        elif not skip_malformed and row not in ([], [""]):
            raise InputError(
                f"{name}:{number}: found {len(row)} fields, expected {len(header)} as in the header; correct that line"
            )


def _check_header(header: list[str], name: str) -> None:
    if len(set(header)) != len(header):
        raise InputError(f"{name}: a column name occurs twice in {_listed(header)}; rename one")


def _csv_rows(source: str | Path, name: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    with _open_input(source, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise _not_utf8(name, reader.line_num + 1, error) from error
        except csv.Error as error:
            raise InputError(f"{name}:{reader.line_num}: malformed CSV ({error}); quote the fields") from error


def _read_lines(source: str | Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line without its end); only LF and CRLF end a line, as other tools count them."""
    number = 0
    with _open_input(source, newline="\n") as stream:
        try:
            for number, line in enumerate(stream, 1):
                yield number, line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, number + 1, error) from error


def _open_input(source: str | Path, newline: str) -> TextIO:
    if str(source) == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=newline)
    try:
        return Path(source).open(encoding="utf-8-sig", newline=newline)
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file; check the path") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error


def _read_parquet(source: str | Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as arrow  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("reading parquet", "parquet", error) from error
    if not Path(source).is_file():
        raise InputError(f"{name}: no such file; parquet is read from a file, not from standard input")
    try:
        with parquet.ParquetFile(source) as file:
            _check_header(file.schema_arrow.names, name)
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (arrow.ArrowException, ValueError, OverflowError, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file ({error})") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected one JSON object per line") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}: found JSON of type {type(fields).__name__}, expected an object with named fields")
    return fields


def _text_line(line: str, pair: bool, where: str) -> Text:
    texts = line.split("\t")
    if not pair:
        if len(texts) == 2 and all(text.strip() for text in texts):
            raise InputError(
                f"{where}: found a pair (two texts with a tab between them), expected single texts; "
                "for texts with tabs use jsonl"
            )
        return line
    if len(texts) != 2:
        raise InputError(f"{where}: found {len(texts)} text(s), expected a pair: two texts with a tab between them")
    return texts[0], texts[1]


def _find_columns(fields: dict[str, Any], pair: bool, where: str) -> tuple[str, ...]:
    for columns in _USUAL_COLUMNS[True]:
        if all(column in fields for column in columns):
            if pair:
                return columns
            raise InputError(
                f"{where}: found pairs ({' and '.join(map(repr, columns))}), expected single texts; "
                "name the column of the text if one of them is meant"
            )
    for columns in _USUAL_COLUMNS[pair]:
        if all(column in fields for column in columns):
            return columns
    wanted = ", ".join("+".join(columns) for columns in _USUAL_COLUMNS[pair])
    raise InputError(
        f"{where}: found the columns {_listed(fields)}, expected {'a pair' if pair else 'a text'} in {wanted}; "
        f"name the column{'s' if pair else ''} of the text{'s' if pair else ''}"
    )


def _field(fields: dict[str, Any], column: str, where: str) -> str:
    if column not in fields:
        raise InputError(f"{where}: no column {column!r}; found {_listed(fields)}; name one of these")
    return str(fields[column])


def _text_field(fields: dict[str, Any], column: str, where: str) -> str:
    if isinstance(text := fields.get(column), str):
        return text
    found = _field(fields, column, where)
    raise InputError(f"{where}: column {column!r} holds {found} ({type(text).__name__}), expected a text")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def _not_utf8(name: str, line: int, error: UnicodeDecodeError) -> InputError:
    byte = error.object[error.start]
    return InputError(f"{name}: found byte 0x{byte:02x} at or after line {line}, expected UTF-8; convert the file")
