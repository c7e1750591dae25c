"""The output of a job on a cluster: a folder with one file, a shard, for each part of the input.

`part-00000-000002.jsonl` answers the third part of the first input file, so the shards in the order of their names are
the answers in input order. A shard appears under its name only when it is complete, and writing it again gives the
same file: a task that Ray repeats does no harm.

`_JOB` describes the job, `_receipts/` says what each shard covers, for a later run to resume, and `_SUCCESS` appears
when all shards are there. Readers of folders, such as those of pyarrow and Spark, skip names that begin with `_`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, InvalidOption, first_line
from ..io.remote import located
from .files import convert

ENDINGS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
"""Formats of shards."""

_JOB, _SUCCESS, _RECEIPTS = "_JOB", "_SUCCESS", "_receipts"


class Receipt(NamedTuple):
    """What a shard covers."""

    part: str
    digest: str
    """Of the part's records."""
    bytes: int
    """Size of the shard."""
    answered: int
    rejected: int
    exits: list[int]
    """Texts answered by each member."""
    rejects: str
    """The lines of the rejects."""


class ShardFolder:
    """The folder of one job, on this machine's disk, one that the machines share, or behind a URI; can be pickled."""

    def __init__(self, target: str, ending: str) -> None:
        """`target`: path or URI; `ending`: one of ENDINGS."""
        if ending not in ENDINGS:
            raise InvalidOption("shard_format", ending, f"one of {', '.join(ENDINGS)}")
        self.target = target
        self._ending = ending
        self._system, self._folder = located(target)

    def begin(self, job: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or check that it is of an interrupted run of the same job.

        Raises InputError if there is something else, an interrupted run and not `resume`, or another job's.
        """
        found = set(self._reported(self._names)) - {_RECEIPTS}
        if not found:
            self._reported(lambda: self._system.create_dir(self._path(_RECEIPTS), recursive=True))
            self._put(_JOB, json.dumps(job).encode())
            return
        if _JOB not in found:
            raise InputError(f"{self.target}: found other files there, expected a new or empty folder; name another")
        if not resume:
            raise InputError(
                f"{self.target}: found the answers of an earlier run there; name another folder, or go on with `resume`"
            )
        earlier = self._read(_JOB) or {}
        if differing := [key for key in job if job[key] != earlier.get(key)]:
            key = differing[0]
            raise InputError(
                f"{self.target}: is of a run with another {key} (found {earlier.get(key)}, expected {job[key]}); give "
                "the same command, or name another folder"
            )
        if _SUCCESS in found:
            self._reported(lambda: self._system.delete_file(self._path(_SUCCESS)))

    def receipt(self, part: str, digest: str) -> Receipt | None:
        """Return the receipt of a part whose shard is there, complete and of the same records; None if it is not."""
        try:
            found = Receipt(**(self._read(f"{_RECEIPTS}/{part}") or {}))
            size = self._system.get_file_info(self._path(self._shard(part))).size
        except (OSError, TypeError):  # none, or not one of ours
            return None
        return found if (found.digest, found.bytes) == (digest, size) else None

    def write(self, part: str, lines: str, receipt: Callable[[int], Receipt]) -> Receipt:
        """Write the shard of a part from its lines, then what `receipt` returns for its size, and return that."""
        content = self._encoded(lines)
        self._put(self._shard(part), content)
        written = receipt(len(content))
        self._put(f"{_RECEIPTS}/{part}", json.dumps(written._asdict()).encode())
        return written

    def finish(self, parts: Sequence[str], summary: Mapping[str, Any]) -> None:
        """Mark the job as complete, and remove shards of an earlier run that are not among its parts.

        Raises InputError if a shard is missing, as where machines do not share the folder.
        """
        expected = {self._shard(part) for part in parts}
        found = {name for name in self._reported(self._names) if not name.startswith("_")}
        if missing := expected - found:
            raise InputError(
                f"{self.target}: {len(missing):,} of {len(expected):,} shards are not there, for instance "
                f"{min(missing)}; name a folder that all machines of the cluster share, or a URI such as s3://"
            )
        for name in found - expected:
            self._system.delete_file(self._path(name))
        self._put(_SUCCESS, json.dumps(summary).encode())

    def _shard(self, part: str) -> str:
        return f"part-{part}.{self._ending}"

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    def _names(self) -> list[str]:
        from pyarrow import fs  # noqa: PLC0415 - `located` says what is missing

        selector = fs.FileSelector(self._folder, allow_not_found=True)
        return [info.base_name for info in self._system.get_file_info(selector)]

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return the JSON of a file; None if there is none that is whole."""
        try:
            with self._system.open_input_stream(self._path(name)) as stream:
                found: dict[str, Any] = json.loads(stream.read())
        except (OSError, ValueError):
            return None
        return found

    def _put(self, name: str, content: bytes) -> None:
        """Write a file that appears only when it is complete."""
        path = self._path(name)
        renames = self._system.type_name == "local"
        partial = f"{Path(path).parent}/.{Path(path).name}.{os.urandom(8).hex()}" if renames else path

        def write() -> None:
            with self._system.open_output_stream(partial, compression=None) as stream:
                stream.write(content)
            if renames:  # an object in a store appears when its stream is closed
                self._system.move(partial, path)

        self._reported(write)

    def _encoded(self, lines: str) -> bytes:
        plain = lines.encode("utf-8", "backslashreplace")
        if self._ending == "jsonl":
            return plain
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "lines"), Path(folder, f"shard.{self._ending}")
            source.write_bytes(plain)
            convert(source, target)
            return target.read_bytes()

    def _reported(self, act: Callable[[], Any]) -> Any:
        """Do something with the folder; raise InputError where the file system refuses."""
        try:
            return act()
        except OSError as error:
            raise InputError(
                f"cannot write {self.target} ({first_line(error)}); check the name and the access"
            ) from error
