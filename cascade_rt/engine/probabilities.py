"""From logits to class probabilities and confidence."""

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
