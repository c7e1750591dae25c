"""Bundles on disk: read and verified as a whole, written atomically.

Reading checks everything before a session is made: the manifest's schema and seal, that every path stays inside the
folder, including the paths that ONNX files name, and every file's sha256.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..errors import BundleError
from ..io.writers import write_json
from .files import file_identity, sha256_of
from .hub import locate
from .manifest import MANIFEST, Bundle, MemberEntry, WeightFile, read_manifest
from .onnx_file import scan
from .paths import checked_relative, resolved_inside

_TOKENIZER_BYTES = 256 * 2**20  # the biggest multilingual ones have a tenth of it


def read_bundle(
    model_dir: str | Path,
    members: Sequence[str] | None = None,
    *,
    verify: bool = True,
    expected_sha256: str | None = None,
    lazily: bool = False,
) -> Bundle:
    """Read and verify a bundle.

    `model_dir`: its folder, or "hf:org/name" or "hf:org/name@revision" on the Hugging Face hub. `members`: names of the
    members to keep, None for all; files of the others are not looked at. `verify=False` skips the sha256 of the files,
    for huge models on a trusted disk. `expected_sha256`: the bundle's, as `cascade-rt info` prints it, which covers the
    hashes of all files; another bundle is refused. `lazily` leaves the content of members to `verify_member`. Raises
    BundleError, which names the file and the remedy, and InvalidOption for an unknown member.
    """
    folder, root = locate(model_dir)
    identity = file_identity(folder / MANIFEST)
    bundle = replace(read_manifest(folder), folder=folder, root=root, identity=identity)
    if expected_sha256 is not None and bundle.sha256 != expected_sha256.lower():
        raise BundleError(
            f"{model_dir}: another bundle than expected (found sha256 {bundle.sha256}, expected {expected_sha256}); "
            "take the one that you trust"
        )
    if members is not None:
        bundle = bundle.only(members)
    tokenizer, *weights = _files(bundle)
    _check_files(folder, root, [tokenizer], verify=verify, most=_TOKENIZER_BYTES)
    _check_files(folder, root, weights, verify=verify and not lazily)
    if not lazily:
        for member in bundle.members:
            _check_external(folder, member)
    return bundle


def verify_member(bundle: Bundle, member: MemberEntry, *, verify: bool = True) -> None:
    """Verify the files of one member of a bundle that was read; errors and `verify` as of `read_bundle`."""
    folder = bundle.folder or Path()
    _check_files(folder, bundle.root or folder, _member_files(member), verify=verify)
    _check_external(folder, member)


def bundle_files(bundle: Bundle) -> list[str]:
    """Return the relative paths of all files of a bundle, the manifest first."""
    return [MANIFEST, *(file.file for file in _files(bundle))]


@contextmanager
def write_bundle(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an error, it becomes `folder` in one rename.

    An existing bundle is replaced only with `overwrite`, anything else never. If the block raises or the process
    is killed, `folder` is unchanged. A replacement is one exchange of names where the system supports it (Linux);
    elsewhere it is two renames, and in between the old bundle is whole in a hidden folder beside it.
    """
    target = Path(folder).absolute()
    replaces = check_target(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        fresh = work / "bundle"
        fresh.mkdir()
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                _sync(path)
        read_bundle(fresh)
        if not replaces:
            try:
                fresh.rename(target)
            except OSError as error:
                if not target.exists():
                    raise
                raise BundleError(
                    f"{target} was written by another process in the meantime and is kept; choose another output folder"
                ) from error
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


def check_target(target: Path, *, overwrite: bool) -> bool:
    """Return whether a bundle would be replaced; raise BundleError where `write_bundle` would refuse to."""
    if not (target.exists() or target.is_symlink()):
        return False
    if not (target / MANIFEST).is_file():
        raise BundleError(f"{target} exists and is not a bundle; choose another output folder")
    if not overwrite:
        raise BundleError(f"{target} exists; choose another output folder, or overwrite that bundle")
    return True


def write_manifest(folder: Path, bundle: Bundle) -> None:
    """Write `cascade.json` into `folder` atomically."""
    write_json(folder / MANIFEST, bundle.to_json())


def _files(bundle: Bundle) -> list[WeightFile]:
    files = [WeightFile(bundle.tokenizer_file, bundle.tokenizer_sha256)]
    for member in bundle.members:
        files += _member_files(member)
    return files


def _member_files(member: MemberEntry) -> list[WeightFile]:
    return [WeightFile(member.file, member.sha256), *member.data]


def _check_files(
    folder: Path, root: Path, files: Sequence[WeightFile], *, verify: bool, most: int | None = None
) -> None:
    """Raise BundleError for files that are missing, altered or larger than `most` bytes."""
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock, so big files are hashed in parallel
        for damage in pool.map(lambda file: _damage(folder, root, file, verify, most), files):
            if damage:
                raise BundleError(f"{damage}; export or copy the bundle again")


def _damage(folder: Path, root: Path, file: WeightFile, verify: bool, most: int | None) -> str | None:
    """Say what is wrong with a file of the bundle, of at most so many bytes; None if nothing is."""
    path = resolved_inside(folder, root, file.file)
    try:
        if not path.is_file():
            return f"{path}: is missing from the bundle"
        if most is not None and path.stat().st_size > most:
            return f"{path}: over {most // 2**20} MiB, too big for a tokenizer"
        found = sha256_of(path) if verify else file.sha256
    except OSError as error:
        return f"{str(path)[:200]}: cannot be read ({error.strerror})"
    if found != file.sha256:
        return f"{path}: truncated or altered (found sha256 {found[:12]}..., expected {file.sha256[:12]}...)"
    return None


def _check_external(folder: Path, member: MemberEntry) -> None:
    """Refuse an ONNX file that reads files which the manifest does not list for it."""
    listed = {file.file for file in member.data}
    for written in scan(folder / member.file).external:
        if (PurePosixPath(member.file).parent / checked_relative(written, member.file)).as_posix() not in listed:
            raise BundleError(
                f"{folder / member.file}: keeps weights in {written[:80]!r}, which {MANIFEST} does not list; "
                "export again"
            )


def _sync(path: Path) -> None:
    """Write a file's content to the disk."""
    flags = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY  # Windows syncs only what is open for writing
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux, through its C library
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
