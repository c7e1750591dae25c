"""Find the settings of execution with which a bundle is fastest on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from math import sqrt
from pathlib import Path
from time import sleep
from typing import NamedTuple

import numpy as np
import onnxruntime

from ..engine.cpus import usable_cpus
from ..engine.execution import Execution
from ..engine.providers import CUDA, OPENVINO, is_installed
from ..errors import CascadeError
from ..runtime import CascadeRuntime
from ..types import Text
from .turns import batch_by_batch, in_turns
from .workload import texts_for

_ALONE, _BULK = 24, 256  # texts
_ROUNDS = 5
_REST = 0.002  # seconds: more than threads spin


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
    """Return what can run a bundle here, the fastest first.

    Tried are providers, each with 1, half and all CPUs as threads, and on the CPU threads that spin and that do not.
    `data`: texts to measure on; None for ones made up of the vocabulary, of `words` ("MEAN:SD") each. Members and
    thresholds are those of tuning. Providers that cannot run the members' precisions are left out.
    """
    runtimes: list[tuple[Execution, CascadeRuntime]] = []
    for execution in _settings():
        with suppress(CascadeError):  # the provider has no kernels for the members
            runtimes.append((execution, CascadeRuntime(model_dir, preload=True, **execution.arguments())))
    if not runtimes:
        CascadeRuntime(model_dir, preload=True)  # raises the reason
    texts = texts_for(runtimes[0][1].bundle, data, words, _BULK)
    calls = [*([[text]] for text in texts[:_ALONE]), [texts]]
    contestants = {index: batch_by_batch(runtime) for index, (_, runtime) in enumerate(runtimes)}
    timed = in_turns(contestants, calls, _ROUNDS, wake=_rested)
    for _, runtime in runtimes:
        runtime.close()
    found = [
        Candidate(
            execution,
            1e3 * float(np.median(timed[index].seconds[:, :-1])),
            1e3 * float(np.median(timed[index].seconds[:, -1])) / len(texts),
        )
        for index, (execution, _) in enumerate(runtimes)
    ]
    return sorted(found, key=lambda candidate: candidate.cost)


def _settings() -> Iterator[Execution]:
    for provider in _providers():
        for threads in sorted({1, max(1, usable_cpus() // 2), usable_cpus()}):
            yield Execution(provider, threads)
            if provider == "cpu" and threads > 1:
                yield Execution(provider, threads, spin_us=0)


def _rested(_: object) -> list[list[Text]]:
    """Wait until threads of the runtime that ran before no longer spin; call the next one with nothing."""
    sleep(_REST)
    return []


def _providers() -> list[str]:
    found = ["cpu"]
    if CUDA in onnxruntime.get_available_providers():
        found.append("cuda")
    if is_installed(OPENVINO):
        found.append(OPENVINO)
    return found
