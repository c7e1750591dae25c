"""int8 weights: compensated rounding and smoothing against plain rounding, on activations that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from cascade_export.rounding import LARGEST, Inputs, compensated, rounded, smoothing, steps_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def drawn(seed: int, width: int, tokens: int, outputs: int = 8) -> tuple[Floats, Floats]:
    """Correlated activations (tokens, width) with some outlier channels, and weights (width, outputs)."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(tokens, width)) @ draw.normal(size=(width, width)) / np.sqrt(width)
    mixed[:, :: max(1, width // 3)] *= 20
    return mixed.astype(np.float32), draw.normal(size=(width, outputs)).astype(np.float32)


def measured(rows: Floats) -> Inputs:
    width = rows.shape[1]
    none = np.zeros(width, np.float32)
    inputs = Inputs(none, none, np.zeros((width, width), np.float32), 0)
    for part in np.array_split(rows, 3):
        inputs.add(part)
    return inputs


@given(st.integers(0, 1000), st.integers(40, 150))
@settings(max_examples=30)
def test_compensation_keeps_products_closer_than_the_nearest_integers(seed: int, width: int) -> None:
    both, weights = drawn(seed, width, tokens=16 * width)
    rows, fresh = np.array_split(both, 2)
    steps = steps_of(weights, axis=0)
    integers = compensated(weights, steps, measured(rows).products)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= LARGEST

    def error(values: NDArray[np.int8]) -> float:
        return float(np.square(fresh @ (values * steps - weights)).mean())

    assert error(integers) < error(rounded(weights / steps))


def test_compensation_of_independent_channels_is_plain_rounding() -> None:
    _, weights = drawn(0, 70, tokens=1)
    steps = steps_of(weights, axis=0)
    assert np.array_equal(compensated(weights, steps, np.eye(70, dtype=np.float32)), rounded(weights / steps))


@given(st.integers(0, 1000), st.integers(40, 100))
@settings(max_examples=30)
def test_smoothing_changes_no_product_and_evens_out_the_channels(seed: int, width: int) -> None:
    rows, weights = drawn(seed, width, tokens=50)
    factors = smoothing(measured(rows), [weights, 2 * weights], 0.6)
    smooth = rows / factors
    assert smooth @ (weights * factors[:, None]) == pytest.approx(rows @ weights, abs=1e-3 * float(np.abs(rows).max()))
    before, after = (np.abs(values).max(axis=0) for values in (rows, smooth))
    assert after.max() / after.min() < before.max() / before.min()


def test_channels_without_values_are_left_alone() -> None:
    rows = np.zeros((10, 6), dtype=np.float32)
    rows[:, 1] = 5
    inputs = measured(rows)
    weights = np.ones((6, 2), dtype=np.float32)
    factors = smoothing(inputs, [weights], 0.6)
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert np.isfinite(compensated(weights, steps_of(weights, axis=0), inputs.products)).all()
