"""Has the traffic changed? Exits of today against exits of tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 9_999
_MOST = 10**8  # texts counted one by one; of more, every k-th
SIGNIFICANT = 0.01


class Stats(NamedTuple):
    """What a runtime has answered so far."""

    texts: int
    """Texts answered."""
    exits: list[int]
    """How many of them each member answered."""
    mean_layers: float
    """Encoder layers executed per text; NaN before the first."""
    tuned_rates: list[float] | None
    """Share of texts that each member answered when the thresholds were tuned; None where they are not the tuned."""
    distance: float | None
    """Total variation distance from those rates, 0 (the same) to 1; None where there is nothing to compare."""
    p_value: float | None
    """Chance of a difference this large between texts of the same kind; 0.0001 is the smallest that is told."""


def exit_shift(tuned: Sequence[int], seen: Sequence[int]) -> tuple[float, float]:
    """Return the total variation distance between two counts of exits, and the p-value of their being alike.

    A permutation test of Pearson's chi-square statistic for homogeneity, by 9,999 seeded draws: it holds for any
    number of texts. `tuned`, `seen`: texts per exit, equally long, each of at least one text in all.
    """
    counts = np.array([tuned, seen], dtype=np.int64)
    counts //= np.maximum(1, counts.sum(axis=1, keepdims=True) // _MOST)
    totals = counts.sum(axis=0)
    rates = counts / counts.sum(axis=1, keepdims=True)
    expected = totals * counts[1].sum() / totals.sum()
    present = totals > 0

    def statistic(drawn: np.ndarray) -> np.ndarray:
        # the other sample's part is this one times a constant, as both margins are fixed
        return np.asarray((((drawn - expected) ** 2)[..., present] / expected[present]).sum(axis=-1))

    draws = np.random.default_rng(0).multivariate_hypergeometric(
        totals, int(counts[1].sum()), size=_DRAWS, method="marginals"
    )
    as_far = int(np.sum(statistic(draws) >= statistic(counts[1]) - 1e-9))
    return float(np.abs(rates[0] - rates[1]).sum() / 2), (1 + as_far) / (1 + _DRAWS)
