"""Time members and cascade on single texts, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from ..runtime import CascadeRuntime
from ..types import Text

_ROUNDS = 5  # after one that warms up


def time_alone(runtime: CascadeRuntime, texts: Sequence[Text]) -> list[float]:
    """Return seconds per text of each member alone, then of the cascade: one text per call, the median of 5 rounds."""
    contestants = [*(alone(runtime, index) for index in range(len(runtime.bundle.members))), runtime.with_trace(None)]
    rounds = []
    for _ in range(1 + _ROUNDS):
        seconds = []
        for contestant in contestants:
            started = perf_counter()
            for text in texts:
                contestant.predict([text])
            seconds.append(perf_counter() - started)
        rounds.append(seconds)
    return (np.median(rounds[1:], axis=0) / len(texts)).tolist()  # type: ignore[no-any-return]


def alone(runtime: CascadeRuntime, index: int) -> CascadeRuntime:
    """Return a runtime in which one member answers every text; a segment runs those before it too."""
    bundle = runtime.bundle
    names = [member.name for member in bundle.members[bundle.chains[index] : index + 1]]
    return runtime.with_members(names).without_exits()
