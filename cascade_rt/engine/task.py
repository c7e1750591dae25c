"""Tasks: the meaning of logits. All probabilities, answers, labels and scores are computed here.

A task is immutable. `name` is its name in the manifest, `several` says whether a text can have several labels or none,
and `function` names the function from logits to probabilities. Logits and probabilities are arrays of shape (...,
labels), the latter float64; those of a text do not depend on the others. Answers are class ids, int (...), or with
several labels which of them, bool (..., labels). Methods that end in `_of_one` take one text as plain numbers, with the
bits of their counterparts and fewer calls of numpy; `winner` is the first of its most probable classes.

The answers to the windows of a long text become one by their probabilities, not by their logits: a softmax does not
change when a number is added to all logits of a window, so that logits of different windows have no common zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import gt
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..bundle.manifest import MULTI_LABEL, SINGLE_LABEL

MEAN, MAX = "mean", "max"
AGGREGATES = (MEAN, MAX)
"""Ways to make one answer of those to the windows of a text."""

_TINY = float(np.finfo(np.float64).tiny)  # where a cut of 0 meets a probability of 0
_FEW = 8  # labels up to which Python's exp is faster for one text than a call of numpy's, whose last bit can differ


@dataclass(frozen=True)
class SingleLabel:
    """One label per text: the most probable one."""

    name: ClassVar[str] = SINGLE_LABEL
    several: ClassVar[bool] = False
    function: ClassVar[str] = "softmax"

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the softmax of the logits, over the last axis."""
        exponentials = _exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        totals = exponentials.cumsum(axis=-1)[..., -1:]  # adds from left to right; `sum` has an order for each shape
        probabilities: NDArray[np.float64] = exponentials / totals
        return probabilities

    def probabilities_of_one(self, logits: NDArray[np.floating]) -> tuple[list[float], int]:
        """Return the softmax of the logits of one text, and the winner."""
        if len(logits) > _FEW:
            wide = logits.astype(np.float64)
            wide -= wide.item(wide.argmax())  # a quarter of the time of `max`
            np.exp(wide, out=wide)
            wide /= np.add.accumulate(wide).item(-1)
            return wide.tolist(), int(wide.argmax())
        values: list[float] = logits.tolist()
        largest = max(values)
        exponentials = [math.exp(value - largest) for value in values]
        total = 0.0
        for exponential in exponentials:  # Python's `sum` compensates for rounding since 3.12
            total += exponential
        found = [exponential / total for exponential in exponentials]
        return found, found.index(max(found))

    def aggregated(self, logits: NDArray[np.floating], aggregate: str) -> NDArray[np.float64]:
        """Return logits, (labels,), of one text from those of its windows, (windows, labels).

        Their softmax is the mean of the windows' probabilities, or the largest of each class, over their sum.
        """
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        largest: NDArray[np.float64] = wide.max(axis=0)
        return largest if aggregate == MAX else _log_of_mean(wide)

    def answers(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """Return the most probable class of each text, int (...)."""
        classes: NDArray[Any] = probabilities.argmax(axis=-1)
        return classes

    def labels(self, names: Sequence[str], probabilities: Sequence[float], winner: int) -> tuple[str, ...]:
        """Return the most probable label alone."""
        return (names[winner],)

    def equal(self, answers: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where two class ids are the same."""
        same: NDArray[np.bool_] = answers == others
        return same

    def probability_of(self, answers: NDArray[Any], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how probable answers, int (members, texts), are under probabilities (texts, labels)."""
        found: NDArray[np.float64] = probabilities[np.arange(len(probabilities)), answers]
        return found

    def indicators(self, answers: NDArray[Any], labels: int) -> NDArray[np.bool_]:
        """Return one True for each text, bool (..., labels)."""
        found: NDArray[np.bool_] = answers[..., None] == np.arange(labels)
        return found

    def confidence(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the largest class probability (paper, Eq. 4)."""
        maximum: NDArray[np.float64] = probabilities.max(axis=-1)
        return maximum

    def confidence_of_one(self, probabilities: list[float], winner: int) -> float:
        """Return the largest class probability of one text."""
        return probabilities[winner]

    def certainty(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 1 minus the entropy as a share of ln(labels): 0 if all classes are equal, to 1.

        1 minus FastBERT's uncertainty (Liu et al., 2020, Eq. 7); entropy = (1 - certainty) * ln(labels) is what DeeBERT
        compares with its threshold S (Xin et al., 2020, Algorithm 1).
        """
        entropy = _entropy_terms(probabilities).sum(axis=-1)
        certain: NDArray[np.float64] = np.clip(1 - entropy / math.log(probabilities.shape[-1]), 0.0, 1.0)
        return certain


@dataclass(frozen=True)
class MultiLabel:
    """Several labels per text, or none: those whose probability is above their cut."""

    cuts: tuple[float, ...]
    """One for each label, 0 to 1."""

    name: ClassVar[str] = MULTI_LABEL
    several: ClassVar[bool] = True
    function: ClassVar[str] = "sigmoid"

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the sigmoid of each logit."""
        wide = logits.astype(np.float64)
        exponentials = _exp(-np.abs(wide))
        probabilities: NDArray[np.float64] = np.where(wide < 0, exponentials, 1.0) / (1.0 + exponentials)
        return probabilities

    def probabilities_of_one(self, logits: NDArray[np.floating]) -> tuple[list[float], int]:
        """Return the sigmoid of each logit of one text, and the winner."""
        found = self.probabilities(logits)
        return found.tolist(), int(found.argmax())

    def aggregated(self, logits: NDArray[np.floating], aggregate: str) -> NDArray[np.float64]:
        """Return logits, (labels,), of one text from those of its windows, (windows, labels).

        Their sigmoid is the mean of the windows' probabilities, or the largest, label by label.
        """
        wide = logits.astype(np.float64)
        if aggregate == MAX:
            largest: NDArray[np.float64] = wide.max(axis=0)
            return largest
        return _log_of_mean(-np.logaddexp(0.0, -wide)) - _log_of_mean(-np.logaddexp(0.0, wide))

    def answers(self, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """Return which labels are above their cut, bool (..., labels)."""
        above: NDArray[Any] = probabilities > np.array(self.cuts)
        return above

    def labels(self, names: Sequence[str], probabilities: Sequence[float], winner: int) -> tuple[str, ...]:
        """Return the labels above their cut, in the order of the bundle's labels."""
        return tuple(compress(names, map(gt, probabilities, self.cuts)))

    def equal(self, answers: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where two sets of labels are the same."""
        same: NDArray[np.bool_] = (answers == others).all(axis=-1)
        return same

    def probability_of(self, answers: NDArray[Any], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how probable sets of labels, bool (members, texts, labels), are if labels are independent."""
        found: NDArray[np.float64] = np.where(answers, probabilities, 1.0 - probabilities).prod(axis=-1)
        return found

    def indicators(self, answers: NDArray[Any], labels: int) -> NDArray[np.bool_]:
        """Return the answers as they are, bool (..., labels)."""
        return answers

    def confidence(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the smallest distance of a label's probability from its cut, 0.5 to 1.

        That of p from the cut c is sigmoid(|logit(p) - logit(c)|): with a cut of 0.5 the probability of the decision, p
        of a label above it, 1 - p of another.
        """
        cuts = np.array(self.cuts)
        above, below = probabilities * (1.0 - cuts), cuts * (1.0 - probabilities)
        distances = np.maximum(above, below) / np.maximum(above + below, _TINY)
        least: NDArray[np.float64] = distances.min(axis=-1)
        return least

    def confidence_of_one(self, probabilities: list[float], winner: int) -> float:
        """Return the smallest distance of a label's probability from its cut, of one text."""
        least = 1.0
        for p, cut in zip(probabilities, self.cuts, strict=True):
            above, below = p * (1.0 - cut), cut * (1.0 - p)
            least = min(least, max(above, below) / max(above + below, _TINY))
        return least

    def certainty(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 1 minus the mean entropy of the decisions as a share of ln(2)."""
        entropy = (_entropy_terms(probabilities) + _entropy_terms(1.0 - probabilities)).mean(axis=-1)
        certain: NDArray[np.float64] = np.clip(1 - entropy / math.log(2), 0.0, 1.0)
        return certain


Task = SingleLabel | MultiLabel
"""The meaning of logits."""


def task_of(bundle: Bundle) -> Task:
    """Return the task that a manifest names."""
    if bundle.task == SINGLE_LABEL:
        return SingleLabel()
    return MultiLabel(bundle.cuts or (0.5,) * len(bundle.labels))


def _log_of_mean(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm of the mean over the first axis of numbers that are given by theirs."""
    largest = logarithms.max(axis=0)
    mean: NDArray[np.float64] = largest + np.log(np.exp(logarithms - largest).mean(axis=0))
    return mean


def _exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if values.shape[-1] > _FEW:
        exponentials: NDArray[np.float64] = np.exp(values)
        return exponentials
    return np.array(list(map(math.exp, values.ravel().tolist()))).reshape(values.shape)


def _entropy_terms(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    terms: NDArray[np.float64] = -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0)))
    return terms
