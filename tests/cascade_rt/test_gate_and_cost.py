"""Softmax, the strict gate, and speed-up ratios against figures worked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade_rt.bundle import MemberEntry
from cascade_rt.cost import flops_speedup, layer_speedup, member_flops
from cascade_rt.errors import InputError
from cascade_rt.gate import checked_thresholds, confidence, exits, leaves, softmax
from cascade_rt.thresholds import threshold_for_speedup

logits = arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32))


def entry(layers: int, hidden: int = 768) -> MemberEntry:
    return MemberEntry(f"{layers}L", f"{layers}.onnx", "", layers, hidden, 1, "fp32", None)


@given(logits)
def test_softmax_is_torchs(values: np.ndarray) -> None:
    expected = torch.softmax(torch.tensor(values, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(softmax(values), expected, atol=1e-12)


@given(logits)
def test_threshold_one_keeps_everyone_and_zero_lets_everyone_go(values: np.ndarray) -> None:
    scores = confidence(softmax(values))
    assert not leaves(scores, 1.0).any()
    assert leaves(scores, 0.0).all()


def test_the_gate_is_strict() -> None:
    assert leaves(np.array([0.8, 0.80001]), 0.8).tolist() == [False, True]


@given(arrays(float, (3, 20), elements=st.floats(0.3, 1)), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_exits_are_algorithm_1_text_by_text(confidences: np.ndarray, taus: list[float]) -> None:
    def walk(column: np.ndarray) -> int:
        for member, tau in enumerate(taus):
            if column[member] > tau:
                return member
        return 2

    assert exits(confidences, taus).tolist() == [walk(column) for column in confidences.T]


def test_layer_speedup_counts_every_member_that_ran() -> None:
    # The paper's example: a 2-layer, then a 4-layer member under a 12-layer original is 12 / 6.
    assert layer_speedup([entry(2), entry(4), entry(12)], np.array([1])) == pytest.approx(2)
    # Half exit at 2 layers, half run 2 + 12: 24 / 16.
    assert layer_speedup([entry(2), entry(12)], np.array([0, 1])) == pytest.approx(1.5)


def test_flops_of_a_bert_base_layer_are_the_papers() -> None:
    # 1809.9M a layer in the paper (128 tokens), which leaves out the products of the attention itself.
    attention = 2 * 2 * 768 * 128**2
    assert member_flops(entry(1), np.array([128]))[0] - attention == pytest.approx(1809.9e6, rel=2e-3)


def test_flops_speedup_equals_layer_speedup_for_equal_widths_and_lengths() -> None:
    members, left = [entry(2), entry(6), entry(12)], np.array([0, 0, 1, 2])
    expected = layer_speedup(members, left)
    assert flops_speedup(members, left, np.full(4, 17)) == pytest.approx(expected)


def test_flops_speedup_knows_that_a_narrow_member_is_cheap() -> None:
    members = [entry(2, hidden=128), entry(12)]
    assert flops_speedup(members, np.array([0, 0]), np.array([9, 30])) > 100


@given(arrays(float, (2, 50), elements=st.floats(0.5, 1)), st.floats(1.01, 3.0))
def test_threshold_for_speedup_is_the_highest_that_reaches_it(confidences: np.ndarray, wanted: float) -> None:
    members = [entry(2), entry(6)]
    tau = threshold_for_speedup(members, confidences, wanted)
    assert layer_speedup(members, exits(confidences, [tau])) >= wanted
    higher = confidences[0][confidences[0] > tau]
    if higher.size:
        assert layer_speedup(members, exits(confidences, [float(higher.min())])) < wanted


def test_a_speedup_out_of_reach_is_refused() -> None:
    with pytest.raises(InputError, match=r"up to 3\.00"):
        threshold_for_speedup([entry(2), entry(6)], np.full((2, 4), 0.9), 3.5)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), True, "0.5", [0.5], [0.5, 0.5, 0.5], [0.5, None]])
def test_thresholds_out_of_range_or_number_are_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="threshold"):
        checked_thresholds(wrong, [0.9, 0.9], 3)  # type: ignore[arg-type]


def test_thresholds_come_from_the_bundle_or_one_number_or_a_list() -> None:
    assert checked_thresholds(None, [0.7, 0.9], 3) == [0.7, 0.9]
    assert checked_thresholds(1, [0.7, 0.9], 3) == [1.0, 1.0]
    assert checked_thresholds(np.float64(0.5), [0.7, 0.9], 3) == [0.5, 0.5]
    assert checked_thresholds(0.5, [], 1) == []
    with pytest.raises(InputError, match="found the threshold 1.5"):
        checked_thresholds(1.5, [], 1)
    assert checked_thresholds((0.2, 0.3), [0.7, 0.9], 3) == [0.2, 0.3]
