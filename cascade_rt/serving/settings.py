"""Settings of a server; without an extra, so that the command line can show their defaults."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from ..engine.execution import Execution
from ..engine.windows import Windows
from ..errors import InvalidOption


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of a server."""

    execution: Execution = field(default_factory=Execution)
    max_wait_ms: float = 0.0
    """Milliseconds that a text may wait for its micro-batch to fill, while other texts keep the machine busy."""
    max_queue: int = 1000
    """Texts that may be accepted and not yet answered, for each bundle."""
    max_texts: int = 1000
    """Texts in one request."""
    max_body: int = 8 * 2**20
    """Bytes in the body of a request."""
    timeout: float = 30.0
    """Seconds for a request that names no deadline."""
    degrade: bool = False
    allow_thresholds: bool = False
    log_texts: bool = False
    """True to log texts and answers."""
    reload_seconds: float = 1.0
    """Seconds between looks for a replaced bundle; 0 for never."""
    root_path: str = ""
    """Prefix of all paths before a proxy, whether it strips it or not."""
    stride: int | None = None
    """As for `CascadeRuntime`, as is the next one."""
    aggregate: str | None = None

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value that is out of range."""
        Windows.of(self.stride, self.aggregate)
        for name in ("max_queue", "max_texts", "max_body"):
            if getattr(self, name) < 1:
                raise InvalidOption(name, getattr(self, name), "at least 1")
        for name in ("max_wait_ms", "reload_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidOption(name, getattr(self, name), "a number from 0")
        if not 0 < self.timeout < math.inf:
            raise InvalidOption("timeout", self.timeout, "seconds, more than 0")
        if self.root_path:
            _check_root_path(self.root_path)


@dataclass(frozen=True)
class Scaling:
    """Numbers of replicas."""

    min_replicas: int = 1
    max_replicas: int | None = None
    """None for what the cluster has room for."""
    target_requests: float = 8.0
    """Requests that a replica should have at a time, those that wait included; more start another replica."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value that is out of range."""
        if self.min_replicas < 1:
            raise InvalidOption("min_replicas", self.min_replicas, "at least 1")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise InvalidOption("max_replicas", self.max_replicas, f"at least {self.min_replicas}, the fewest")
        if not 0 < self.target_requests < math.inf:
            raise InvalidOption("target_requests", self.target_requests, "a number above 0")


OWN_PATHS = (
    "docs", "health", "info", "metrics", "models", "openapi.json", "predict", "static-offline-docs", "v1", "v2",
)  # fmt: skip
"""Beginnings of the paths of the server."""


def _check_root_path(found: str) -> None:
    if not re.fullmatch(r"(/[\w-][\w.~-]*)+", found, re.ASCII):
        raise InvalidOption("root_path", found, "a path such as /sentiment, of letters, digits and -._~")
    if (first := found.split("/")[1]) in OWN_PATHS:
        raise InvalidOption("root_path", found, f"another one than /{first}, which is a path of the server itself")
