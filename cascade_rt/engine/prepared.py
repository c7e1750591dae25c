"""Members as ONNX Runtime prepares them for this CPU, kept in a cache folder: optimised graphs with packed weights.

A session reads a graph, optimises it, and packs its weights for the CPU's kernels into memory of its own. Kept on disk,
they are mapped: sessions start faster, take no memory until weights are read, and share it with other processes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..bundle import MemberEntry
from ..bundle.files import file_identity, sha256_of
from ..bundle.manifest import TOKENS
from ..errors import InputError
from ..io.caches import cache_folder
from ..io.writers import write_json
from .cpus import text_of
from .memory import available_memory
from .providers import installed_version

FOLDER = "CASCADE_RT_CACHE"
"""Environment variable: the folder to use, or OFF."""
OFF = "off"
LARGEST = 8 * 2**30
"""Bytes of all members in a folder; those that were not used for longest go first."""

_SMALLEST = 4 * 2**20  # bytes of a member that is worth it
_TAKEN = 3  # times a member's size, in memory while it is written
_FORMAT = 1
_SINCE = (1, 22)  # of ONNX Runtime
_GRAPH, _WEIGHTS, _RECORD = "member.onnx", "member.onnx_data", "record.json"
_PART = ".part-"
_PROBE = np.arange(1, 17, dtype=np.int64)[None]


@dataclass(frozen=True)
class Prepared:
    """The place of one member in the cache."""

    folder: Path
    size: int
    """Bytes of the member's own files."""

    @classmethod
    def of(cls, entry: MemberEntry, path: Path, cache: str | Path | None, settings: Sequence[Any]) -> Prepared | None:
        """Return a member's place; None where it is not kept.

        `path`: its ONNX file. `cache`: the folder, OFF, or None for the user's. `settings`: of the session, which
        change what is made.
        """
        root = members_folder(cache)
        if root is None or entry.reads != TOKENS or installed_version() < _SINCE:
            return None
        try:
            size = entry.size(path)
        except OSError:  # gone, which is told where it is loaded
            return None
        if size < _SMALLEST:
            return None
        key = [_FORMAT, entry.sha256, [file.sha256 for file in entry.data], *machine(), list(settings)]
        return cls(root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32], size)

    @property
    def file(self) -> Path:
        """Its ONNX file."""
        return self.folder / _GRAPH

    def ready(self) -> bool:
        """Return whether it is there, as it was written; removed where it is not."""
        try:
            record = json.loads((self.folder / _RECORD).read_text("utf-8"))
            if hasattr(os, "getuid") and self.folder.stat().st_uid != os.getuid():
                return False
            for name in (_GRAPH, _WEIGHTS):
                identity, sha256 = record[name]
                if list(file_identity(self.folder / name) or ()) != identity:  # copied, or changed
                    if sha256_of(self.folder / name) != sha256:
                        raise ValueError(f"{name} is altered")
                    record[name] = [file_identity(self.folder / name), sha256]
                    write_json(self.folder / _RECORD, record)
        except (OSError, ValueError, KeyError, TypeError, InputError):  # of what is not there, too
            self.remove()
            return False
        with suppress(OSError):
            os.utime(self.folder / _RECORD)  # used now
        return True

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self, make: Callable[[Path], Any], load: Callable[[Path], Any]) -> bool:
        """Write it; return whether it is there now.

        `make`: takes the ONNX file to write; makes the session that writes it. `load`: takes that file; makes a session
        of it. Both sessions have to answer alike, to the bit.
        """
        there = available_memory()
        if there is not None and there < _TAKEN * self.size:
            return False
        work = None
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            work = Path(tempfile.mkdtemp(prefix=_PART, dir=self.folder.parent))
            expected = _answers(make(work / _GRAPH))
            if not np.array_equal(_answers(load(work / _GRAPH)), expected):
                return False
            files = [work / _GRAPH, work / _WEIGHTS]
            write_json(work / _RECORD, {file.name: [file_identity(file), sha256_of(file)] for file in files})
            with suppress(OSError):  # another process was faster
                work.rename(self.folder)
            _evict(self.folder.parent, kept=self.folder)
        except Exception:  # a full disk, a folder that cannot be written, an operator that cannot be saved
            return False
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
            _return_memory()
        return self.ready()


def saving(options: Any, file: Path) -> Any:
    """Return a session's options, changed so that it writes its graph and its packed weights."""
    options.optimized_model_filepath = str(file)
    for name, value in (
        ("optimized_model_external_initializers_file_name", _WEIGHTS),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{name}", value)
    return options


def members_folder(cache: str | Path | None) -> Path | None:
    """Return where members are kept as prepared; None for nowhere. `cache`: as of `Execution`."""
    chosen = cache or os.environ.get(FOLDER)
    if chosen is None:
        usual = cache_folder()
        return None if usual is None else usual / "members"
    return None if str(chosen) == OFF else Path(chosen)


@cache
def machine() -> tuple[str, ...]:
    """Return what packed weights depend on: the build of ONNX Runtime, and the CPU with its features."""
    lines = text_of(Path("/proc/cpuinfo")).splitlines()
    named = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    cpu = sorted({line for line in lines if line.startswith(named)}) or [platform.machine(), platform.processor()]
    return (onnxruntime.__version__, onnxruntime.get_build_info(), *cpu)


def _answers(session: Any) -> Any:
    names = [node.name for node in session.get_inputs()]
    values = {name: np.zeros_like(_PROBE) for name in names} | {"input_ids": _PROBE}
    if "attention_mask" in values:
        values["attention_mask"] = np.ones_like(_PROBE)
    return session.run(None, values)[0]


def _return_memory() -> None:
    """Return what two sessions have taken to the system, where the C library can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _evict(root: Path, kept: Path) -> None:
    """Remove members, those first that were not used for longest, until the others take at most LARGEST bytes."""
    found = []
    for record in root.glob(f"*/{_RECORD}"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in record.parent.iterdir())
            found.append((record.stat().st_mtime, size, record.parent))
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if total <= LARGEST:
            return
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
