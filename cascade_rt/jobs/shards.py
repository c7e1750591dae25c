"""The output of a job on a cluster: a folder with one file, a shard, for each part of the input.

`part-00000-000002.jsonl` answers the third part of the first input file, so the shards in the order of their names are
the answers in input order. A shard appears under its name only when it is complete, and writing it again gives the
same file: a task that Ray repeats does no harm.

In parquet, all shards have the same columns, of the same types: when the job ends, shards whose own rows would do with
others are written again.

`_JOB` describes the job, `_receipts/` says what each shard covers, for a later run to resume, and `_SUCCESS` appears
when all shards are there. Readers of folders, such as those of pyarrow and Spark, skip names that begin with `_`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, InvalidOption, first_line
from ..io.remote import located
from ..io.tables import Column, columns_of, convert, fields_of, output_format, read_parquet, write_parquet
from .answering import ALL_FIELDS, CHUNK

ENDINGS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
"""Formats of shards; the first unless told."""

SHARD_ROWS = 10 * CHUNK
"""Records in a shard unless told."""

_JOB, _SUCCESS, _RECEIPTS = "_JOB", "_SUCCESS", "_receipts"


class Receipt(NamedTuple):
    """The record of a shard: the part that it covers, and its counts."""

    part: str
    digest: str
    """Digest of the part's records."""
    bytes: int
    """Size of the shard."""
    answered: int
    rejected: int
    exits: list[int]
    """Texts answered by each member."""
    rejects: str
    """The lines of the rejects."""
    columns: dict[str, list[Any]] | None = None
    """The columns of a parquet shard: the values of `Column` by name; None for other shards."""
    layers: int | None = None
    """Encoder layers executed for the texts in all; None where long texts were cut, as the exits say it then."""


class ShardFolder:
    """The folder of one job, on this machine's disk, one that the machines share, or behind a URI; can be pickled."""

    def __init__(self, target: str, ending: str) -> None:
        """`target`: path or URI; `ending`: one of ENDINGS."""
        if ending not in ENDINGS:
            raise InvalidOption("shard_format", ending, f"one of {', '.join(ENDINGS)}")
        self.target = target
        self._ending = ending
        self._system, self._folder = located(target)
        output_format(f"shard.{ending}")  # fails before the work, not after

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
                f"{self.target}: found the answers of an earlier run there; resume it, or name another folder"
            )
        earlier = self._read(_JOB)
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
            found = Receipt(**self._read(f"{_RECEIPTS}/{part}"))
            size = self._system.get_file_info(self._path(self._shard(part))).size
        except (OSError, TypeError):  # none, or not one of ours
            return None
        if self._ending == "parquet" and found.columns is None:  # of an earlier version
            return None
        return found if (found.digest, found.bytes) == (digest, size) else None

    def write(self, part: str, lines: str, receipt: Callable[[int], Receipt]) -> Receipt:
        """Write the shard of a part from its lines, then what `receipt` returns for its size, and return that."""
        content, columns = self._encoded(lines)
        self._put(self._shard(part), content)
        written = receipt(len(content))._replace(columns=_plain(columns))
        self._put(f"{_RECEIPTS}/{part}", json.dumps(written._asdict()).encode())
        return written

    def finish(self, receipts: Sequence[Receipt], summary: Mapping[str, Any]) -> None:
        """Mark the job as complete, with the receipts of its parts, in order.

        Shards of an earlier run that are not among its parts are removed, and parquet shards get the same columns.
        Raises InputError if a shard is missing, as where machines do not share the folder.
        """
        expected = {self._shard(receipt.part) for receipt in receipts}
        found = {name for name in self._reported(self._names) if not name.startswith("_")}
        if missing := expected - found:
            raise InputError(
                f"{self.target}: {len(missing):,} of {len(expected):,} shards are not there, for instance "
                f"{min(missing)}; name a folder that all machines of the cluster share, or a URI such as s3://"
            )
        for name in found - expected:
            self._system.delete_file(self._path(name))
        if self._ending == "parquet":
            self._unify(receipts)
        self._put(_SUCCESS, json.dumps(summary).encode())

    def _shard(self, part: str) -> str:
        return f"part-{part}.{self._ending}"

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    def _names(self) -> list[str]:
        from pyarrow import fs  # noqa: PLC0415 - `located` says what is missing

        selector = fs.FileSelector(self._folder, allow_not_found=True)
        return [info.base_name for info in self._system.get_file_info(selector)]

    def _read(self, name: str) -> dict[str, Any]:
        """Return the JSON of a file; an empty object if there is none that is whole."""
        try:
            found: dict[str, Any] = json.loads(self._content(name))
        except (OSError, ValueError):
            return {}
        return found

    def _put(self, name: str, content: bytes) -> None:
        """Write a file that appears only when it is complete."""
        path = self._path(name)
        renames = self._system.type_name == "local"
        hidden = f"{Path(path).parent}/.{Path(path).name}.{os.urandom(8).hex()}" if renames else path

        def write() -> None:
            with self._system.open_output_stream(hidden, compression=None) as stream:
                stream.write(content)
            if renames:  # an object in a store appears when its stream is closed
                self._system.move(hidden, path)

        self._reported(write)

    def _encoded(self, lines: str) -> tuple[bytes, dict[str, Column] | None]:
        """Return the content of a shard, and the columns of a parquet one."""
        plain = lines.encode("utf-8", "backslashreplace")
        if self._ending == "jsonl":
            return plain, None
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "lines"), Path(folder, f"shard.{self._ending}")
            source.write_bytes(plain)
            columns = columns_of(source) if self._ending == "parquet" else None
            convert(source, target, kept=ALL_FIELDS, columns=columns)
            return target.read_bytes(), columns

    def _unify(self, receipts: Sequence[Receipt]) -> None:
        """Write those parquet shards again that do not have the columns of all."""
        joined: dict[str, Column] = {}
        for receipt in receipts:
            for name, column in _columns(receipt).items():
                joined[name] = joined[name].joined(column) if name in joined else column
        fields = fields_of(joined, ALL_FIELDS)
        for receipt in receipts:
            if (own := fields_of(_columns(receipt), ALL_FIELDS)) == fields:
                continue
            shard, noted = self._shard(receipt.part), f"{_RECEIPTS}/{receipt.part}"
            with tempfile.TemporaryDirectory() as folder:
                source, target = Path(folder, "own.parquet"), Path(folder, "all.parquet")
                source.write_bytes(self._reported(partial(self._content, shard)))
                write_parquet(((row, 1) for row in read_parquet(source, own)), target, fields)
                content = target.read_bytes()
            found = self._read(noted) or receipt._asdict()
            self._put(shard, content)
            self._put(noted, json.dumps(found | {"bytes": len(content), "columns": _plain(joined)}).encode())

    def _content(self, name: str) -> bytes:
        with self._system.open_input_stream(self._path(name), compression=None) as stream:
            content: bytes = stream.read()
        return content

    def _reported(self, act: Callable[[], Any]) -> Any:
        """Do something with the folder; raise InputError where the file system refuses."""
        try:
            return act()
        except OSError as error:
            raise InputError(
                f"cannot write {self.target} ({first_line(error)}); check the name and the access"
            ) from error


def _plain(columns: Mapping[str, Column] | None) -> dict[str, list[Any]] | None:
    return None if columns is None else {name: column.to_json() for name, column in columns.items()}


def _columns(receipt: Receipt) -> dict[str, Column]:
    return {name: Column.of_json(values) for name, values in (receipt.columns or {}).items()}
