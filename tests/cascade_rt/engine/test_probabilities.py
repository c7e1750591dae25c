"""Softmax against SciPy's, in both of the runtime's forms."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax as expected_softmax

from cascade_rt.bundle.manifest import ENTROPY, MAXIMUM_PROBABILITY
from cascade_rt.engine.exit_rules import Thresholds
from cascade_rt.engine.probabilities import confidence, softmax, softmax_row

logits = arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32))


@given(logits)
def test_softmax_is_scipys(values: np.ndarray) -> None:
    expected = expected_softmax(values.astype(np.float64), axis=-1)
    np.testing.assert_allclose(softmax(values), expected, atol=1e-12)
    np.testing.assert_allclose([softmax_row(row) for row in values], expected, atol=1e-12)


@st.composite
def batches(draw: st.DrawFn) -> np.ndarray:
    """Logits of any width and scale, with ties and values that are far apart."""
    width = draw(st.one_of(st.integers(1, 20), st.integers(21, 200), st.sampled_from([8, 16, 128, 129])))
    rows = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 5.0, 300.0, 1e30]))
    values = np.random.default_rng(seed).normal(0, 1, (rows, width)) * scale
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    some = draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, width - 1)), max_size=6))
    for (row, column), value in zip(some, draw(st.permutations([3e38, -3e38, 0.0, -0.0, 88.0, -745.0])), strict=False):
        values[row, column] = value
    return np.asarray(draw(st.sampled_from([values, values.round(1), np.asfortranarray(values)]))).astype(dtype)


@given(batches(), st.sampled_from([MAXIMUM_PROBABILITY, ENTROPY]), st.floats(0, 1))
def test_a_row_alone_and_among_others_has_the_same_bits_and_decision(
    values: np.ndarray, kind: str, threshold: float
) -> None:
    together = softmax(values)
    alone = [softmax_row(row) for row in values]
    assert [[p.hex() for p in row] for row in alone] == [[p.hex() for p in row] for row in together.tolist()]
    assert together.tolist() == [softmax(row[None])[0].tolist() for row in values]
    np.testing.assert_allclose(together, expected_softmax(values.astype(np.float64), axis=-1), atol=1e-12)
    if kind == ENTROPY and values.shape[1] == 1:
        return  # no entropy among one class
    for chosen in (threshold, together.max()):
        rule = Thresholds([min(1.0, float(chosen))], kind)
        leaving = rule.leaving(0, np.arange(len(values)), together).tolist()
        assert leaving == [rule.leaves_alone(0, row) for row in alone]


@given(logits)
def test_confidence_is_the_largest_probability(values: np.ndarray) -> None:
    probabilities = softmax(values)
    assert probabilities.dtype == np.float64
    assert confidence(probabilities).tolist() == [max(row) for row in probabilities.tolist()]
