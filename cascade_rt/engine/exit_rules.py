"""Exit rules: after each stage, which texts leave with its answer.

A rule is immutable and shared. `begin` returns what decides for the texts of one call, which may keep a state per text.
At the last stage every text leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle.manifest import ENTROPY, MAXIMUM_PROBABILITY, PATIENCE
from ..errors import InvalidOption
from .probabilities import certainty, confidence

SCORES = {MAXIMUM_PROBABILITY: confidence, ENTROPY: certainty}
"""What a rule with thresholds compares with them: float64 (texts,) from 0 to 1, from probabilities (texts, labels)."""


class Decisions(Protocol):
    """The decisions of an exit rule for the texts of one call."""

    def leaving(self, stage: int, rows: NDArray[np.intp], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which texts leave after `stage`, bool (rows,).

        `rows`: positions of the texts in the call, (rows,). `probabilities`: of the classes, (rows, labels).
        """

    def leaves_alone(self, stage: int, probabilities: list[float]) -> bool:
        """Return whether the only text of a call leaves after `stage`."""


class ExitRule(Protocol):
    """Decides after each stage which texts leave."""

    def begin(self, texts: int) -> Decisions:
        """Return the decisions for a call with this many texts."""


class Thresholds:
    """Leave where a score exceeds the stage's threshold, strictly.

    "maximum_probability": the largest class probability (paper, Algorithm 1). "entropy": the certainty, 1 minus the
    normalised entropy (DeeBERT, FastBERT).
    """

    def __init__(self, thresholds: Sequence[float], kind: str = MAXIMUM_PROBABILITY) -> None:
        """`thresholds`: one for each stage but the last."""
        self.thresholds = tuple(thresholds)
        self.score = SCORES[kind]
        self._largest = kind == MAXIMUM_PROBABILITY
        self._all = (*self.thresholds, -math.inf)

    def begin(self, texts: int) -> Thresholds:
        """Return the rule itself: it keeps no state."""
        return self

    def leaving(self, stage: int, rows: NDArray[np.intp], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which texts leave after `stage`, bool (rows,)."""
        decisions: NDArray[np.bool_] = self.score(probabilities) > self._all[stage]
        return decisions

    def leaves_alone(self, stage: int, probabilities: list[float]) -> bool:
        """Return whether the only text of a call leaves after `stage`."""
        score = max(probabilities) if self._largest else float(self.score(np.array(probabilities)))
        return score > self._all[stage]


class Patience:
    """Leave when this many stages in a row have chosen the class of the one before them (PABEE; Zhou et al., 2020)."""

    def __init__(self, patience: int, stages: int) -> None:
        """`patience`: how many stages must agree with the one before them; `stages`: number of stages."""
        self.patience = patience
        self._last = stages - 1

    def begin(self, texts: int) -> Decisions:
        """Return counts for a call with this many texts."""
        return _Agreements(self.patience, self._last, texts)


class _Agreements:
    """Counts, for each text, how many stages in a row have agreed with the one before them."""

    def __init__(self, patience: int, last: int, texts: int) -> None:
        self._patience = patience
        self._last = last
        self._classes = np.full(texts, -1, dtype=np.intp)
        self._counts = np.zeros(texts, dtype=np.intp)

    def leaving(self, stage: int, rows: NDArray[np.intp], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
        classes = probabilities.argmax(axis=-1)
        self._counts[rows] = np.where(classes == self._classes[rows], self._counts[rows] + 1, 0)
        self._classes[rows] = classes
        decisions: NDArray[np.bool_] = (self._counts[rows] >= self._patience) | (stage == self._last)
        return decisions

    def leaves_alone(self, stage: int, probabilities: list[float]) -> bool:
        return bool(self.leaving(stage, np.zeros(1, dtype=np.intp), np.array([probabilities]))[0])


def exit_rule(settings: Mapping[str, Any], thresholds: Sequence[float], stages: int) -> ExitRule:
    """Return the rule that a manifest's `exit_rule` describes, for this many stages."""
    if settings["kind"] == PATIENCE:
        return Patience(settings["patience"], stages)
    return Thresholds(thresholds, settings["kind"])


def exits_under(rule: ExitRule, probabilities: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the exit of each text, int (texts,), from all probabilities, float64 (stages, texts, labels)."""
    texts = probabilities.shape[1]
    decisions = rule.begin(texts)
    exits = np.full(texts, len(probabilities) - 1, dtype=np.intp)
    waiting = np.arange(texts)
    for stage, answers in enumerate(probabilities[:-1]):
        leaving = decisions.leaving(stage, waiting, answers[waiting])
        exits[waiting[leaving]] = stage
        waiting = waiting[~leaving]
    return exits


def exits(scores: NDArray[np.float64], thresholds: Sequence[float]) -> NDArray[np.intp]:
    """Return the exit of each text, int (texts,), from the scores that thresholds are compared with, (members, texts).

    `thresholds`: one per member but the last, which always answers.
    """
    leaving = [row > threshold for row, threshold in zip(scores[:-1], thresholds, strict=True)]
    everyone = np.ones(scores.shape[1], dtype=bool)
    first: NDArray[np.intp] = np.argmax(np.stack([*leaving, everyone]), axis=0)
    return first


def patient_exits(classes: NDArray[np.intp], patience: int) -> NDArray[np.intp]:
    """Return the exit of each text, int (texts,), under patience, from the class of each stage, int (stages, texts)."""
    last = len(classes) - 1
    found = np.full(classes.shape[1], last, dtype=np.intp)
    counts = np.zeros(classes.shape[1], dtype=np.intp)
    for stage in range(1, last):
        counts = np.where(classes[stage] == classes[stage - 1], counts + 1, 0)
        found = np.where((counts >= patience) & (found == last), stage, found)
    return found


def checked_thresholds(
    thresholds: float | Sequence[float] | None, stored: Sequence[float], members: int
) -> list[float]:
    """Return one threshold per member but the last: the bundle's own for None, one number for all, or a list.

    Raises InvalidOption for a wrong count or a value outside [0, 1].
    """
    if thresholds is None:
        return list(stored)
    if isinstance(thresholds, Real):
        return [_checked(thresholds)] * (members - 1)
    if isinstance(thresholds, str | bytes | Mapping) or np.ndim(thresholds) != 1:
        raise InvalidOption("thresholds", thresholds, "a number from 0 to 1, or a list of one per member but the last")
    chosen = [_checked(threshold) for threshold in np.asarray(thresholds, dtype=object).tolist()]
    if len(chosen) != members - 1:
        raise InvalidOption("thresholds", chosen, f"{members - 1} of them: one per member but the last")
    return chosen


def _checked(threshold: object) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise InvalidOption("thresholds", threshold, "a number from 0 to 1")
    return float(threshold)
