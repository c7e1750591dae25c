"""From logits to class probabilities, and to the scores that exit rules compare with thresholds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Class probabilities, float64, over the last axis of `logits`."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def softmax_row(logits: list[float]) -> list[float]:
    """Class probabilities of one text in plain Python, which is faster than five calls of numpy on so few numbers."""
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(exponentials)
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
