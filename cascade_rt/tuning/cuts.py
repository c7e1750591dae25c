"""Cuts: the probability from which a text has a label, one for each label, by the F1 that it gives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOWEST, _HIGHEST = 0.01, 0.99  # a cut at the edge would be decided by the last bits of a probability


def best_cuts(probabilities: NDArray[np.float64], labels: NDArray[np.bool_]) -> tuple[float, ...]:
    """Return for each label the cut with the highest F1 on some texts, from 0.01 to 0.99.

    `probabilities`: float64 (texts, labels); `labels`: the right ones, bool of the same shape. A cut is in the middle
    between two neighbouring probabilities; of equally good ones, the highest. A label that no text has gets 0.5.
    """
    return tuple(_best_cut(column, truth) for column, truth in zip(probabilities.T, labels.T, strict=True))


def _best_cut(probabilities: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    if not labels.any():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    descending = probabilities[order]
    scores = 2 * np.cumsum(labels[order]) / (np.arange(1, len(order) + 1) + labels.sum())  # of the first k texts
    below = np.append(descending[1:], 0.0)
    scores[descending == below] = -1.0  # no cut separates equal probabilities
    best = int(scores.argmax())
    return float(np.clip((descending[best] + below[best]) / 2, _LOWEST, _HIGHEST))
