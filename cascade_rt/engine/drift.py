"""Drift: are texts still of the kind that thresholds were tuned on? Exits seen are compared with those of tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAWS = 9_999
_MOST = 10**8  # counts above this are scaled down
SIGNIFICANT = 0.01
"""p-value below which texts are reported as changed."""


def exit_shift(tuned: Sequence[int], seen: Sequence[int]) -> tuple[float, float]:
    """Return the total variation distance between two counts of exits, and the p-value that they are alike.

    A permutation test of Pearson's chi-square statistic for homogeneity with 9,999 seeded draws, valid for any number
    of texts. `tuned`, `seen`: texts per exit, of equal length, each with at least one text.
    """
    counts = np.array([tuned, seen], dtype=np.int64)
    counts //= np.maximum(1, counts.sum(axis=1, keepdims=True) // _MOST)
    totals = counts.sum(axis=0)
    rates = counts / counts.sum(axis=1, keepdims=True)
    expected = totals * counts[1].sum() / totals.sum()
    present = totals > 0

    def statistic(drawn: np.ndarray) -> np.ndarray:
        # both margins are fixed, so the other sample's part is this one times a constant
        return np.asarray((((drawn - expected) ** 2)[..., present] / expected[present]).sum(axis=-1))

    draws = np.random.default_rng(0).multivariate_hypergeometric(
        totals, int(counts[1].sum()), size=_DRAWS, method="marginals"
    )
    as_far = int(np.sum(statistic(draws) >= statistic(counts[1]) - 1e-9))
    return float(np.abs(rates[0] - rates[1]).sum() / 2), (1 + as_far) / (1 + _DRAWS)
