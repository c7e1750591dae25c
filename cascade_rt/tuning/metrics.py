"""Accuracy, F1, the paper's Difficulty Inversion Score (DIS) and expected calibration error (ECE)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of predictions that equal the labels; both int, shape (texts,)."""
    truth, predicted = _aligned(labels, predictions)
    return float(np.mean(truth == predicted))


def f1(labels: ArrayLike, predictions: ArrayLike, classes: int = 2) -> float:
    """F1 of class 1 for two classes (GLUE's convention for MRPC and QQP), else the unweighted mean over classes.

    `labels` and `predictions` are class ids, int, shape (texts,). A class that neither occurs nor is predicted
    counts as 0, as in scikit-learn with `zero_division=0`.
    """
    truth, predicted = _aligned(labels, predictions)
    shown = np.array([1]) if classes == 2 else np.arange(classes)
    return f1_of_sets(truth[:, None] == shown, predicted[:, None] == shown)


def f1_of_sets(labels: NDArray[np.bool_], predictions: NDArray[np.bool_], *, micro: bool = False) -> float:
    """F1 of answers with several labels, bool (texts, labels): the unweighted mean over labels, or `micro`: of all.

    A label that neither occurs nor is predicted counts as 0.
    """
    hits = (labels & predictions).sum(axis=0)
    total = labels.sum(axis=0) + predictions.sum(axis=0)
    if micro:
        hits, total = hits.sum(keepdims=True), total.sum(keepdims=True)
    return float(np.mean(2 * hits / np.maximum(total, 1)))


def dis(correct: ArrayLike, confidence: ArrayLike) -> float:
    """Difficulty Inversion Score in [0, 1], higher is better (paper, section 2.2, Eq. 3).

    `correct`: bool, shape (texts,): the member was right, so the text is easy. `confidence`: float, same shape.
    An inversion is an (easy, difficult) pair in which the difficult text has the strictly higher confidence;
    DIS = 1 - inversions / (easy * difficult). Eq. (1)-(2) as printed can never count one (the instances are
    sorted so that c(x_j) <= c(x_i) for every j < i that the sum visits); the text around them says what is
    meant. NaN when all texts are easy or all are difficult, because then there is no pair.
    """
    easy, scores = _aligned(correct, confidence)
    easy = easy.astype(bool)
    easy_scores, difficult_scores = np.sort(scores[easy]), np.sort(scores[~easy])
    if not easy_scores.size or not difficult_scores.size:
        return float("nan")
    inversions = np.searchsorted(easy_scores, difficult_scores, side="left").sum()
    return float(1 - inversions / (easy_scores.size * difficult_scores.size))


def ece(correct: ArrayLike, confidence: ArrayLike, bins: int = 15, equal_mass: bool = False) -> float:
    """Expected calibration error in [0, 1], lower is better (paper, appendix B).

    Weighted mean over bins of |accuracy - mean confidence|. `correct`: bool, `confidence`: float in [0, 1], both
    shape (texts,). Bins have equal width, (k/bins, (k+1)/bins], or with `equal_mass` hold equally many texts.
    """
    right, scores = _aligned(correct, confidence)
    if equal_mass:
        groups = np.array_split(np.argsort(scores, kind="stable"), bins)
    else:
        bin_of = equal_width_bins(scores, bins)
        groups = [np.flatnonzero(bin_of == index) for index in range(bins)]
    gaps = [len(group) * abs(right[group].mean() - scores[group].mean()) for group in groups if len(group)]
    return float(sum(gaps) / len(scores))


def equal_width_bins(confidence: ArrayLike, bins: int) -> np.ndarray:
    """Return the bin, 0 to `bins` - 1, of each confidence in [0, 1]: bin k holds (k/bins, (k+1)/bins], and 0 bin 0."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")


def _aligned(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    one, two = np.asarray(first), np.asarray(second)
    if one.ndim != 1 or one.shape != two.shape or not one.size:
        raise InputError(f"found shapes {one.shape} and {two.shape}, expected two equally long, non-empty vectors")
    return one, two
