"""Ray: a connection to a cluster, and runtimes that open on any of its machines, also where the bundle's folder is not.

The bundle goes along in Ray's object store, one copy for each machine, and is checked by its sha256 where it arrives.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import __version__
from .bundle.manifest import read_manifest
from .bundle.storage import bundle_files
from .engine.execution import Execution
from .errors import BundleError, CascadeError, InputError, MissingExtraError, first_line
from .runtime import CascadeRuntime, Recipe

_CONNECT_SECONDS = 10.0


@contextmanager
def cluster(address: str | None = None) -> Iterator[Any]:
    """Connect to a cluster for a block, which gets the module `ray`; a cluster that this started ends with it.

    `address`: of a cluster, "auto" for the one on this machine, or "local" for a new one. None: as `ray.init` does, the
    cluster of RAY_ADDRESS, else one that runs on this machine, else a new one. Where Ray is initialized, that is used.
    Raises MissingExtraError without Ray, and InputError for a cluster that does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start reports nothing to anyone
    try:
        import ray  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("Ray", "ray", error) from error
    if ray.is_initialized():
        yield ray
        return
    handler = signal.getsignal(signal.SIGTERM)
    named = address or os.environ.get("RAY_ADDRESS", "")
    try:
        _check_reachable(named)
        ray.init(address=address, include_dashboard=_new(address), log_to_driver=False, logging_level="ERROR")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray ends the process with a stack trace
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot connect to the cluster {named or 'auto'} ({first_line(error)}); check the address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError where nothing answers at "host:port", which Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _new(address: str | None) -> bool | None:
    """Return the setting for the dashboard: none in a cluster that is started here."""
    return False if address in (None, "local") and "RAY_ADDRESS" not in os.environ else None


@dataclass(frozen=True)
class RemoteBundle:
    """A runtime's recipe and its bundle, to open the same runtime on any machine of a cluster."""

    recipe: Recipe
    """With the bundle's folder on the machine of `shared`."""
    files: Mapping[str, Any]
    """The bundle's files, as references to bytes in the object store, by their relative path."""
    version: str = __version__

    @property
    def members(self) -> Sequence[str]:
        """Names of the members that answer."""
        return self.recipe.members

    def open(
        self, execution: Execution, *, verify: bool = True, members: Sequence[str] | None = None
    ) -> CascadeRuntime:
        """Open the runtime, or one of some of its members alone, by name.

        Raises CascadeError where another version of cascade-rt is installed, and the errors of `CascadeRuntime`.
        """
        if self.version != __version__:
            raise CascadeError(
                f"found cascade-rt {__version__} on a machine of the cluster, expected {self.version}, as here; "
                "install the same version everywhere"
            )
        recipe = replace(self.recipe, model_dir=str(self._folder()), execution=execution, verify=verify)
        if members is not None:
            rule = recipe.rule.without_exits(len(members))
            recipe = replace(recipe, opened=tuple(members), members=tuple(members), rule=rule)
        return recipe.open()

    def _folder(self) -> Path:
        """Return a folder of this machine that has the bundle; one for all processes and jobs."""
        here = Path(self.recipe.model_dir)
        if self._is_in(here):
            return here
        kept = Path(tempfile.gettempdir()) / f"cascade-rt-{getpass.getuser()}" / self.recipe.sha256[:32]
        if not self._is_in(kept):
            shutil.rmtree(kept, ignore_errors=True)  # of old files in it, a system may have deleted some
            self._unpack(kept)
        return kept

    def _is_in(self, folder: Path) -> bool:
        try:
            return read_manifest(folder).sha256 == self.recipe.sha256 and all(
                (folder / file).is_file() for file in self.files
            )
        except BundleError:
            return False

    def _unpack(self, target: Path) -> None:
        import ray  # noqa: PLC0415 - an extra

        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            for file, reference in self.files.items():
                path = work / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(ray.get(reference))
            try:
                work.rename(target)
            except OSError:
                if not self._is_in(target):  # else another process was faster
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def shared(runtime: CascadeRuntime) -> RemoteBundle:
    """Put a runtime's bundle into the object store, and return how to open the runtime anywhere."""
    import ray  # noqa: PLC0415 - an extra

    recipe = runtime.recipe()
    folder = (runtime.bundle.folder or Path(recipe.model_dir)).absolute()
    files = {file: ray.put((folder / file).read_bytes()) for file in bundle_files(runtime.bundle)}
    return RemoteBundle(replace(recipe, model_dir=str(folder), opened=recipe.members), files)
