"""Lines of a text file or of standard input: encoding, line ends, a bound on their length, and what is wrong with them.

A line that cannot be decoded, or is too long, is yielded with the reason, so that a reader can go on after it.
"""

from __future__ import annotations

import codecs
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from ..errors import InputError, InvalidOption
from .compression import DAMAGED, open_binary

LONGEST_LINE = 2**25
"""Characters; a longer line is not kept in memory."""

_UNDECODED = re.compile("[\udc80-\udcff]")
_BY_MARK = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Line(NamedTuple):
    """One line of a file."""

    number: int
    """From 1."""
    text: str
    """With its end; bytes that cannot be decoded are lone surrogates (PEP 383). Empty if the line is too long."""
    problem: str | None
    """The reason why it cannot be used; None if it can."""


class Record(NamedTuple):
    """A record of a file before it is checked."""

    number: int
    """The line it begins on, or the row of a parquet file, from 1."""
    row: str | None
    """As a text file has it; None for parquet and json."""
    content: Any
    """A line, or the fields."""
    problem: str | None = None
    """The reason why it cannot be used; None if none is known."""
    cause: Exception | None = None
    """Another library's error."""


def read_lines(source: str | Path, *, encoding: str | None = None, newline: str = "\n") -> Iterator[Line]:
    """Yield the lines of a file, or of standard input when `source` is "-".

    `encoding`: None for UTF-8, or what a byte order mark says; UTF-16 is known without one too. `newline`: as for
    `open`; by default only LF and CRLF end a line, as other tools count them, and CR alone in a file that begins
    without LF. A byte order mark is no text. Raises InputError for a file that cannot be read, and InvalidOption for an
    unknown encoding.
    """
    with _open_text(source, encoding, newline) as (stream, ends):
        number = 0
        while True:
            try:
                text = stream.readline(LONGEST_LINE + 1)
            except UnicodeError as error:  # only of encodings that cannot mark single bytes
                raise InputError(
                    f"{source_name(source)}:{number + 1}: cannot be decoded at or after this line ({error}); name "
                    "another encoding"
                ) from error
            except (OSError, *DAMAGED) as error:
                raise InputError(f"{source_name(source)}:{number + 1}: cannot be read further ({error})") from error
            if not text:
                return
            number += 1
            if number == 1:
                text = text.removeprefix("\ufeff")
            problem = _undecoded(text, stream.encoding)
            if len(text) > LONGEST_LINE and not text.endswith(ends):
                text = ""
                while (more := stream.readline(LONGEST_LINE)) and not more.endswith(ends):
                    pass
                problem = f"found a line of over {LONGEST_LINE:,} characters, expected a shorter one; split it"
            yield Line(number, text, problem)


def source_name(source: str | Path) -> str:
    """Return what messages call a source."""
    return "standard input" if str(source) == "-" else str(source)


@contextmanager
def _open_text(source: str | Path, encoding: str | None, newline: str) -> Iterator[tuple[TextIO, tuple[str, ...]]]:
    """Open a source for reading; yield the stream, and what ends its lines."""
    try:
        stream: BinaryIO = sys.stdin.buffer if str(source) == "-" else open_binary(source)
        start = stream.peek(4) if isinstance(stream, io.BufferedReader) else b""
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file; check the path") from error
    except (OSError, *DAMAGED) as error:
        raise InputError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if newline == "\n" and b"\r" in start and b"\n" not in start:
        newline = "\r"
    chosen = encoding or _encoding(start)
    errors = "strict" if "16" in chosen or "32" in chosen else "surrogateescape"
    try:
        text = io.TextIOWrapper(stream, encoding=chosen, errors=errors, newline=newline)
    except (LookupError, ValueError) as error:
        stream.close()
        raise InvalidOption("encoding", encoding, "one that Python knows, for instance utf-8 or latin-1") from error
    with text:
        yield text, (newline,) if newline else ("\n", "\r")


def _encoding(start: bytes) -> str:
    """Return the encoding of a file by its first bytes."""
    for mark, encoding in _BY_MARK.items():
        if start.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in start[:4]]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    return "utf-16-be" if zeros == [True, False, True, False] else "utf-8"


def _undecoded(text: str, encoding: str) -> str | None:
    """Return which byte of a line was not decoded; None if there is none."""
    found = None if text.isascii() else _UNDECODED.search(text)
    if found is None:
        return None
    byte, wanted = ord(found[0]) - 0xDC00, encoding.upper()
    return f"found byte 0x{byte:02x} at character {found.start() + 1}, expected {wanted}; convert the file"
