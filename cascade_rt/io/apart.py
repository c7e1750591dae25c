"""Keep what a command writes apart from what it reads, however the paths are spelled."""

from __future__ import annotations

import glob
import os
import posixpath
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import combinations, product
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote, urlsplit

from ..errors import InputError
from .remote import is_uri

_Identity = tuple[int, int]
_HUB = "hf:"


@dataclass(frozen=True)
class _Place:
    """A file or folder, there already or not."""

    name: str
    shown: str
    paths: tuple[PurePath, ...]
    """As it is spelled, and without links; both absolute."""
    identity: _Identity | None
    """None if nothing is there yet."""
    around: frozenset[_Identity]
    """Identities of itself and of the folders that it is in; for a link, also of those that its target is in."""

    def within(self, other: _Place) -> bool:
        """Return whether this is the other, or lies in it."""
        if other.identity is not None:
            return other.identity in self.around
        ours = {_folded(place) for path in self.paths for place in (path, *path.parents)}
        return any(_folded(path) in ours for path in other.paths)


def check_apart(inputs: Mapping[str, Iterable[str | Path]], outputs: Mapping[str, Iterable[str | Path]]) -> None:
    """Raise InputError if an output is also an input or another output, or if one of the two lies in the other.

    Both have paths by the names of options. Inputs are files, folders, patterns or URIs, "-" for standard input, or
    names on the hub, which are left out; outputs are files, folders or URIs, "-" for standard output. What is there is
    compared by its identity, so links and other spellings make no difference. A device or a pipe may be anything.
    """
    written = [place for name, paths in outputs.items() for path in paths if (place := _place(name, path, 1))]
    for one, other in combinations(written, 2):
        if one.name != other.name:
            _check(one, other)
    for name, sources in inputs.items():
        for output, source in product(written, sources):
            if not str(source).startswith(_HUB):
                _check_input(output, name, _without_scheme(str(source)))


def _check_input(output: _Place, name: str, source: str) -> None:
    pattern = _is_pattern(source)
    if pattern and any(_matches(path.parts, asked.parts) for path, asked in product(output.paths, _patterns(source))):
        raise InputError(f"{output.name} {output.shown} is among {name} {source}; name another place")
    if not pattern and (read := _place(name, source, 0)):
        _check(output, read)
    if output.identity is None or is_uri(source):
        return
    files = glob.glob(source, recursive=True) if pattern else _files(source)  # noqa: PTH207 - absolute patterns too
    for file in files:
        if _identity(file) == output.identity or (pattern and _place_of(name, file).within(output)):
            raise InputError(
                f"{output.name} {output.shown} is, or holds, {file} of {name}, which would be lost; name another place"
            )


def _check(output: _Place, other: _Place) -> None:
    inside, around = output.within(other), other.within(output)
    one, two = (f"{place.name} {place.shown}" for place in (output, other))
    if inside and around:
        raise InputError(f"{one} and {two} are the same; one would be lost, name another place")
    if inside or around:
        raise InputError(f"{one} {'lies in' if inside else 'holds'} {two}; name places apart from each other")


def _place(name: str, path: str | Path, stream: int) -> _Place | None:
    """Return a place; None for a device, a pipe or a terminal. `stream`: the descriptor that "-" stands for."""
    if str(path) != "-":
        found = _place_of(name, path)
        return found if found.identity is None or _is_kept(Path(_without_scheme(str(path))).stat()) else None
    try:
        status = os.fstat(stream)
    except OSError:  # closed
        return None
    identity = (status.st_dev, status.st_ino) if _is_kept(status) else None
    return _Place(name, "-", (PurePath(f"-{stream}"),), identity, frozenset([identity] if identity else []))


def _place_of(name: str, path: str | Path) -> _Place:
    written = _without_scheme(str(path))
    if is_uri(written):
        return _Place(name, written, (_path_of_uri(written),), None, frozenset())
    paths = (Path(os.path.abspath(written)), Path(os.path.realpath(written)))  # noqa: PTH100 - links are kept
    around = {found for one in paths for place in (one, *one.parents) if (found := _identity(place))}
    return _Place(name, str(path), paths, _identity(written), frozenset(around))


def _identity(path: str | Path) -> _Identity | None:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # not there, or not a possible name
        return None
    return status.st_dev, status.st_ino


def _is_kept(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)


def _files(folder: str) -> list[Path]:
    """Return the files of a folder, and of those in it: of texts, of a member or of a bundle."""
    return [file for pattern in ("*", "*/*") for file in Path(folder).glob(pattern)] if Path(folder).is_dir() else []


def _without_scheme(source: str) -> str:
    """Return the path of a URI on this machine; others as they are."""
    return unquote(urlsplit(source).path) if source.startswith("file://") else source


def _path_of_uri(uri: str) -> PurePath:
    parts = urlsplit(uri)
    return PurePosixPath(f"{parts.scheme}:", parts.netloc, posixpath.normpath(unquote(parts.path)).lstrip("/"))


def _folded(path: PurePath) -> str:
    return str(path).casefold()  # of two names that differ in case alone, one may be lost


def _is_pattern(source: str) -> bool:
    return glob.has_magic(source) and not os.path.exists(source)  # noqa: PTH110 - URIs too


def _patterns(source: str) -> list[PurePath]:
    """Return a pattern as it is spelled, and with links in the folders that it begins with resolved."""
    if is_uri(source):
        return [_path_of_uri(source)]
    parts = Path(os.path.abspath(source)).parts  # noqa: PTH100 - links are kept
    plain = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    return [PurePath(*parts), PurePath(os.path.realpath(PurePath(*parts[:plain])), *parts[plain:])]


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**" and _matches(names, pattern[1:]):
        return True
    if not names:
        return False
    return _matches(names[1:], pattern if pattern[0] == "**" else pattern[1:]) and (
        pattern[0] == "**" or fnmatch(names[0], pattern[0])
    )
