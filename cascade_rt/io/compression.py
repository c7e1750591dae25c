"""Files compressed with gzip or Zstandard, by their ending."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from ..errors import MissingExtraError
from .remote import is_uri, open_uri

ENDINGS = (".gz", ".zst")
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
"""Errors of reading a damaged file, besides OSError."""


def without_compression(path: str | Path) -> Path:
    """Return a path, or that of a URI, without its ending for compression."""
    path = Path(urlsplit(str(path)).path if is_uri(path) else path)
    return path.with_suffix("") if path.suffix.lower() in ENDINGS else path


def ending(path: str | Path) -> str:
    """Return the ending of a path, or of a URI's, in lower case: without its dot, and without that of a compression."""
    return without_compression(path).suffix.lower().lstrip(".")


def check_compression(path: str | Path) -> None:
    """Raise MissingExtraError where the ending names a compression whose package is not installed."""
    if Path(path).suffix.lower() == ".zst":
        _zstandard(Path(path))


def open_binary(source: str | Path) -> BinaryIO:
    """Open a file, or what is behind a URI, for reading, through its compression if the ending names one."""
    uri = open_uri(str(source)) if is_uri(source) else None
    path = Path(source if uri is None else urlsplit(str(source)).path)
    compression = path.suffix.lower()
    if compression == ".gz":
        return io.BufferedReader(cast(io.RawIOBase, gzip.open(uri or path, "rb")))
    if compression == ".zst":
        return io.BufferedReader(_zstandard(path).open(uri or path, "rb"))
    return uri or path.open("rb")


@contextmanager
def write_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, through its compression if the ending names one.

    What is written depends on the content alone, not on the file's name or the time.
    """
    compression = path.suffix.lower()
    with path.open("wb") as file:
        if compression == ".gz":
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as stream:
                yield cast(BinaryIO, stream)
        elif compression == ".zst":
            with _zstandard(path).ZstdCompressor().stream_writer(file, closefd=False) as stream:
                yield stream
        else:
            yield file


def _zstandard(path: Path) -> Any:
    try:
        import zstandard  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError(f"{path}: Zstandard", "zstd", error) from error
    return zstandard
