"""Find the settings of execution with which a bundle is fastest on this machine."""

from __future__ import annotations

from contextlib import suppress
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from ..engine.cpus import usable_cpus
from ..engine.execution import Execution
from ..engine.providers import CUDA, OPENVINO, is_installed
from ..errors import CascadeError
from ..runtime import CascadeRuntime
from .turns import batch_by_batch, in_turns
from .workload import texts_for

_ALONE, _BULK = 24, 256  # texts
_ROUNDS = 5


class Candidate(NamedTuple):
    """Settings, and what they took: medians of rounds in which all candidates took turns."""

    execution: Execution
    alone_ms: float
    """One text per call."""
    bulk_ms: float
    """Per text of many in one call."""

    @property
    def cost(self) -> float:
        """The geometric mean of both times."""
        return sqrt(self.alone_ms * self.bulk_ms)


def adapt(model_dir: str | Path, *, data: Path | None = None, words: str = "10:5") -> list[Candidate]:
    """Return what can run a bundle here, the fastest first: providers, each with 1, half and all CPUs as threads.

    `data`: texts to measure on; None for ones made up of the vocabulary, of `words` ("MEAN:SD") each. Members and
    thresholds are those of tuning. Providers that cannot run the members' precisions are left out.
    """
    runtimes: dict[tuple[str, int], CascadeRuntime] = {}
    for provider in _providers():
        for threads in sorted({1, max(1, usable_cpus() // 2), usable_cpus()}):
            with suppress(CascadeError):  # it has no kernels for the members
                runtimes[provider, threads] = CascadeRuntime(
                    model_dir, provider=provider, threads=threads, preload=True
                )
    if not runtimes:
        CascadeRuntime(model_dir, preload=True)  # raises the reason
    bundle = next(iter(runtimes.values())).bundle
    texts = texts_for(bundle, data, words, _BULK)
    calls = [*([[text]] for text in texts[:_ALONE]), [texts]]
    timed = in_turns({name: batch_by_batch(runtime) for name, runtime in runtimes.items()}, calls, _ROUNDS)
    for runtime in runtimes.values():
        runtime.close()
    found = [
        Candidate(
            Execution(provider, threads),
            1e3 * float(np.median(timed[provider, threads].seconds[:, :-1])),
            1e3 * float(np.median(timed[provider, threads].seconds[:, -1])) / len(texts),
        )
        for provider, threads in runtimes
    ]
    return sorted(found, key=lambda candidate: candidate.cost)


def _providers() -> list[str]:
    found = ["cpu"]
    if CUDA in onnxruntime.get_available_providers():
        found.append("cuda")
    if is_installed(OPENVINO):
        found.append(OPENVINO)
    return found
