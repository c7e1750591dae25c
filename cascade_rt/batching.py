"""Micro-batches: texts of like length together, so that little is computed on padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

TOKEN_BUDGET = 1024
"""Padded tokens per micro-batch."""


def by_length(lengths: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the rows from the longest to the shortest text, shape (texts,); equal lengths keep input order."""
    return np.argsort(-lengths, kind="stable")


def micro_batches(
    rows: NDArray[np.intp], lengths: NDArray[np.intp], budget: int = TOKEN_BUDGET
) -> Iterator[NDArray[np.intp]]:
    """Cut `rows`, ordered by `by_length`, into runs of at most `budget` padded tokens, at least one row each.

    The survivors of a gate are still in that order, so regrouping them is to call this again.
    """
    start = 0
    while start < len(rows):
        longest = max(1, int(lengths[rows[start]]))
        end = start + max(1, budget // longest)
        yield rows[start:end]
        start = end
