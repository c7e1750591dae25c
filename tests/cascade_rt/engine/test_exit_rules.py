"""Exit rules against plain loops over the texts: the strict threshold, patience, and thresholds from the caller."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade_rt.engine.exit_rules import (
    ExitRule,
    Patience,
    Thresholds,
    checked_thresholds,
    exit_rule,
    exits,
    exits_under,
)
from cascade_rt.engine.probabilities import confidence, softmax
from cascade_rt.errors import InputError, InvalidOption

from ..reference import confidence_exit, patience_exit

logits = arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32))
many_logits = arrays(np.float32, (4, 12, 3), elements=st.floats(-3, 3, width=32))  # stages, texts, labels


def leaves(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Ask a rule with one threshold which rows leave, in both of its ways, which must agree."""
    rule = Thresholds([threshold])
    leaving = rule.leaving(0, np.arange(len(probabilities)), probabilities)
    assert leaving.tolist() == [rule.leaves_alone(0, row) for row in probabilities.tolist()]
    return leaving


@given(logits)
def test_threshold_one_keeps_everyone_and_zero_lets_everyone_go(values: np.ndarray) -> None:
    probabilities = softmax(values)
    assert not leaves(probabilities, 1.0).any()
    assert leaves(probabilities, 0.0).all()


def test_the_threshold_is_strict() -> None:
    assert leaves(np.array([[0.8, 0.2], [0.80001, 0.19999]]), 0.8).tolist() == [False, True]


def test_everyone_leaves_at_the_last_stage() -> None:
    even = np.full((5, 4), 0.25)
    assert Thresholds([1.0]).leaving(1, np.arange(5), even).all()
    assert Thresholds([1.0]).leaves_alone(1, [0.25] * 4)
    decisions = Patience(3, stages=2).begin(5)
    assert not decisions.leaving(0, np.arange(5), even).any()
    assert decisions.leaving(1, np.arange(5), even).all()
    alone = Patience(3, stages=2).begin(1)
    assert [alone.leaves_alone(stage, [0.25] * 4) for stage in (0, 1)] == [False, True]


@given(arrays(float, (3, 20), elements=st.floats(0.3, 1)), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_exits_are_algorithm_1_text_by_text(confidences: np.ndarray, taus: list[float]) -> None:
    assert exits(confidences, taus).tolist() == [confidence_exit(column, taus) for column in confidences.T.tolist()]


@given(many_logits, st.integers(1, 4))
def test_patience_is_pabees_counter_text_by_text(values: np.ndarray, patience: int) -> None:
    probabilities = softmax(values)
    classes = probabilities.argmax(axis=-1)
    wanted = [patience_exit(classes[:, text].tolist(), patience) for text in range(values.shape[1])]
    assert exits_under(Patience(patience, stages=4), probabilities).tolist() == wanted


@given(many_logits, st.one_of(st.integers(1, 4), st.lists(st.floats(0.3, 1), min_size=3, max_size=3)))
def test_one_text_alone_leaves_where_it_leaves_among_others(values: np.ndarray, setting: int | list[float]) -> None:
    probabilities = softmax(values)
    rule: ExitRule = Patience(setting, stages=4) if isinstance(setting, int) else Thresholds(setting)
    together = exits_under(rule, probabilities).tolist()
    for text, wanted in enumerate(together):
        decisions = rule.begin(1)
        stages = probabilities[:, text].tolist()
        assert next(stage for stage, row in enumerate(stages) if decisions.leaves_alone(stage, row)) == wanted


@given(many_logits, st.lists(st.floats(0.3, 1), min_size=3, max_size=3))
def test_exits_under_maximum_probability_are_those_from_confidences(values: np.ndarray, taus: list[float]) -> None:
    probabilities = softmax(values)
    rule = Thresholds(taus)
    assert exits_under(rule, probabilities).tolist() == exits(confidence(probabilities), taus).tolist()


def test_two_calls_of_one_rule_share_no_state() -> None:
    rule = Patience(1, stages=3)
    one, other = rule.begin(1), rule.begin(1)
    assert not one.leaves_alone(0, [0.9, 0.1])
    assert not other.leaves_alone(0, [0.1, 0.9])
    assert one.leaves_alone(1, [0.8, 0.2])
    assert not other.leaves_alone(1, [0.8, 0.2])


def test_a_manifest_names_its_rule() -> None:
    assert isinstance(exit_rule({"kind": "maximum_probability"}, [0.5], 2), Thresholds)
    patient = exit_rule({"kind": "patience", "patience": 2}, [], 3)
    assert isinstance(patient, Patience)
    assert patient.patience == 2


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), True, "0.5", [0.5], [0.5, 0.5, 0.5], [0.5, None]])
def test_thresholds_out_of_range_or_number_are_refused(wrong: object) -> None:
    with pytest.raises(InvalidOption, match="threshold") as caught:
        checked_thresholds(wrong, [0.9, 0.9], 3)  # type: ignore[arg-type]
    assert caught.value.field == "thresholds"


def test_thresholds_come_from_the_bundle_or_one_number_or_a_list() -> None:
    assert checked_thresholds(None, [0.7, 0.9], 3) == [0.7, 0.9]
    assert checked_thresholds(1, [0.7, 0.9], 3) == [1.0, 1.0]
    assert checked_thresholds(np.float64(0.5), [0.7, 0.9], 3) == [0.5, 0.5]
    assert checked_thresholds(0.5, [], 1) == []
    with pytest.raises(InputError, match=r"`thresholds`: found 1\.5, expected a number from 0 to 1"):
        checked_thresholds(1.5, [], 1)
    assert checked_thresholds((0.2, 0.3), [0.7, 0.9], 3) == [0.2, 0.3]
