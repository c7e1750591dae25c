"""Lines of JSON in the format that a file's name asks for: JSON lines, one JSON array, or a table; compressed or not.

The conversion runs after all the work, so it never fails on what a row holds: the type of a column is decided by all of
its values, and where no type holds each of them exactly, they are written as JSON text.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..errors import InputError
from .compression import check_compression, ending, without_compression, write_binary
from .remote import import_parquet, row_batches
from .writers import beside, is_stream, open_output, output_path

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
"""Formats of rows that are written."""

MOST_COLUMNS = 4096
"""Limit of a table; further fields go into one column, as a JSON object."""

_BY_ENDING = {**{name: name for name in FORMATS}, "": "jsonl", "ndjson": "jsonl"}
_OTHERS = "other_fields"
_ROWS, _CELLS, _CHARACTERS = 10_000, 2**21, 2**26  # converted at a time, at most
_EXACT = 2**53  # a float holds every whole number up to here
_BREAKS = ("\t", "\n", "\r")  # a tsv file cannot hold them within a field

_JSON = "json"
_WRITING = "writing parquet"


class Field(NamedTuple):
    """A column of a table."""

    source: str | None
    """The rows' name for it; None for the fields that have no column of their own."""
    name: str
    kind: str
    """bool, int64, uint64, float64, string, null, or json: JSON text."""


@dataclass
class Column:
    """The basis for the type of a column: the types of its values, and the range of its whole numbers."""

    types: set[str]
    least: int = 0
    most: int = 0

    def add(self, value: Any) -> None:
        """Take a value into account."""
        if value is None:
            return
        self.types.add(type(value).__name__)
        if isinstance(value, int):
            self.least, self.most = min(self.least, value), max(self.most, value)

    def joined(self, other: Column) -> Column:
        """Return what decides the type of the values of both."""
        return Column(self.types | other.types, min(self.least, other.least), max(self.most, other.most))

    def to_json(self) -> list[Any]:
        """Return it as plain values for JSON."""
        return [sorted(self.types), self.least, self.most]

    @classmethod
    def of_json(cls, values: Sequence[Any]) -> Column:
        """Return what `to_json` wrote."""
        types, least, most = values
        return cls(set(types), least, most)

    @property
    def kind(self) -> str:
        """The type that holds every value exactly; "json" where none does."""
        if self.types == {"int"}:
            if self.least >= -(2**63) and self.most < 2**63:
                return "int64"
            return "uint64" if self.least >= 0 and self.most < 2**64 else _JSON
        if {"float"} <= self.types <= {"int", "float"} and max(-self.least, self.most) <= _EXACT:
            return "float64"
        simple = {frozenset[str](): "null", frozenset({"bool"}): "bool", frozenset({"str"}): "string"}
        return simple.get(frozenset(self.types), _JSON)


def output_format(target: str | Path) -> str:
    """Return the format of a file to write, by its name, one of FORMATS; a name without an ending is of JSON lines.

    Raises InputError for another ending, and MissingExtraError where the format or its compression needs a package that
    is not installed: call it before the work.
    """
    plain = without_compression(target)
    found = _BY_ENDING.get(ending(target))
    if found is None:
        raise InputError(
            f"cannot write {target}: unknown format {plain.suffix!r}, expected one of "
            f"{', '.join('.' + known for known in FORMATS)}, or no ending for JSON lines"
        )
    if found == "parquet":
        if plain != Path(target):
            raise InputError(
                f"cannot write {target}: parquet is compressed inside the file; name it {plain.name}, without "
                f"{Path(target).suffix}"
            )
        import_parquet(_WRITING)
    check_compression(target)
    return found


def columns_of(lines: Path) -> dict[str, Column]:
    """Return the columns of all rows, in the order of their first appearance."""
    found: dict[str, Column] = {}
    for row, _ in _rows(lines):
        for name, value in row.items():
            found.setdefault(name, Column(set())).add(value)
    return found


def fields_of(columns: Mapping[str, Column], kept: Collection[str] = ()) -> list[Field]:
    """Return the columns of a table of such rows; those in `kept` have one whatever the number of the others.

    Half a surrogate pair, which UTF-8 cannot encode, is written as its escape; where that is the name of another
    column, an underscore is added.
    """
    own, room = list(columns), MOST_COLUMNS - sum(name in columns for name in kept)
    if len(own) > MOST_COLUMNS:
        others = [name for name in own if name not in kept]
        rest = set(others[room:])
        own = [name for name in own if name not in rest]
    taken = {name for name in own if _encodable(name) == name}

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    found = [Field(name, name if name in taken else free(_encodable(name)), columns[name].kind) for name in own]
    return found if len(own) == len(columns) else [*found, Field(None, free(_OTHERS), _JSON)]


@contextmanager
def open_rows(target: str | Path) -> Iterator[TextIO]:
    """Open a file for lines of JSON, which appears when it is complete, in the format that its name says."""
    if is_stream(target):  # takes the lines as they are
        with open_output(target) as stream:
            yield stream
        return
    path = output_path(target)
    output_format(target)
    lines, fresh = (beside(path, part) for part in ("lines", "fresh"))
    try:
        with lines.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            yield stream
        (fresh if convert(lines, fresh) else lines).replace(path)
    finally:
        lines.unlink(missing_ok=True)
        fresh.unlink(missing_ok=True)


def convert(
    lines: Path, target: Path, *, kept: Collection[str] = (), columns: Mapping[str, Column] | None = None
) -> bool:
    """Write lines of JSON in the format that the name of `target` says; return False where they have it already.

    `kept`: as for `fields_of`. `columns`: those of the table, where more rows than these decide; None for these alone.
    """
    kind = output_format(target)
    if kind == "jsonl" and without_compression(target) == target:
        return False
    if kind == "parquet":
        write_parquet(_rows(lines), target, fields_of(columns or columns_of(lines), kept))
        return True
    with write_binary(target) as stream:
        if kind == "jsonl":
            with lines.open("rb") as source:
                shutil.copyfileobj(source, stream)
        elif kind == "json":
            _write_array(lines, stream.write)
        else:
            _write_text(_rows(lines), stream.write, kind, fields_of(columns_of(lines), kept))
    return True


def write_parquet(rows: Iterable[tuple[dict[str, Any], int]], target: Path, fields: Sequence[Field]) -> None:
    """Write rows, each with about its number of characters, as parquet."""
    arrow, parquet = import_parquet(_WRITING)
    kinds = {_JSON: arrow.string(), "string": arrow.string(), "null": arrow.null(), "bool": arrow.bool_()}
    kinds |= {"int64": arrow.int64(), "uint64": arrow.uint64(), "float64": arrow.float64()}
    schema = arrow.schema([(field.name, kinds[field.kind]) for field in fields])
    most = max(1, min(_ROWS, _CELLS // max(1, len(fields))))
    with parquet.ParquetWriter(target, schema) as writer:
        some: list[list[Any]] = []
        characters = 0

        def write() -> None:
            columns = zip(*some, strict=True) if some else [()] * len(fields)
            arrays = [arrow.array(column, type) for column, type in zip(columns, schema.types, strict=True)]
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))

        for row, length in rows:
            some.append([_typed(value, field.kind) for field, value in zip(fields, _values(row, fields), strict=True)])
            characters += length
            if len(some) == most or characters > _CHARACTERS:
                write()
                some, characters = [], 0
        if some or not fields:
            write()


def read_parquet(source: Path, fields: Sequence[Field]) -> Iterator[dict[str, Any]]:
    """Yield the rows that were written with these fields."""
    _, parquet = import_parquet(_WRITING)
    with parquet.ParquetFile(source) as file:
        for batch in row_batches(file, max(1, min(_ROWS, _CELLS // max(1, len(fields))))):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                row: dict[str, Any] = {}
                for field, value in zip(fields, values, strict=True):
                    found = json.loads(value) if field.kind == _JSON and value is not None else value
                    row |= (found or {}) if field.source is None else {field.source: found}
                yield row


def _write_text(
    rows: Iterable[tuple[dict[str, Any], int]], write: Callable[[bytes], object], kind: str, fields: Sequence[Field]
) -> None:
    """Write a table as csv, or as tsv without quoting; each value by itself, null as nothing."""
    text = io.StringIO(newline="")
    put = csv.writer(text, lineterminator="\r\n").writerow if kind == "csv" else _tab_separated(text)
    null = "\\x00" if kind == "csv" and sys.version_info < (3, 11) else "\x00"  # whose csv module refuses the character
    names = [field.name for field in fields]
    for row in chain([names], (_values(row, fields) for row, _ in rows)) if names else ():
        put([_cell(value).replace("\x00", null) for value in row])
        if text.tell() > 2**20:
            write(text.getvalue().encode("utf-8", "backslashreplace"))
            text.seek(0)
            text.truncate()
    write(text.getvalue().encode("utf-8", "backslashreplace"))


def _tab_separated(text: io.StringIO) -> Callable[[list[str]], object]:
    def put(cells: list[str]) -> None:
        whole = (json.dumps(cell) if any(sign in cell for sign in _BREAKS) else cell for cell in cells)
        text.write("\t".join(whole) + "\n")

    return put


def _write_array(lines: Path, write: Callable[[bytes], object]) -> None:
    before = b"[\n"
    with lines.open("rb") as stream:
        for line in stream:
            write(before + line.rstrip(b"\n"))
            before = b",\n"
    write(b"[]\n" if before == b"[\n" else b"\n]\n")


def _rows(lines: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row, and the length of its line."""
    with lines.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield json.loads(line), len(line)


def _values(row: Mapping[str, Any], fields: Sequence[Field]) -> list[Any]:
    """Return a row's values in the order of the fields; those that have no field of their own in one object."""
    found = [None if field.source is None else row.get(field.source) for field in fields]
    if fields and fields[-1].source is None:
        own = {field.source for field in fields}
        found[-1] = {name: value for name, value in row.items() if name not in own} or None
    return found


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _typed(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == _JSON:
        return json.dumps(value)
    if kind == "string":
        return _encodable(value)
    return float(value) if kind == "float64" else value


def _encodable(text: str) -> str:
    """Return a text with half a surrogate pair, which UTF-8 cannot encode, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()
