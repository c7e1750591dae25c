"""Time members and cascade on single texts, in turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..runtime import CascadeRuntime
from ..types import Text
from .turns import batch_by_batch, in_turns

_ROUNDS = 5  # after one that warms up


def time_alone(runtime: CascadeRuntime, texts: Sequence[Text]) -> list[float]:
    """Return seconds per text of each member alone, then of the cascade: one text per call, the median of 5 rounds."""
    runtimes = [*(alone(runtime, index) for index in range(len(runtime.bundle.members))), runtime.with_trace(None)]
    contestants = {index: batch_by_batch(runtime) for index, runtime in enumerate(runtimes)}
    timed = in_turns(contestants, [[[text] for text in texts]], _ROUNDS)
    return [float(np.median(timed[index].seconds)) / len(texts) for index in contestants]


def alone(runtime: CascadeRuntime, index: int) -> CascadeRuntime:
    """Return a runtime in which one member answers every text; a segment runs those before it too."""
    bundle = runtime.bundle
    names = [member.name for member in bundle.members[bundle.chains[index] : index + 1]]
    return runtime.with_members(names).without_exits()
