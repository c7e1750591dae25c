"""Exits of today against those of tuning: distance and significance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from cascade_rt.engine.drift import exit_shift


@settings(max_examples=30)
@given(st.lists(st.integers(40, 400), min_size=2, max_size=4), st.lists(st.integers(40, 400), min_size=4, max_size=4))
def test_the_p_value_is_the_chi_square_tests_where_that_holds(tuned: list[int], seen: list[int]) -> None:
    seen = seen[: len(tuned)]
    distance, p_value = exit_shift(tuned, seen)
    # Counts are whole numbers: where few tables are possible, Yates' correction says how much that matters.
    low, high = (chi2_contingency([tuned, seen], correction=yates).pvalue for yates in (False, True))
    assert max(low, 1e-4) - 0.1 <= p_value <= max(high, 1e-4) + 0.1
    shares = np.abs(np.array(tuned) / sum(tuned) - np.array(seen) / sum(seen))
    assert distance == pytest.approx(shares.sum() / 2)


def test_texts_of_the_same_kind_are_rarely_called_changed() -> None:
    generator = np.random.default_rng(0)
    draws = generator.multinomial(30, [0.9, 0.08, 0.02], size=(300, 2))  # few: no chi-square table would hold
    low = np.mean([exit_shift(one.tolist(), other.tolist())[1] < 0.05 for one, other in draws])
    assert low <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_other_texts_are_called_changed() -> None:
    distance, p_value = exit_shift([700, 300], [50, 50])
    assert distance == pytest.approx(0.2)
    assert p_value < 0.01
    assert exit_shift([700, 300], [7, 3])[1] > 0.9
    assert exit_shift([5, 0], [9, 0]) == (0.0, 1.0)
    assert exit_shift([700, 300], [7 * 10**11, 3 * 10**11])[1] > 0.9
    assert exit_shift([7 * 10**8, 3 * 10**8], [5 * 10**11, 5 * 10**11])[1] < 0.01
