"""Rows of CSV files, also of those in which a quote is missing or stray.

A quoted field may hold line ends, so one quote too many turns the rows after it into one field. Where a record of
several lines is not a row, its first line alone is rejected, and reading goes on at the second: all rows after a
damaged one are read again. That holds too for a record that is a row only because the quote is closed by another stray
one, which shows in its lines: each of them reads as a row.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from ..errors import InputError
from .lines import LONGEST_LINE, Line, Record

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""Those that are found by themselves."""

_LONGEST_RECORD = 10_000  # lines
_REMEDY = 'close it, or double it ("") where it belongs to the text'
_EXCEL = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # how Excel notes a delimiter in the first line


class Header(NamedTuple):
    """The first record, and how the others are written."""

    fields: list[str]
    delimiter: str
    spaced: bool
    """A space follows each delimiter."""


class Lines:
    """The lines of a file, of which some may be given back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._back: deque[Line] = deque()

    def __iter__(self) -> Iterator[Line]:
        return self

    def __next__(self) -> Line:
        return self._back.popleft() if self._back else next(self._lines)

    def give_back(self, lines: list[Line]) -> None:
        """Let these lines come next."""
        self._back.extendleft(reversed(lines))


def read_header(lines: Lines, name: str, delimiter: str | None, finds: Callable[[list[str]], bool]) -> Header | None:
    """Return the header of the file `name`; None if it has no lines.

    Without a delimiter it is the one of DELIMITERS that is in the header; if there are several, the one for which the
    header has the columns that are needed, which `finds` tells. Raises InputError where that is not clear, and for a
    header that is not CSV.
    """
    csv.field_size_limit(LONGEST_LINE)  # the default refuses texts over 128 KiB
    first = next((line for line in lines if line.problem or line.text.strip()), None)
    if first is None:
        return None
    where = f"{name}:{first.number}"
    if first.problem:
        raise InputError(f"{where}: {first.problem}")
    if delimiter is None and (noted := _EXCEL.fullmatch(first.text)):
        return read_header(lines, name, noted[1], finds)
    lines.give_back([first])
    tried = [delimiter] if delimiter else list(DELIMITERS)
    headers = [header for each in tried if (header := _header(lines, each))]
    if not headers:
        raise InputError(f"{where}: found a header with an unclosed or stray quote, expected the names of columns")
    split = [header for header in headers if len(header.fields) > 1] or headers[:1]
    if len(split) > 1:
        split = [header for header in split if finds(stripped(header.fields))] or split
    if len(split) > 1:
        found = " and ".join(DELIMITERS[header.delimiter] for header in split)
        raise InputError(
            f"{where}: found {found} in the header, expected one of them between the columns; name the delimiter"
        )
    header = split[0]
    next(_records(lines, header))
    return header


def read_rows(lines: Lines, header: Header) -> Iterator[Record]:
    """Yield the rows after the header, those that cannot be used too; blank lines are left out."""
    expected = len(header.fields)
    for fields, taken, error in _records(lines, header):
        first, several = taken[0], len(taken) > 1
        problem: str | None = None
        if error:
            problem = _malformed(taken, error)
        elif several and len(fields) != expected:
            problem = (
                f"malformed CSV: a quote opens in this line and closes in line {taken[-1].number}, which makes "
                f"{len(fields)} fields, expected {expected} as in the header; {_REMEDY}"
            )
        elif several and _swallowed(taken, header):
            problem = (
                f"malformed CSV: a quote opens in this line and closes in line {taken[-1].number}, but each line reads "
                f"as a row of its own; {_REMEDY}, and write a text that has such lines as jsonl"
            )
        if problem:
            lines.give_back(taken[1:])
            yield Record(first.number, _plain(first.text), [], first.problem or problem, error)
        elif several:
            row = _plain("".join(line.text for line in taken))
            yield Record(first.number, row, fields, next((line.problem for line in taken if line.problem), None))
        elif fields or first.problem:
            yield Record(first.number, _plain(first.text), fields, first.problem)


def stripped(names: list[str]) -> list[str]:
    """Return the names of columns without spaces around them."""
    return [name.strip() for name in names]


def _header(lines: Lines, delimiter: str) -> Header | None:
    """Return the header as this delimiter divides it; None if it is not CSV then. Its lines are not used up."""
    found: Header | None = None
    for spaced in (False, True):
        fields, taken, error = next(_records(lines, Header([], delimiter, spaced)))
        lines.give_back(taken)
        if not error:
            found = Header(fields, delimiter, spaced)
        if len(fields) < 2 or not all(field.startswith(" ") for field in fields[1:]):
            break
    return found


def _records(lines: Lines, form: Header) -> Iterator[tuple[list[str], list[Line], csv.Error | None]]:
    """Yield the fields of each record, its lines, and an error where it is not CSV."""
    delimiter, spaced = form.delimiter, form.spaced
    for first in lines:
        taken = [first]
        if '"' not in first.text:
            fields = _plain(first.text).split(delimiter) if _plain(first.text) else []
            yield [field.lstrip(" ") for field in fields] if spaced else fields, taken, None
            continue
        reader = csv.reader(_fed(lines, taken), delimiter=delimiter, strict=True, skipinitialspace=spaced)
        try:
            yield next(reader), taken, None
        except csv.Error as error:
            yield [], taken, error


def _fed(lines: Lines, taken: list[Line]) -> Iterator[str]:
    """Yield the text of the line that was taken, then of more, which are added to it."""
    yield taken[0].text
    for line in islice(lines, _LONGEST_RECORD - 1):
        taken.append(line)
        yield line.text or "\n"  # one that is too long has none


def _malformed(taken: list[Line], error: csv.Error) -> str:
    if "NUL" in str(error):
        return "malformed CSV: a NUL byte beside a quote, which Python 3.10 cannot read; remove it, or use jsonl"
    if "unexpected end" in str(error):
        within = f" within {_LONGEST_RECORD:,} lines" if len(taken) == _LONGEST_RECORD else ""
        found = f"a quote opens in this line and is not closed{within}"
    elif len(taken) > 1:
        found = f"a quote opens in this line, and its field has a single quote in line {taken[-1].number}"
    else:
        found = str(error)
    return f"malformed CSV: {found}; {_REMEDY}"


def _swallowed(taken: list[Line], header: Header) -> bool:
    """Return whether a record has swallowed rows: each of its lines reads as one, with every field filled.

    Texts are not written so: prose has a space after a comma, where a table has none, and the first or the last line of
    a text with lines like rows has the record's other fields too.
    """
    width, delimiter = len(header.fields), header.delimiter
    lines = [cells for line in taken if any(cells := line.text.replace('"', "").strip().split(delimiter))]
    between = lines[1:-1]

    def fields(cells: list[str]) -> int:
        return len(cells) if header.spaced else 1 + sum(not cell.startswith(" ") for cell in cells[1:])

    return (
        width > 1
        and bool(between)
        and all(len(cells) == width for cells in between)
        and fields(lines[0]) == fields(lines[-1]) == width
        and all(cell.strip() for cells in lines for cell in cells)
        and (header.spaced or not any(cell.startswith(" ") for cells in between for cell in cells[1:]))
    )


def _plain(text: str) -> str:
    return text.rstrip("\r\n")
