"""Read texts from jsonl, json, csv, tsv, txt and parquet, one record at a time; compressed too, and whole folders.

Everything but json, an array of objects, streams, so a file of any size is read in constant memory. TSV is read as GLUE
writes it: a header line and no quoting. CSV is quoted in the usual way, with commas, semicolons, tabs or bars between
the fields. TXT holds one text per line, for pairs two texts with a tab between them.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CascadeError, InputError, InvalidOption
from ..types import Text
from .compression import ending
from .csv_rows import Lines, read_header, read_rows, stripped
from .fields import is_list, label, labels
from .lines import Line, Record, read_lines, source_name
from .remote import files_behind, import_parquet, is_uri, located, row_batches

FORMATS = ("jsonl", "json", "csv", "tsv", "txt", "parquet")
_BY_ENDING = {**{name: name for name in FORMATS}, "ndjson": "jsonl"}
_TABLES = ("csv", "tsv", "parquet")
LABEL, LABELS = "label", "labels"
"""The usual column of the labels."""

_FLAGS = {"1": True, "true": True, "0": False, "false": False, "": False}
_ARRAY = "expected an array of objects; for one object per line name the format jsonl"
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
class Reading:
    """Settings for reading files of texts."""

    format: str | None = None
    """One of FORMATS; None for that of the file's extension, txt for standard input."""
    columns: tuple[str, ...] | None = None
    """Name of the text's column, or of the pair's two; None for the usual names ("text", "sentence", "premise" and
    "hypothesis", ...)."""
    label_column: str | None = None
    """Name of the label's column, for readers of labels; None for LABEL."""
    label_separator: str | None = None
    """With several labels in one column: what stands between them; None for a comma."""
    label_columns: tuple[str, ...] | None = None
    """With several labels: the columns of the labels, each 1 where a text has its label, else 0."""
    encoding: str | None = None
    """None for UTF-8, or what a byte order mark says."""
    delimiter: str | None = None
    """The character between the fields of csv; None for the one that is in the header."""
    skip_malformed: bool = False
    """Skip table rows with a wrong number of fields (QQP's official file has some)."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for what cannot be."""
        if self.format is not None and self.format not in FORMATS:
            raise InvalidOption("format", self.format, f"one of {', '.join(FORMATS)}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise InvalidOption("delimiter", self.delimiter, "one character that is no quote and no line end")
        if self.label_separator == "":
            raise InvalidOption("label_separator", self.label_separator, "what stands between labels")
        if self.label_columns is not None:
            if self.label_column is not None or self.label_separator is not None:
                raise InputError("found a column for each label and one column of all, expected either")
            if len(set(self.label_columns)) < 2 or len(set(self.label_columns)) < len(self.label_columns):
                raise InvalidOption("label_columns", list(self.label_columns), "two or more different names of columns")

    def label_of(self, example: Example) -> str:
        """Return the label of an example; raise InputError if it has none."""
        return example.field(self.label_column or LABEL)

    def labels_of(self, example: Example) -> list[str]:
        """Return all labels of an example, by default in the column "labels" or "label"; errors as of `labels`."""
        if self.label_columns is not None:
            return [column for column in self.label_columns if example.flag(column)]
        return example.labels(self._labels_column(example), self.label_separator or ",")

    def has_labels(self, example: Example, *, several: bool) -> bool:
        """Return whether an example has the column of its label, or those of several labels."""
        one = self.label_column or LABEL
        wanted = self.label_columns or (self._labels_column(example) if several else one,)
        return set(wanted) <= example.fields.keys()

    def lists_labels(self, example: Example) -> bool:
        """Return whether these settings, or the example itself, say that a text can have several labels."""
        named = self.label_columns is not None or self.label_separator is not None
        return named or is_list(example.fields.get(self._labels_column(example)))

    def _labels_column(self, example: Example) -> str:
        return self.label_column or (LABELS if LABELS in example.fields else LABEL)

    def of_texts(self, source: str | Path) -> Reading:
        """Return how to read one of several files; for txt, which has no columns, without what is for tables."""
        plain = (self.format or ending(source)) == "txt"
        return replace(self, columns=None, delimiter=None) if plain else self


AS_USUAL = Reading()


@dataclass(frozen=True)
class Example:
    """One record of a file: its text (or pair), its own fields, and its position ("file:line")."""

    text: Text
    fields: dict[str, Any]
    where: str

    @property
    def content(self) -> bytes:
        """The content of the record, to tell whether the file has changed."""
        return repr((self.text, self.fields)).encode("utf-8", "surrogatepass")

    def field(self, column: str) -> str:
        """Return a field as a label (see `fields.label`).

        Raises InputError if the record has none, an empty one, or several in one field.
        """
        _check_column(self.fields, column, self.where)
        value = self.fields[column]
        try:
            found = label(value)
        except TypeError as error:
            raise InputError(
                f"{self.where}: column {column!r} holds {error} ({_shortened(value)}), expected one label; keep one of "
                "them, or, where texts have several, write those of every text as a list"
            ) from error
        if not found:
            raise InputError(
                f"{self.where}: column {column!r} is empty, expected a value; fill it, or leave the row out"
            )
        return found

    def flag(self, column: str) -> bool:
        """Return whether a field is 1 or true; raise InputError unless it is that, or 0, false or empty."""
        _check_column(self.fields, column, self.where)
        written = label(self.fields[column])
        if written.lower() not in _FLAGS:
            raise InputError(
                f"{self.where}: column {column!r} holds {written[:40]!r}, expected 1 where the text has "
                "this label, else 0"
            )
        return _FLAGS[written.lower()]

    def labels(self, column: str, separator: str = ",") -> list[str]:
        """Return all labels of a field, possibly none; raise InputError if the record has no such field."""
        _check_column(self.fields, column, self.where)
        try:
            return labels(self.fields[column], separator)
        except TypeError as error:
            raise InputError(f"{self.where}: column {column!r} holds {error}, expected a list of labels") from error


@dataclass(frozen=True)
class Reject:
    """A record that cannot be used."""

    where: str
    """Its position ("file:line")."""
    reason: str
    row: str
    """As the file has it; as JSON for parquet and json."""
    error: CascadeError
    """The error that `read_examples` raises for it."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Its fields, where they are known."""

    @property
    def content(self) -> bytes:
        """The content of the record, to tell whether the file has changed."""
        return repr((self.row,)).encode("utf-8", "surrogatepass")


def read_examples(source: str | Path, reading: Reading = AS_USUAL, *, pair: bool) -> Iterator[Example]:
    """Yield the examples of a file, of all files of a folder or a pattern, or of standard input when `source` is "-".

    `source`: a path, or a URI such as "s3://bucket/folder", which needs pyarrow. `pair`: whether texts are pairs.
    Raises InputError for a file or a record that cannot be used.
    """
    for record in read_records(source, reading, pair=pair):
        if isinstance(record, Reject):
            raise record.error
        yield record


def read_records(source: str | Path, reading: Reading = AS_USUAL, *, pair: bool) -> Iterator[Example | Reject]:
    """Yield the records of a file, those that cannot be used too; arguments as for `read_examples`.

    Raises InputError for a file that cannot be read, a wrong header, and a table without the columns.
    """
    expected = 2 if pair else 1
    columns = reading.columns
    if columns is not None and len(columns) != expected:
        wanted = "two names: of the text's column and of its pair's" if pair else "one name: texts here are single"
        raise InvalidOption("columns", list(columns), wanted)
    for file in input_files(source):
        kind = reading.format or _format_of(file)
        _check_used(reading, kind, source_name(file))
        yield from _checked(_read_file(file, kind, reading), source_name(file), kind, pair, columns)


def _check_used(reading: Reading, kind: str, name: str) -> None:
    """Raise InputError for settings of tables where a file is none."""
    if kind == "txt" and reading.columns:
        raise InputError(f"{name}: found a column for txt, which has none; name the format if the file has columns")
    if reading.delimiter and (kind == "txt" or (kind == "tsv" and reading.delimiter != "\t")):
        raise InputError(f"{name}: found a delimiter for {kind}, expected one for csv; name the format")


def _checked(
    records: Iterator[Record], name: str, kind: str, pair: bool, columns: tuple[str, ...] | None
) -> Iterator[Example | Reject]:
    """Turn the records of one file into examples, or say why they cannot be."""
    text: Text
    fields: dict[str, Any]
    for record in records:
        where = f"{name}:{record.number}"
        if kind in _TABLES and record.problem is None:
            columns = columns or _find_columns(record.content, pair, where)
            for column in columns:
                _check_column(record.content, column, where)
        try:
            if record.problem:
                raise InputError(f"{where}: {record.problem}") from record.cause
            if kind == "txt":
                text, fields = _text_line(record.content, pair, where), {}
            else:
                fields = _json_object(record.content, where) if kind == "jsonl" else _object(record.content, where)
                columns = columns or _find_columns(fields, pair, where)
                texts = tuple(_text_field(fields, column, where) for column in columns)
                text = (texts[0], texts[1]) if pair else texts[0]
        except InputError as error:
            row = json.dumps(record.content, default=str) if record.row is None else record.row
            yield Reject(where, str(error).removeprefix(f"{where}: "), row, error)
        else:
            yield Example(text, fields, where)


def input_files(source: str | Path) -> Sequence[str | Path]:
    """Return the files of a folder or a pattern, also behind a URI, in the order of their names; one file as it is.

    Of a folder: those whose ending is known, without hidden ones. Raises InputError where there are none.
    """
    path = Path(source)
    found: list[str] | list[Path]
    if is_uri(source):
        behind = files_behind(str(source))
        if behind is None:
            return [source]
        found = [file for file in behind if ending(file) in _BY_ENDING]
    elif path.is_dir():
        found = sorted(file for file in path.iterdir() if ending(file) in _BY_ENDING and not file.name.startswith("."))
    elif glob.has_magic(str(source)) and not path.exists():
        matching = map(Path, glob.glob(str(source), recursive=True))  # noqa: PTH207 - absolute patterns too
        if not (found := sorted(file for file in matching if not file.is_dir())):
            raise InputError(f"{source}: no such file, and as a pattern it found no files; check the path")
    else:
        return [source]
    if not found:
        raise InputError(f"{source}: found no files; expected some of {', '.join('.' + known for known in FORMATS)}")
    return found


def _format_of(source: str | Path) -> str:
    if str(source) == "-":
        return "txt"
    written = ending(source)
    if written in _BY_ENDING:
        return _BY_ENDING[written]
    if not is_uri(source) and not Path(source).exists():
        raise InputError(f"{source}: no such file; check the path")
    raise InputError(
        f"{source}: unknown format {f'.{written}' if written else ''!r}; "
        f"expected {', '.join('.' + known for known in FORMATS)}, or the name of its format"
    )


def _read_file(source: str | Path, kind: str, reading: Reading) -> Iterator[Record]:
    name = source_name(source)
    if kind == "parquet":
        yield from _read_parquet(source, name)
    elif kind == "json":
        yield from _read_array(source, reading.encoding)
    elif kind == "csv":
        yield from _read_csv(source, name, reading)
    else:
        lines = (_record(line) for line in read_lines(source, encoding=reading.encoding))
        if kind == "tsv":
            rows = (record._replace(content=record.content.split("\t")) for record in lines)
            yield from _read_tsv(rows, name, reading.skip_malformed)
        elif kind == "jsonl":
            yield from (record for record in lines if record.problem or record.content.strip())
        else:
            yield from lines


def _record(line: Line) -> Record:
    text = line.text.removesuffix("\n").removesuffix("\r")
    return Record(line.number, text, text, line.problem)


def _read_csv(source: str | Path, name: str, reading: Reading) -> Iterator[Record]:
    lines = Lines(read_lines(source, encoding=reading.encoding, newline=""))

    def finds(header: list[str]) -> bool:
        usual = [*_USUAL_COLUMNS[True], *_USUAL_COLUMNS[False]]
        return any(set(columns) <= set(header) for columns in ([reading.columns] if reading.columns else usual))

    header = read_header(lines, name, reading.delimiter, finds)
    if header is not None:
        yield from _named(read_rows(lines, header), header.fields, name, reading.skip_malformed)


def _read_tsv(rows: Iterator[Record], name: str, skip_malformed: bool) -> Iterator[Record]:
    first = next(rows, None)
    if first is None:
        return
    if first.problem:
        raise InputError(f"{name}:{first.number}: {first.problem}")
    yield from _named(rows, first.content, name, skip_malformed)


def _named(rows: Iterator[Record], header: list[str], name: str, skip_malformed: bool) -> Iterator[Record]:
    """Turn rows of a table into fields by the names of its header.

    Columns without a name at its end, as spreadsheets write them, are left out; a value in one is a mistake.
    """
    names = stripped(header)
    while len(names) > 1 and not names[-1]:
        names.pop()
    _check_header(names, name)
    for row in rows:
        found, problem = row.content, row.problem
        if problem is None and not len(names) <= len(found) <= len(header):
            if skip_malformed or found in ([], [""]):
                continue
            problem = f"found {len(found)} fields, expected {len(header)} as in the header; correct that line"
        elif problem is None and any(found[len(names) :]):
            problem = f"found a value in column {len(header)}, which has no name in the header; name it"
        yield Record(row.number, row.row, dict(zip(names, found, strict=False)), problem, row.cause)


def _check_header(header: list[str], name: str) -> None:
    if header.count("") > 1:
        places = " and ".join(str(at) for at, column in enumerate(header, 1) if not column)
        raise InputError(f"{name}: found no names for the columns {places} in {_listed(header)}; name them")
    if len(set(header)) != len(header):
        raise InputError(f"{name}: a column name occurs twice in {_listed(header)}; rename one")


def _read_parquet(source: str | Path, name: str) -> Iterator[Record]:
    arrow, parquet = import_parquet("reading parquet")
    if not is_uri(source) and not Path(source).is_file():
        raise InputError(f"{name}: no such file; parquet is read from a file, not from standard input")
    system, path = located(source)
    try:
        with system.open_input_file(path) as opened, parquet.ParquetFile(opened) as file:
            _check_header(file.schema_arrow.names, name)
            number = 0
            for batch in row_batches(file, 1024):
                for fields in _plain_rows(batch, arrow.string()):
                    number += 1
                    yield Record(number, None, fields)
    except (arrow.ArrowException, ValueError, OverflowError, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file ({error})") from error


def _plain_rows(batch: Any, text: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch; times that Python's types cannot hold, such as nanoseconds, as `text`."""

    def values(column: Any) -> list[Any]:
        try:
            found: list[Any] = column.to_pylist()
        except (ValueError, OverflowError):
            found = column.cast(text).to_pylist()
        return found

    columns = [values(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _read_array(source: str | Path, encoding: str | None) -> Iterator[Record]:
    lines = list(read_lines(source, encoding=encoding))
    if problem := next((line for line in lines if line.problem), None):
        raise InputError(f"{source_name(source)}:{problem.number}: {problem.problem}")
    try:
        found = json.loads("".join(line.text for line in lines))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source_name(source)}: not JSON ({error}); {_ARRAY}") from error
    if not isinstance(found, list):
        raise InputError(f"{source_name(source)}: found JSON of type {type(found).__name__}, {_ARRAY}")
    for number, item in enumerate(found, 1):
        yield Record(number, None, item)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected one JSON object per line") from error
    return _object(fields, where)


def _object(fields: Any, where: str) -> dict[str, Any]:
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
                "name the column of one of them if it is meant"
            )
    for columns in _USUAL_COLUMNS[pair]:
        if all(column in fields for column in columns):
            return columns
    wanted = ", ".join("+".join(columns) for columns in _USUAL_COLUMNS[pair])
    raise InputError(
        f"{where}: found the columns {_listed(fields)}, expected {'a pair' if pair else 'a text'} in {wanted}; "
        f"name {'their columns' if pair else 'its column'}"
    )


def _check_column(fields: dict[str, Any], column: str, where: str) -> None:
    if not fields:
        raise InputError(f"{where}: no column {column!r}: found none; use csv, tsv, jsonl or parquet")
    if column not in fields:
        raise InputError(f"{where}: no column {column!r}; found {_listed(fields)}; name one of these")


def _text_field(fields: dict[str, Any], column: str, where: str) -> str:
    if isinstance(text := fields.get(column), str):
        return text
    _check_column(fields, column, where)
    if text is None:
        raise InputError(f"{where}: column {column!r} holds null, expected a text; fill it, or leave the row out")
    raise InputError(f"{where}: column {column!r} holds {_shortened(text)} ({type(text).__name__}), expected a text")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
