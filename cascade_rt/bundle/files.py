"""Hashes of files, and the identity that tells whether a file was replaced since it was looked at."""

from __future__ import annotations

import hashlib
from pathlib import Path

FileIdentity = tuple[int, int, int, int]
"""File identity, used to detect replacement: device, inode, size, time of change."""


def file_identity(path: Path) -> FileIdentity | None:
    """Return the identity of a file; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
