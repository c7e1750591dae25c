"""Speed-up ratios against figures worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cascade_rt.bundle import MemberEntry
from cascade_rt.engine.cost import cumulative_layers, flops_speedup, layer_speedup, whole_model


def entry(layers: int, hidden: int = 768, reads: str = "tokens") -> MemberEntry:
    return MemberEntry(f"{layers}L", f"{layers}.onnx", "", layers, hidden, 1, "fp32", None, reads=reads)


def test_layer_speedup_counts_every_member_that_ran() -> None:
    # The paper's example: a 2-layer, then a 4-layer member under a 12-layer original is 12 / 6.
    assert layer_speedup([entry(2), entry(4), entry(12)], np.array([1])) == pytest.approx(2)
    # Half exit at 2 layers, half run 2 + 12: 24 / 16.
    assert layer_speedup([entry(2), entry(12)], np.array([0, 1])) == pytest.approx(1.5)


def test_segments_are_compared_with_their_whole_model() -> None:
    chain = [entry(4), entry(4, reads="hidden_states"), entry(4, reads="hidden_states")]
    assert cumulative_layers(chain).tolist() == [4, 8, 12]
    assert list(whole_model(chain)) == chain
    # One text after 4 layers, one after 8, one after 12, of a model of 12: 36 / 24.
    assert layer_speedup(chain, np.array([0, 1, 2])) == pytest.approx(1.5)
    assert flops_speedup(chain, np.array([0, 1, 2]), np.full(3, 20)) == pytest.approx(1.5)
    # A 2-layer member before the chain is not part of the model, but costs what it costs: 24 / (2 + 14).
    mixed = [entry(2), *chain]
    assert list(whole_model(mixed)) == chain
    assert layer_speedup(mixed, np.array([0, 3])) == pytest.approx(24 / 16)


def test_the_original_can_be_named() -> None:
    # The first member alone, of a bundle whose biggest has 12 layers.
    assert layer_speedup([entry(2)], np.array([0, 0]), [entry(12)]) == pytest.approx(6)
    assert flops_speedup([entry(2)], np.array([0, 0]), np.array([5, 9]), [entry(12)]) == pytest.approx(6)


def test_the_flops_of_exits_are_those_that_ran() -> None:
    chain = [replace(entry(1), exit_flops=(7, 5, 3)), entry(1, reads="hidden_states")]
    lengths = np.array([2, 10])
    np.testing.assert_allclose(chain[0].cost(lengths) - entry(1).cost(lengths), [7 + 5 * 2 + 3 * 4, 7 + 50 + 300])
    whole = entry(2).cost(lengths).sum() + 29 + 357
    assert flops_speedup(chain, np.array([1, 1]), lengths) == pytest.approx(1), "the original has its exits too"
    assert flops_speedup(chain, np.array([1, 1]), lengths, [entry(2)]) == pytest.approx(
        entry(2).cost(lengths).sum() / whole
    )


def test_flops_of_a_bert_base_layer_are_the_papers() -> None:
    # 1809.9M a layer in the paper (128 tokens), which leaves out the products of the attention itself.
    attention = 2 * 2 * 768 * 128**2
    assert entry(1).cost(np.array([128]))[0] - attention == pytest.approx(1809.9e6, rel=2e-3)


def test_flops_speedup_equals_layer_speedup_for_equal_widths_and_lengths() -> None:
    members, left = [entry(2), entry(6), entry(12)], np.array([0, 0, 1, 2])
    expected = layer_speedup(members, left)
    assert flops_speedup(members, left, np.full(4, 17)) == pytest.approx(expected)


def test_flops_speedup_knows_that_a_narrow_member_is_cheap() -> None:
    members = [entry(2, hidden=128), entry(12)]
    speedup = flops_speedup(members, np.array([0, 0]), np.array([9, 30]))
    assert speedup is not None
    assert speedup > 100
