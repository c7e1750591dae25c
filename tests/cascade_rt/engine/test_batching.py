"""Micro-batches: every row once, within the budget, and about as much for each thread."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.engine.batching import (
    DEVICE_TOKEN_BUDGET,
    TOKEN_BUDGET,
    bulk_batches,
    by_length,
    micro_batches,
    token_budget,
    worth_a_thread,
)

lengths_of_texts = st.lists(st.integers(0, 60), min_size=1, max_size=50).map(lambda some: np.array(some, dtype=np.intp))


@given(lengths_of_texts, st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: np.ndarray, budget: int) -> None:
    batches = list(micro_batches(by_length(lengths), lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= budget for batch in batches)


@given(lengths_of_texts, st.integers(1, 200), st.integers(1, 5), st.integers(0, 200), st.data())
def test_bulk_batches_keep_all_threads_busy_or_leave_them_to_one_batch(
    lengths: np.ndarray, budget: int, threads: int, least: int, data: st.DataObject
) -> None:
    waiting = by_length(lengths)
    waiting = waiting[sorted(data.draw(st.sets(st.integers(0, len(waiting) - 1), min_size=1)))]  # the others have left
    batches, share_threads = bulk_batches(waiting, lengths, budget, threads, least)
    assert np.concatenate(batches).tolist() == waiting.tolist()
    if not share_threads:
        expected = micro_batches(waiting, lengths, budget)
        assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in expected]
        return
    assert len(batches) >= threads > 1
    tokens = [len(batch) * max(1, lengths[batch].max()) for batch in batches]
    assert max(tokens) <= max(budget, lengths.max())
    free = [0] * threads
    for count in tokens:
        first = min(range(threads), key=free.__getitem__)
        free[first] += count
    assert max(free) <= 1.1 * sum(tokens) / threads + 1e-9


def test_equal_texts_are_shared_and_a_long_one_beside_short_ones_is_not() -> None:
    equal = np.full(64, 16, dtype=np.intp)
    batches, share_threads = bulk_batches(by_length(equal), equal, 512, 2, 256)
    assert share_threads
    assert [len(batch) for batch in batches] == [32, 32]
    uneven = np.array([400, 20, 20, 20], dtype=np.intp)
    assert not bulk_batches(by_length(uneven), uneven, 512, 2, 256)[1]


def test_few_texts_are_shared_where_they_are_work_enough() -> None:
    few = np.full(8, 16, dtype=np.intp)
    of_384, of_768 = 43_000_000.0, 170_000_000.0  # FLOPs of 12 layers for a token
    assert not bulk_batches(by_length(few), few, 512, 2, worth_a_thread(512, of_768, "fp32"))[1]
    for flops in (of_384, of_768):
        batches, share_threads = bulk_batches(by_length(few), few, 512, 2, worth_a_thread(512, flops, "int8"))
        assert (share_threads, [len(batch) for batch in batches]) == (True, [4, 4])
    assert not bulk_batches(by_length(few), few, 512, 2, worth_a_thread(512, of_384 / 6, "int8"))[1], "2 layers"


@given(st.floats(0, 1e12), st.sampled_from([TOKEN_BUDGET, DEVICE_TOKEN_BUDGET]))
def test_a_budget_grows_for_cheap_members_alone(flops: float, usual: int) -> None:
    budget = token_budget(usual, flops)
    assert usual <= budget <= max(usual, 4096)
    assert budget == usual or flops * budget <= 5e6, "no more than gives a micro-batch enough to do"
    assert token_budget(usual, 400_000) == usual, "the smallest transformers have enough"
