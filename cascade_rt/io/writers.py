"""Write JSON and JSON lines; an output file appears under its name only when it is complete."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError


@contextmanager
def open_output(target: str | Path) -> Iterator[TextIO]:
    """Open `target` for JSON ("-": standard output); a file appears under its name only when it is complete.

    Half a surrogate pair, which UTF-8 cannot encode, is written as the escape that JSON has for it.
    """
    if str(target) == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    with (
        whole_file(target) as path,
        path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream,
    ):
        yield stream


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Yield the path to write a file to, which appears as `target` only when it is complete."""
    if is_stream(target):
        yield Path(target)
        return
    path = output_path(target)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_stream(target: str | Path) -> bool:
    """Return whether a target is standard output, a device or a pipe, which is written to and never replaced."""
    path = Path(target)  # not resolved: /dev/stdout may lead to a pipe without a path
    return str(target) == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def beside(target: Path, part: str) -> Path:
    """Return the hidden name of a part of a file of this process, in its folder and with its ending."""
    return target.with_name(f".{part}-{os.getpid()}-{target.name.lstrip('.')}")  # .name has no ending


def output_path(target: str | Path) -> Path:
    """Return the absolute path of a file to write; raise InputError for a folder, and for one in no existing folder."""
    path = Path(target).resolve()
    if path.is_dir():
        raise InputError(f"cannot write {target}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {target}: the folder {path.parent} does not exist; create it first")
    return path


def check_ending(target: str | Path, ending: str) -> None:
    """Raise InputError for a file name whose ending is that of another format; no ending is fine."""
    if (found := Path(target).suffix).lower() not in ("", ending):
        raise InputError(f"cannot write {target}: found a name that ends in {found}, expected {ending}")


def new_path(target: str | Path, ending: str, *, overwrite: bool) -> Path:
    """Return `output_path` for a file with this ending; raise InputError if it exists and is not to be replaced."""
    check_ending(target, ending)
    path = output_path(target)
    if path.exists() and not overwrite:
        raise InputError(f"{target}: exists already; name another file, or overwrite it")
    return path


def output_folder(target: str | Path) -> Path:
    """Make a folder to write to, where there is none, and return it; raise InputError where that is not possible."""
    path = Path(target)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; name a new folder") from error
    return path


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, atomically."""
    with open_output(path) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(fields: Mapping[str, Any], answer: Mapping[str, Any], taken: Collection[str] = ()) -> str:
    """Return one line of JSON with the input's fields and the answer's.

    A field that has the name of one of the answer's, or of those in `taken`, is renamed: label becomes input_label. NaN
    and infinity, which JSON does not have, become null; a value of another type becomes its text.
    """
    names = {*answer, *taken}

    def free(name: str) -> str:
        if name in names:
            name = f"input_{name}"
            while name in fields:
                name = f"input_{name}"
        return name

    line = {free(name): field for name, field in fields.items()} | dict(answer)
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False, default=_text) + "\n"
    except ValueError:
        return json.dumps(json.loads(json.dumps(line, default=_text), parse_constant=lambda _: None)) + "\n"


def _text(value: object) -> str:
    """Return a value that JSON has no type for as text; only the columns of parquet files have such values."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
