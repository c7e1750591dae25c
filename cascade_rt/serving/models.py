"""Bundles by name, each with its batcher, and replaced when the bundle on disk is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic

from ..bundle import MANIFEST
from ..bundle.files import FileIdentity, file_identity
from ..errors import CascadeError
from ..runtime import CascadeRuntime
from .batcher import Batcher
from .metrics import Metrics

_LONGEST_PAUSE = 30.0  # seconds between attempts to open a bundle that cannot be used
_log = logging.getLogger(__name__)


Identify = Callable[[str], object]
"""Returns a value that changes when the bundle of a source is replaced."""


class UnknownModel(CascadeError):
    """No bundle has this name."""

    field = "model"


@dataclass(frozen=True)
class Model:
    """A bundle that is served."""

    name: str
    runtime: CascadeRuntime
    batcher: Batcher
    loaded: str
    """When it was opened: UTC, ISO 8601."""

    @property
    def version(self) -> str:
        """The first 12 digits of the bundle's sha256."""
        return (self.runtime.bundle.sha256 or "")[:12]


class Models:
    """The bundles of a server."""

    def __init__(
        self,
        sources: Mapping[str, str],
        open_bundle: Callable[[str, str], CascadeRuntime],
        make_batcher: Callable[[str, CascadeRuntime], Batcher],
        metrics: Metrics,
        identify: Identify,
    ) -> None:
        """Open all bundles; `sources`: folder, or "hf:org/name", by name. The first answers where no name is given."""
        self._sources = dict(sources)
        self._identify = identify
        self._open_bundle = open_bundle
        self._make_batcher = make_batcher
        self._metrics = metrics
        self._identities = {name: identify(source) for name, source in self._sources.items()}
        self._models = {name: self._open(name) for name in self._sources}
        self.errors: dict[str, str] = {}
        """Error of a bundle on disk that cannot be served, by name."""

    def __iter__(self) -> Iterator[Model]:
        """Iterate over the bundles that are served now."""
        return iter(list(self._models.values()))

    def get(self, name: str | None = None) -> Model:
        """Return a model, or the first; raise UnknownModel."""
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModel(f"found no model {name[:80]!r}; expected one of: {', '.join(self._models)}")
        return self._models[name]

    async def watch(self, seconds: float) -> None:
        """Look for replaced bundles every `seconds`, until cancelled."""
        refused: dict[str, object] = {}  # identity of the last bundle that could not be used
        again, pause = dict.fromkeys(self._sources, 0.0), dict.fromkeys(self._sources, seconds)
        while True:
            await asyncio.sleep(seconds)
            for name, source in self._sources.items():
                identity = await asyncio.to_thread(self._identify, source)
                if identity == self._identities[name]:
                    self.errors.pop(name, None)  # the bundle that is served is back
                    continue
                if identity == refused.get(name) and monotonic() < again[name]:
                    continue
                if await self._replace(name):
                    self._identities[name] = identity
                    again[name], pause[name] = 0.0, seconds
                else:  # files may be copied into the folder one after another
                    refused[name] = identity
                    again[name] = monotonic() + pause[name]
                    pause[name] = min(_LONGEST_PAUSE, 2 * pause[name])

    async def _replace(self, name: str) -> bool:
        """Serve the bundle that is on disk now; keep the old one if it cannot be used."""
        old = self._models[name]
        try:
            self._models[name] = await asyncio.to_thread(self._open, name)
        except Exception as error:  # also of the disk: whatever it is, the old bundle stays and is watched further
            if self.errors.get(name) != str(error):
                _log.error("reload refused", extra={"model": name, "error": str(error)})
                self._metrics.reloads.labels(name, "refused").inc()
            self.errors[name] = str(error)
            return False
        self.errors.pop(name, None)
        self._metrics.reloads.labels(name, "replaced").inc()
        _log.info("reloaded", extra={"model": name, "version": self._models[name].version})
        await asyncio.to_thread(old.batcher.close)
        return True

    def close(self) -> None:
        """Answer what was accepted, then release all sessions."""
        for model in self._models.values():
            model.batcher.close()

    def _open(self, name: str) -> Model:
        runtime = self._open_bundle(name, self._sources[name])
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Model(name, runtime, self._make_batcher(name, runtime), now)


def identity(source: str) -> FileIdentity | None:
    """Return the identity of a bundle's manifest; None where there is none to look at, as on the hub."""
    return file_identity(Path(source) / MANIFEST)
