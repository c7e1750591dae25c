"""The files of a job that can be resumed after a kill: the answers so far, and a checkpoint, beside the output.

`out.csv.gz` grows as JSON lines in `out.csv.gz.partial`; `out.csv.gz.checkpoint` says how many records of the input it
covers. When the job is complete, the output is written from it and takes its name, and both disappear.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError
from ..io.readers import Example, Reject
from ..io.tables import convert, output_format
from ..io.writers import beside, output_path, write_json
from .answering import ALL_FIELDS, Counts


class JobFiles:
    """The growing output of one job, its rejects, and the checkpoint."""

    def __init__(self, output: Path, rejects: Path | None, job: Mapping[str, Any], *, resume: bool) -> None:
        """Open the files of `job`, a description that a resumed job must share.

        Raises InputError if the output cannot be written, an interrupted run is there and `resume` is not given, or it
        was another job's.
        """
        self.output = output_path(output)
        self._targets = [self.output] + ([] if rejects is None else [output_path(rejects)])
        for target in self._targets:
            output_format(target)  # fails before the work, not after
        self._partials = [target.with_name(f"{target.name}.partial") for target in self._targets]
        self._checkpoint = self.output.with_name(f"{self.output.name}.checkpoint")
        self._job = dict(job)
        self._digest = hashlib.blake2b(digest_size=16)
        self.done = Counts()
        """Numbers of the records that the files cover: as of the checkpoint, until the next one."""
        state = self._found(resume)
        self._expected: str | None = state.get("digest")
        with self.disk_errors():
            self._streams = [
                _append(partial, state.get("bytes", [0, 0])[at]) for at, partial in enumerate(self._partials)
            ]
            _lock(self._streams[0], self._partials[0])

    @property
    def lines(self) -> TextIO:
        """The stream for lines of the output."""
        return self._streams[0]

    @property
    def rejects(self) -> TextIO | None:
        """The stream for lines of the rejects."""
        return self._streams[1] if len(self._streams) > 1 else None

    def remaining(self, records: Iterable[Example | Reject]) -> Iterator[Example | Reject]:
        """Yield the records that are still to be done; raise InputError if those before are not the ones that were."""
        before, seen, rest = self.done.records, 0, iter(records)
        for record in islice(rest, before):
            self._digest.update(record.content)
            seen += 1
        if before and (seen < before or self._digest.hexdigest() != self._expected):
            raise InputError(
                f"the first {before:,} rows of the input are not those of the interrupted run; delete "
                f"{self._partials[0]} to start again"
            )
        for record in rest:
            self._digest.update(record.content)
            yield record

    def commit(self, counts: Counts) -> None:
        """Put what was written on the disk, and note that it covers this many records."""
        self.done = replace(counts)
        with self.disk_errors():
            self._sync()
            sizes = [partial.stat().st_size for partial in self._partials]
            state = {"job": self._job, "bytes": sizes, "digest": self._digest.hexdigest()}
            write_json(self._checkpoint, {"records": counts.records, **asdict(counts), **state})

    def finish(self) -> None:
        """Give the files their names."""
        with self.disk_errors():
            self._sync()
            fresh = [beside(target, f"fresh-{place}") for place, target in enumerate(self._targets)]
            try:
                written = [
                    new if convert(old, new, kept=ALL_FIELDS) else old
                    for old, new in zip(self._partials, fresh, strict=True)
                ]
                for file, target in reversed(list(zip(written, self._targets, strict=True))):
                    file.replace(target)
            finally:
                for file in fresh:
                    file.unlink(missing_ok=True)
        self.close()
        for partial in (*self._partials, self._checkpoint):
            partial.unlink(missing_ok=True)

    def _sync(self) -> None:
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the files as they are, for a later run to resume."""
        for stream in self._streams:
            with suppress(OSError):  # what is not on the disk yet is not in the checkpoint either
                stream.close()

    def _found(self, resume: bool) -> dict[str, Any]:
        """Return the checkpoint to resume from; empty for a new job. Files of a run that has none are written over."""
        try:
            state: dict[str, Any] = json.loads(self._checkpoint.read_text("utf-8"))
            sizes, records, job = state["bytes"], int(state["records"]), dict(state["job"])
            differing = [key for key in self._job if self._job[key] != job.get(key)]
            kept = self._partials[:1] if differing else self._partials
            if any(partial.stat().st_size < size for partial, size in zip(kept, sizes, strict=False)):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        if not resume:
            raise InputError(
                f"{self._partials[0]} has the first {records:,} rows of an interrupted run; resume it, or delete "
                "that file to start again"
            )
        if differing:
            key = differing[0]
            raise InputError(
                f"{self._partials[0]} is of a run with another {key} (found {job.get(key)}, expected "
                f"{self._job[key]}); give the same command, or delete it to start again"
            )
        self.done = Counts(int(state["answered"]), int(state["rejected"]))
        return state

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Name the output in an error of the system, for instance on a full disk."""
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.output}: {error.strerror or error}") from error


def _append(path: Path, size: int) -> TextIO:
    """Open a text file for appending, cut to `size` bytes."""
    with path.open("ab") as stream:
        if path.stat().st_size != size:
            stream.truncate(size)
    return path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def _lock(stream: TextIO, path: Path) -> None:
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise InputError(f"{path}: another process is writing it; wait for it, or name another output") from error
