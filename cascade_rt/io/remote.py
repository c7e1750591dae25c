"""pyarrow, where it is needed: for files behind URIs (s3://, gs://, hdfs://, file://, ...) and for parquet."""

from __future__ import annotations

import fnmatch
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit, urlunsplit

from ..errors import InputError, MissingExtraError, first_line

_URI = re.compile(r"[a-z][a-z0-9+.-]+://")
_MAGIC = re.compile(r"[*\[]")  # a question mark begins the URI's query


def is_uri(source: str | Path) -> bool:
    """Return whether a source is a URI, not a path."""
    return isinstance(source, str) and _URI.match(source) is not None


def import_parquet(purpose: str) -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`; raise MissingExtraError without them."""
    try:
        import pyarrow  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(purpose, "parquet", error) from error
    return pyarrow, parquet


def row_batches(file: Any, most: int) -> Iterable[Any]:
    """Return the rows of a `ParquetFile` in batches; where it has no row groups, pyarrow 18 and 19 fail."""
    found: Iterable[Any] = file.iter_batches(batch_size=most) if file.num_row_groups else ()
    return found


def located(target: str | Path) -> tuple[Any, str]:
    """Return the file system (of `pyarrow.fs`) and the path there of a URI, or of a path on this machine.

    Raises InputError for a URI that pyarrow does not know, and MissingExtraError without pyarrow.
    """
    try:
        from pyarrow import fs  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError(f"{target}: reading and writing URIs", "parquet", error) from error
    if not is_uri(target):
        return fs.LocalFileSystem(), str(Path(target).absolute())
    try:
        system, path = fs.FileSystem.from_uri(target)
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{target}: cannot be opened ({first_line(error)}); check the URI") from error
    return system, path


def open_uri(uri: str) -> BinaryIO:
    """Open the file behind a URI for reading, as it is stored; raise OSError where that fails."""
    system, path = located(uri)
    return cast(BinaryIO, io.BufferedReader(system.open_input_stream(path, compression=None)))


def files_behind(uri: str) -> list[str] | None:
    """Return the files of a folder, or those whose names match a pattern, as URIs in the order of their names.

    None where `uri` is a file. Hidden files are left out. Raises InputError where there is nothing, for a folder that
    cannot be listed, and for a pattern in the name of a folder.
    """
    from pyarrow import fs  # noqa: PLC0415 - `located` says what is missing

    parts = urlsplit(uri)
    folder, _, pattern = parts.path.rpartition("/")
    if _MAGIC.search(folder or parts.netloc):
        raise InputError(f"{uri}: found a pattern in the name of a folder, expected one in the file's name alone")
    if not _MAGIC.search(pattern):
        folder, pattern = parts.path.rstrip("/"), "*"
    system, path = located(urlunsplit(parts._replace(path=folder)))
    try:
        kind = system.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise InputError(f"{uri}: no such file or folder; check the URI")
        if kind != fs.FileType.Directory:
            return None
        found = system.get_file_info(fs.FileSelector(path))
    except OSError as error:
        raise InputError(f"{uri}: cannot be listed ({first_line(error)}); check the name and the access") from error
    names = sorted(info.base_name for info in found if info.type == fs.FileType.File)
    chosen = [name for name in names if fnmatch.fnmatchcase(name, pattern) and not name.startswith(".")]
    return [urlunsplit(parts._replace(path=f"{folder}/{quote(name)}")) for name in chosen]
