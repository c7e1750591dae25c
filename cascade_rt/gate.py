"""The gate between members: softmax, confidence, and who leaves (paper, Eq. 4 and Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from .errors import InputError


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Class probabilities, float64, over the last axis of `logits`."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def softmax_row(logits: list[float]) -> list[float]:
    """`softmax` of one text's logits in plain Python: on so few numbers faster than five calls of numpy."""
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(exponentials)
    return [exponential / total for exponential in exponentials]


def confidence(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Confidence c(x) = max over the classes (last axis) of the probability (Eq. 4)."""
    maximum: NDArray[np.float64] = probabilities.max(axis=-1)
    return maximum


def leaves(confidences: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Who leaves, bool of shape (texts,): c(x) > threshold, strictly (Algorithm 1)."""
    decisions: NDArray[np.bool_] = confidences > threshold
    return decisions


def exits(confidences: NDArray[np.float64], thresholds: Sequence[float]) -> NDArray[np.intp]:
    """Exit of each text, int of shape (texts,), when every member's confidence is known, shape (members, texts).

    `thresholds` holds one per member but the last, which always emits.
    """
    gates = [leaves(row, threshold) for row, threshold in zip(confidences[:-1], thresholds, strict=True)]
    everyone = np.ones(confidences.shape[1], dtype=bool)
    first: NDArray[np.intp] = np.argmax(np.stack([*gates, everyone]), axis=0)
    return first


def checked_thresholds(
    thresholds: float | Sequence[float] | None, stored: Sequence[float], members: int
) -> list[float]:
    """One threshold per member but the last.

    From None (the bundle's own), one number (a tau for all) or a list. Raises InputError for a wrong count or a
    value outside [0, 1].
    """
    if thresholds is None:
        return list(stored)
    if isinstance(thresholds, Real):
        return [_checked(thresholds)] * (members - 1)
    chosen = [_checked(threshold) for threshold in thresholds]  # type: ignore[union-attr]
    if len(chosen) != members - 1:
        raise InputError(f"found {len(chosen)} thresholds, expected {members - 1}: one per member but the last")
    return chosen


def _checked(threshold: object) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise InputError(f"found the threshold {threshold!r}, expected a number from 0 to 1")
    return float(threshold)
