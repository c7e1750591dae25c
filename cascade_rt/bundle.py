"""The on-disk format of a cascade: `cascade.json`, `tokenizer.json` and one ONNX file per member.

Reading checks everything before a session is made: the manifest's shape and seal, that every path stays inside the
folder, those that ONNX files name too, and every file's sha256. Writing is atomic: the folder appears whole or not
at all.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, InputError
from .hub import locate
from .onnx_file import scan
from .records import write_json

FORMAT_VERSION = 1
BATCH_TOLERANCE = 1e-4
"""Largest |difference of a class probability| between one batching and another that counts as none."""

MANIFEST = "cascade.json"
TUNING = "tuning"  # the manifest's key of what cascade-rt tune found
_SEAL = "sha256"  # of the manifest without this key; manifests of other writers may have none
_MANIFEST_BYTES = 16 * 2**20  # far above any real manifest; a bigger file is not one
_TOKENIZER_BYTES = 256 * 2**20  # the biggest multilingual ones have a tenth of it


FileVersion = tuple[int, int, int, int]
"""What tells one file from another that took its place: device, inode, size, time of change."""


@dataclass(frozen=True)
class WeightFile:
    """A file in which an ONNX file keeps weights; its path is as the bundle's, relative to the bundle's folder."""

    file: str
    sha256: str


@dataclass(frozen=True)
class MemberEntry:
    """What the manifest says about one member."""

    name: str
    file: str
    sha256: str
    layers: int
    hidden_size: int
    parameters: int
    precision: str
    threshold: float | None  # None for the last member, which always emits
    intermediate_size: int | None = None  # of the feed-forward blocks; None: four times the hidden size
    data: tuple[WeightFile, ...] = ()  # the ONNX file's external data
    other: Mapping[str, Any] = field(default_factory=dict)  # keys unknown to this version, kept as they are


@dataclass(frozen=True)
class Tuning:
    """What the runtime needs of what `cascade-rt tune` found: it stands in the manifest's `tuning`, among more."""

    members: list[str]  # the names of those to use, small to big
    thresholds: list[float]  # of those but the last
    exits: list[int]  # texts of tuning that each of them answered


@dataclass(frozen=True)
class Bundle:
    """A manifest: the labels (index = class id), the tokenizer's file, and the members from small to big."""

    folder: Path | None = field(default=None, compare=False, kw_only=True)  # where it was read
    version: FileVersion | None = field(default=None, compare=False, kw_only=True)  # of the manifest that was read

    labels: tuple[str, ...]
    pair: bool
    max_length: int
    tokenizer_file: str
    tokenizer_sha256: str
    members: tuple[MemberEntry, ...]
    provenance: Mapping[str, Any]
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def thresholds(self) -> list[float]:
        """The thresholds of all members but the last."""
        return [member.threshold for member in self.members if member.threshold is not None]

    @property
    def tuning(self) -> Tuning | None:
        """What tuning chose; None where nothing was tuned."""
        found = self.other.get(TUNING)
        return Tuning(found["members"], found["thresholds"], found["exits"]) if isinstance(found, dict) else None

    def tuned(self) -> Bundle:
        """Return it with the members that tuning chose, at its thresholds; as it is where nothing was tuned."""
        return self if self.tuning is None else _only(self, self.tuning.members)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as it stands in `cascade.json`, sealed."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "labels": list(self.labels),
            "pair": self.pair,
            "max_length": self.max_length,
            "tokenizer": {"file": self.tokenizer_file, "sha256": self.tokenizer_sha256},
            "members": [
                {
                    "name": member.name,
                    "file": member.file,
                    "sha256": member.sha256,
                    "layers": member.layers,
                    "hidden_size": member.hidden_size,
                    "parameters": member.parameters,
                    "precision": member.precision,
                    "threshold": member.threshold,
                    **({} if member.intermediate_size is None else {"intermediate_size": member.intermediate_size}),
                    **({"data": [vars(file) for file in member.data]} if member.data else {}),
                    **member.other,
                }
                for member in self.members
            ],
            "provenance": dict(self.provenance),
            **self.other,
        }
        return manifest | {_SEAL: _seal(manifest)}


def read_bundle(model_dir: str | Path, members: Sequence[str] | None = None, *, verify: bool = True) -> Bundle:
    """Read and verify a bundle; raise BundleError, which names the file and the remedy.

    `model_dir`: its folder, or "org/name" (or "org/name@revision") of one on the Hugging Face hub. `members` keeps only
    those members, by name (None: all); the files of the others are not looked at. `verify=False` leaves out what
    reads whole files, their sha256: for huge models on a disk that is trusted. Raises InputError for a name that
    no member has.
    """
    folder, root = locate(model_dir)
    version = file_version(folder / MANIFEST)
    bundle = replace(_parse(_load_manifest(folder)), folder=folder, version=version)
    if members is not None:
        bundle = _only(bundle, members)
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock, so big files are hashed side by side
        files = [WeightFile(bundle.tokenizer_file, bundle.tokenizer_sha256)]
        for member in bundle.members:
            files += [WeightFile(member.file, member.sha256), *member.data]
        for failed in pool.map(lambda file: _damage(folder, root, file, verify), files):
            if failed:
                raise BundleError(f"{failed}; export or copy the bundle again")
    for member in bundle.members:
        _check_external(folder, member)
    return bundle


@contextmanager
def write_bundle(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well, it becomes `folder` in one rename.

    An existing bundle is replaced only with `overwrite`, anything else never. If the block raises or the process
    is killed, `folder` is as it was. A replacement is one exchange of names where the system has that (Linux);
    elsewhere it is two renames, and in between the old bundle lies whole in a hidden folder beside it.
    """
    target = Path(folder).absolute()
    replaces = target.exists() or target.is_symlink()
    if replaces and not (target / MANIFEST).is_file():
        raise BundleError(f"{target} exists and is not a bundle; choose another output folder")
    if replaces and not overwrite:
        raise BundleError(f"{target} exists; choose another output folder, or say --overwrite to replace that bundle")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        fresh = work / "bundle"
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        read_bundle(fresh)
        if not replaces:
            fresh.rename(target)
        elif not _exchange(fresh, target):
            old = work / "replaced"
            target.rename(old)
            try:
                fresh.rename(target)
            except OSError:
                old.rename(target)
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(folder: Path, bundle: Bundle) -> None:
    """Write `cascade.json` into `folder`, whole or not at all."""
    write_json(folder / MANIFEST, bundle.to_json())


def file_version(path: Path) -> FileVersion | None:
    """Return what tells this file from another of its name; None where there is none."""
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


def _only(bundle: Bundle, names: Sequence[str]) -> Bundle:
    unknown = [name for name in names if name not in {member.name for member in bundle.members}]
    if unknown or not names:
        found = ", ".join(member.name for member in bundle.members)
        raise InputError(f"found the members {', '.join(names) or 'none'}, expected some of: {found}")
    kept = [member for member in bundle.members if member.name in names]
    return replace(bundle, members=(*kept[:-1], replace(kept[-1], threshold=None)))


def _damage(folder: Path, root: Path, file: WeightFile, verify: bool) -> str | None:
    """Say what is wrong with a file of the bundle, or nothing."""
    path = _inside(folder, root, file.file)
    try:
        if not path.is_file():
            return f"{path}: is missing from the bundle"
        if path.suffix == ".json" and path.stat().st_size > _TOKENIZER_BYTES:
            return f"{path}: over {_TOKENIZER_BYTES // 2**20} MiB, which no tokenizer is"
        found = sha256_of(path) if verify else file.sha256
    except OSError as error:
        return f"{str(path)[:200]}: cannot be read ({error.strerror})"
    if found != file.sha256:
        return f"{path}: truncated or altered (found sha256 {found[:12]}..., expected {file.sha256[:12]}...)"
    return None


def _check_external(folder: Path, member: MemberEntry) -> None:
    """Refuse an ONNX file that reads other files than the manifest lists for it."""
    listed = {file.file for file in member.data}
    for written in scan(folder / member.file).external:
        if (PurePosixPath(member.file).parent / _relative(written)).as_posix() not in listed:
            raise BundleError(
                f"{folder / member.file}: keeps weights in {written[:80]!r}, which {MANIFEST} does not list; "
                "export again"
            )


def _seal(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content, however it is laid out in the file."""
    plain = {key: value for key, value in manifest.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; return whether this system and file system can."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux, through its C library
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _load_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder}: no bundle there (found no {MANIFEST}); expected a folder that cascade-rt export wrote"
        )
    if path.stat().st_size > _MANIFEST_BYTES:
        raise BundleError(f"{path}: over {_MANIFEST_BYTES // 2**20} MiB, which no manifest is; export the bundle again")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export or copy the bundle again") from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: found a {type(manifest).__name__}, expected a JSON object; export the bundle again")
    if manifest.get(_SEAL, found := _seal(manifest)) != found:
        raise BundleError(
            f"{path}: altered (found sha256 {found[:12]}..., expected {str(manifest[_SEAL])[:12]}...); export or copy "
            f"the bundle again, or delete its last key, {_SEAL!r}, if you meant the change"
        )
    return manifest


def _parse(manifest: dict[str, Any]) -> Bundle:
    top = _Fields(manifest, MANIFEST)
    top.rest.pop(_SEAL, None)
    format_version = top.take("format_version", int)
    if format_version != FORMAT_VERSION:
        newer = "install a newer cascade-rt" if format_version > FORMAT_VERSION else "export the bundle again"
        raise BundleError(
            f"{MANIFEST}: found format_version {format_version}, this cascade-rt reads {FORMAT_VERSION}; {newer}"
        )
    labels = top.take("labels", list)
    if len(labels) < 2 or not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise BundleError(f"{MANIFEST}: labels: found {str(labels)[:80]}, expected at least two different texts")
    tokenizer = _Fields(top.take("tokenizer", dict), f"{MANIFEST}: tokenizer")
    entries = top.take("members", list)
    if not entries:
        raise BundleError(f"{MANIFEST}: members: found none, expected at least one")
    members = tuple(_parse_member(entry, index, len(entries)) for index, entry in enumerate(entries))
    if len({member.name for member in members}) != len(members):
        raise BundleError(f"{MANIFEST}: members: two members share a name; expected different names")
    if sorted(member.layers for member in members) != [member.layers for member in members]:
        raise BundleError(f"{MANIFEST}: members: expected ascending numbers of layers, small to big")
    _check_tuning(top.rest.get(TUNING), members)
    return Bundle(
        labels=tuple(labels),
        pair=top.take("pair", bool),
        max_length=top.take("max_length", int, at_least=3),
        tokenizer_file=_relative(tokenizer.take("file", str)),
        tokenizer_sha256=tokenizer.take("sha256", str),
        members=members,
        provenance=top.take("provenance", dict),
        other=top.rest,
    )


def _parse_member(entry: Any, index: int, count: int) -> MemberEntry:
    where = f"{MANIFEST}: members[{index}]"
    if not isinstance(entry, dict):
        raise BundleError(f"{where}: found a {type(entry).__name__}, expected an object; export the bundle again")
    fields = _Fields(entry, where)
    threshold = fields.take("threshold", float, type(None))
    if (threshold is None) != (index == count - 1):
        raise BundleError(
            f"{where}: threshold: found {threshold}; expected a number, and null for the last member only"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise BundleError(f"{where}: threshold: found {threshold}, expected a number from 0 to 1")
    return MemberEntry(
        name=fields.take("name", str),
        file=_relative(fields.take("file", str)),
        sha256=fields.take("sha256", str),
        layers=fields.take("layers", int, at_least=1),
        hidden_size=fields.take("hidden_size", int, at_least=1),
        parameters=fields.take("parameters", int, at_least=1),
        precision=fields.take("precision", str),
        threshold=threshold,
        intermediate_size=fields.take("intermediate_size", int, at_least=1) if "intermediate_size" in entry else None,
        data=tuple(_parse_data(file, where) for file in fields.take("data", list)) if "data" in entry else (),
        other=fields.rest,
    )


def _check_tuning(tuning: Any, members: Sequence[MemberEntry]) -> None:
    """Refuse a tuning that the runtime could not follow; what else it tells is nobody's condition."""
    if tuning is None:
        return
    where = f"{MANIFEST}: {TUNING}"
    if not isinstance(tuning, dict):
        raise BundleError(f"{where}: found a {type(tuning).__name__}, expected an object; tune the bundle again")
    fields = _Fields(tuning, where)
    names, taus, counts = (fields.take(key, list) for key in ("members", "thresholds", "exits"))
    chosen = [member for member in members if member.name in names]
    if not names or names != [member.name for member in chosen]:
        raise BundleError(f"{where}: found the members {str(names)[:80]}, expected some of the bundle's, in order")
    if taus != [member.threshold for member in chosen[:-1]]:
        raise BundleError(f"{where}: found thresholds {str(taus)[:80]} unlike the members' own; tune the bundle again")
    whole = all(type(count) is int and 0 <= count < 2**31 for count in counts)
    if len(counts) != len(names) or not whole or sum(counts) == 0:
        raise BundleError(f"{where}: exits: found {str(counts)[:80]}, expected one count of texts per member")


def _parse_data(entry: Any, where: str) -> WeightFile:
    if not isinstance(entry, dict):
        raise BundleError(f"{where}: data: found a {type(entry).__name__}, expected an object; export the bundle again")
    fields = _Fields(entry, f"{where}: data")
    return WeightFile(_relative(fields.take("file", str)), fields.take("sha256", str))


class _Fields:
    """Takes known fields out of a JSON object, each with its type; what stays is unknown and kept."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.rest = dict(fields)
        self._where = where

    def take(self, key: str, *types: type, at_least: int | None = None) -> Any:
        if key not in self.rest:
            raise BundleError(f"{self._where}: has no {key!r}; export the bundle again")
        value = self.rest.pop(key)
        if float in types and type(value) is int and abs(value) <= 1:
            value = float(value)
        wanted = type(value) in types  # exact: a bool is no int here
        if wanted and isinstance(value, float):
            wanted = math.isfinite(value)
        if wanted and isinstance(value, int) and not isinstance(value, bool):
            wanted = (at_least or 0) <= value < 2**63
        if not wanted:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            bound = "" if at_least is None else f" of at least {at_least}"
            raise BundleError(f"{self._where}: {key}: found {str(value)[:80]!r}, expected {names}{bound}")
        return value


def _relative(file: str) -> str:
    path = PurePosixPath(file)
    odd = not file.isprintable() or "\\" in file or ":" in file  # half a surrogate pair is not printable either
    if not file or odd or path.is_absolute() or ".." in path.parts:
        raise BundleError(
            f"{MANIFEST}: found the path {file[:80]!r}, expected one that stays inside the bundle's folder"
        )
    return file


def _inside(folder: Path, root: Path, file: str) -> Path:
    path = folder / file
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        inside = False
    if not inside:
        raise BundleError(f"{path}: leads out of the bundle's folder; expected files inside it, and links neither")
    return path
