"""Softmax against SciPy's, in both of the runtime's forms."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax as expected_softmax

from cascade_rt.engine.probabilities import confidence, softmax, softmax_row

logits = arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32))


@given(logits)
def test_softmax_is_scipys(values: np.ndarray) -> None:
    expected = expected_softmax(values.astype(np.float64), axis=-1)
    np.testing.assert_allclose(softmax(values), expected, atol=1e-12)
    np.testing.assert_allclose([softmax_row(row) for row in values.tolist()], expected, atol=1e-12)


@given(logits)
def test_confidence_is_the_largest_probability(values: np.ndarray) -> None:
    probabilities = softmax(values)
    assert probabilities.dtype == np.float64
    assert confidence(probabilities).tolist() == [max(row) for row in probabilities.tolist()]
