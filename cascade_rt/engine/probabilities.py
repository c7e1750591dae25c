"""From logits to class probabilities, and to the scores that exit rules compare with thresholds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_FEW = 8  # labels up to which Python's exp is faster for one text than a call of numpy's, whose last bit can differ


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Class probabilities, float64, over the last axis of `logits`; those of a row do not depend on the others."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    if shifted.shape[-1] > _FEW:
        exponentials = np.exp(shifted)
    else:
        exponentials = np.array(list(map(math.exp, shifted.ravel().tolist()))).reshape(shifted.shape)
    totals = exponentials.cumsum(axis=-1)[..., -1:]  # adds from left to right; `sum` has another order for each shape
    probabilities: NDArray[np.float64] = exponentials / totals
    return probabilities


def softmax_row(logits: NDArray[np.floating]) -> list[float]:
    """Class probabilities of one text, from logits (labels,): the bits of `softmax`, with fewer calls of numpy."""
    values: list[float] = logits.tolist()
    largest = max(values)
    if len(values) > _FEW:
        exponentials: list[float] = np.exp(logits.astype(np.float64) - largest).tolist()
    else:
        exponentials = [math.exp(value - largest) for value in values]
    total = 0.0
    for exponential in exponentials:  # Python's `sum` compensates for rounding since 3.12
        total += exponential
    return [exponential / total for exponential in exponentials]


def confidence(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Confidence c(x): the maximum class probability, over the last axis (paper, Eq. 4)."""
    maximum: NDArray[np.float64] = probabilities.max(axis=-1)
    return maximum


def certainty(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 minus the entropy as a share of the largest possible one, over the last axis: 0 if all classes are equal, to 1.

    1 minus FastBERT's uncertainty (Liu et al., 2020, Eq. 7); entropy = (1 - certainty) * ln(labels) is what DeeBERT
    compares with its threshold S (Xin et al., 2020, Algorithm 1).
    """
    logarithms = np.log(np.where(probabilities > 0, probabilities, 1.0))
    entropy = -(probabilities * logarithms).sum(axis=-1)
    certain: NDArray[np.float64] = np.clip(1 - entropy / math.log(probabilities.shape[-1]), 0.0, 1.0)
    return certain
