"""Settings of execution: one value that constructors, jobs, servers and benchmarks pass on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Execution:
    """Where members run: the arguments of `CascadeRuntime` of the same names, which checks them."""

    provider: str = "cpu"
    threads: int | None = None
    provider_options: Mapping[str, str] | None = None
    spin_us: int | None = None
    cache: str | Path | None = None
    low_memory: bool = False
    word_cache: bool = True
    packed: bool = True

    def arguments(self) -> dict[str, Any]:
        """Return them as keyword arguments of `CascadeRuntime`."""
        return asdict(self)
