"""Hidden states between segments: whatever micro-batches they came in, each text gets its own back."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.engine.hidden_states import HiddenStates


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.sampled_from(["left", "right"]),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_states_are_regrouped_without_the_padding_of_their_batch(
    lengths: list[int], padded: str, batch_size: int, draw: random.Random
) -> None:
    texts = [
        np.random.default_rng(row).normal(size=(length, 3)).astype(np.float32) for row, length in enumerate(lengths)
    ]
    kept = HiddenStates(np.array(lengths))
    draw.shuffle(order := list(range(len(lengths))))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        longest = max(lengths[row] for row in rows)
        states = np.full((len(rows), longest, 3), np.nan, dtype=np.float32)  # padding must not be read
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for at, row in enumerate(rows):
            span = slice(longest - lengths[row], longest) if padded == "left" else slice(lengths[row])
            states[at, span], mask[at, span] = texts[row], 1
        kept.put(np.array(rows), mask, states)
    some = draw.sample(range(len(lengths)), draw.randint(1, len(lengths)))
    batch = kept.batch(np.array(some))
    assert batch.keys() == {"hidden_states", "attention_mask"}
    assert batch["hidden_states"].shape == (len(some), max(lengths[row] for row in some), 3)
    for at, row in enumerate(some):
        np.testing.assert_array_equal(batch["hidden_states"][at, : lengths[row]], texts[row])
        assert batch["attention_mask"][at].tolist() == [1] * lengths[row] + [0] * (
            batch["attention_mask"].shape[1] - lengths[row]
        )
        assert not batch["hidden_states"][at, lengths[row] :].any()
