"""Timing of contestants in turn, so that whatever slows the machine down for a while slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..runtime import CascadeRuntime
from ..types import Prediction, Text

Name = TypeVar("Name", bound=Hashable)
Call = TypeVar("Call")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Timed(Generic[Answer]):
    """One contestant's times and answers."""

    seconds: NDArray[np.float64]
    """Shape (rounds, calls)."""
    answers: list[Answer]
    """Those of the last round, one for each call."""


def in_turns(
    contestants: Mapping[Name, Callable[[Call], Answer]],
    calls: Sequence[Call],
    rounds: int,
    *,
    wake: Callable[[Call], Call] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[Name, Timed[Answer]]:
    """Time contestants on the same calls in `rounds` rounds, after one that warms up; each call is made by all in turn.

    The first in turn is another one from call to call and from round to round, so that none always runs after the same
    other. `wake`: makes of each call a smaller one, which a contestant answers before it, untimed. `progress` is called
    after every round.
    """
    names = list(contestants)
    seconds = {name: np.empty((1 + rounds, len(calls))) for name in names}
    answers: dict[Name, list[Answer]] = {}
    for round_ in range(1 + rounds):
        answers = {name: [] for name in names}
        for number, call in enumerate(calls):
            first = (number + round_) % max(1, len(names))
            for name in names[first:] + names[:first]:
                answer = contestants[name]
                if wake is not None:
                    answer(wake(call))
                started = perf_counter()
                found = answer(call)
                seconds[name][round_, number] = perf_counter() - started
                answers[name].append(found)
        progress()
    return {name: Timed(seconds[name][1:], answers[name]) for name in names}


def batch_by_batch(runtime: CascadeRuntime) -> Callable[[Sequence[Sequence[Text]]], list[list[Prediction]]]:
    """Return a contestant whose calls are sequences of batches; it calls `predict` with each of them."""
    return lambda batches: [runtime.predict(batch) for batch in batches]
