"""Micro-batches: every row once, within the budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.engine.batching import by_length, micro_batches


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=50).map(lambda lengths: np.array(lengths, dtype=np.intp)),
    st.integers(1, 200),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    batches = list(micro_batches(by_length(lengths), lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= budget for batch in batches)
