"""Standard streams that are closed or cannot be written to, as some supervisors leave them.

A descriptor from 0 to 2 that is closed would be taken by the next file that is opened, into which libraries then write
their messages. It is opened on the null device. What is read from a closed standard input, or written to a closed
standard output, is an OSError with a remedy; what cannot be written to standard error, which has progress, is left out.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_IN, _OUT, _ERR = range(3)
_NAMES = ("stdin", "stdout", "stderr")


class _Closed(io.FileIO):
    """A standard stream that was closed; its descriptor is that of the null device."""

    def __init__(self, number: int, mode: str, remedy: str) -> None:
        super().__init__(number, mode, closefd=False)
        self._error = OSError(errno.EBADF, f"it is closed; {remedy}", f"standard {'output' if number else 'input'}")

    def readinto(self, _: Any) -> int:
        raise self._error

    def write(self, _: Any) -> int:
        raise self._error


class _Progress(io.FileIO):
    """Standard error: what cannot be written is left out, so that a full disk or a closed pipe ends no work."""

    def write(self, content: Any) -> int:
        with suppress(OSError):
            if written := super().write(content):
                return written
        return memoryview(content).nbytes


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make the standard streams usable in the block, as the module says."""
    before = [getattr(sys, name) for name in _NAMES]
    for number in range(3):
        _open_descriptor(number)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_Closed(_IN, "r", "redirect it from a file")), encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = _text(io.BufferedWriter(_Closed(_OUT, "w", "redirect it to a file, or to /dev/null")))
    elif isinstance(sys.stdout, io.TextIOWrapper):  # labels and texts are Unicode, whatever the terminal's encoding
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _text(io.BufferedWriter(_Progress(_ERR, "w", closefd=False)), line_buffering=True)
    try:
        yield
    finally:
        for name, stream in zip(_NAMES, before, strict=True):
            if getattr(sys, name) is not stream:
                with suppress(OSError):
                    getattr(sys, name).flush()
                setattr(sys, name, stream)


def forget_closed_output() -> None:
    """Let what is written to a closed standard output vanish: the command's product is elsewhere."""
    if isinstance(getattr(getattr(sys.stdout, "buffer", None), "raw", None), _Closed):
        sys.stdout = _text(io.BufferedWriter(io.FileIO(_OUT, "w", closefd=False)))


def _open_descriptor(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)


def _text(stream: io.BufferedWriter, *, line_buffering: bool = False) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", line_buffering=line_buffering)
