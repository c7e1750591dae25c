"""Paths in a manifest: relative, and inside the bundle's folder even where links lead elsewhere."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ..errors import BundleError


def checked_relative(file: str, where: str) -> str:
    """Return a path of a manifest; raise BundleError, which names `where`, unless it is relative and plain."""
    path = PurePosixPath(file)
    odd = not file.isprintable() or "\\" in file or ":" in file  # half a surrogate pair is not printable either
    if not file or odd or path.is_absolute() or ".." in path.parts:
        raise BundleError(f"{where}: found the path {file[:80]!r}, expected one that stays inside the bundle's folder")
    return file


def resolved_inside(folder: Path, root: Path, file: str) -> Path:
    """Return the path of a bundle's file; raise BundleError where a link leads out of `root`."""
    path = folder / file
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise BundleError(f"{path}: leads out of the bundle's folder; expected files inside it, no links to others")
    return path
