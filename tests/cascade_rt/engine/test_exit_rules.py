"""Exit rules against plain loops over the texts: the strict threshold, patience, and thresholds from the caller."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade_rt.engine.exit_rules import (
    Entropy,
    ExitRule,
    MaximumProbability,
    Patience,
    checked_thresholds,
    replay,
)
from cascade_rt.engine.task import MultiLabel, SingleLabel, Task
from cascade_rt.errors import InputError, InvalidOption

from ..reference import confidence_exit, patience_exit

TASKS: tuple[Task, ...] = (SingleLabel(), MultiLabel((0.5, 0.3, 0.7)))

logits = arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32))
many_logits = arrays(np.float32, (4, 12, 3), elements=st.floats(-3, 3, width=32))  # stages, texts, labels
settings = st.one_of(st.integers(1, 4), st.lists(st.floats(0.3, 1), min_size=3, max_size=3))


def leaves(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Ask a rule with one threshold which rows leave, in both of its ways, which must agree."""
    rule, task = MaximumProbability((threshold,)), SingleLabel()
    leaving = rule.leaving(None, 0, np.arange(len(probabilities)), rule.observed(task, probabilities))
    assert leaving.tolist() == [
        rule.leaves_alone(None, 0, task, row, row.index(max(row))) for row in probabilities.tolist()
    ]
    return leaving


@given(logits)
def test_threshold_one_keeps_everyone_and_zero_lets_everyone_go(values: np.ndarray) -> None:
    probabilities = SingleLabel().probabilities(values)
    assert not leaves(probabilities, 1.0).any()
    assert leaves(probabilities, 0.0).all()


def test_the_threshold_is_strict() -> None:
    assert leaves(np.array([[0.8, 0.2], [0.80001, 0.19999]]), 0.8).tolist() == [False, True]


@given(arrays(float, (3, 20), elements=st.floats(0.3, 1)), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_exits_are_algorithm_1_text_by_text(confidences: np.ndarray, taus: list[float]) -> None:
    exits = replay(MaximumProbability(tuple(taus)), confidences).tolist()
    assert exits == [confidence_exit(column, taus) for column in confidences.T.tolist()]


@given(many_logits, st.integers(1, 4), st.sampled_from(TASKS))
def test_patience_is_pabees_counter_text_by_text(values: np.ndarray, patience: int, task: Task) -> None:
    rule, probabilities = Patience(patience), task.probabilities(values)
    wanted = []
    for text in range(values.shape[1]):
        shown = [tuple(np.atleast_1d(answer).tolist()) for answer in task.answers(probabilities[:, text])]
        wanted.append(patience_exit([shown.index(answer) for answer in shown], patience))
    assert replay(rule, rule.observed(task, probabilities)).tolist() == wanted


@given(many_logits, settings, st.sampled_from(TASKS), st.sampled_from([MaximumProbability, Entropy]))
def test_one_text_alone_leaves_where_it_leaves_among_others(
    values: np.ndarray, setting: int | list[float], task: Task, kind: type[MaximumProbability]
) -> None:
    probabilities = task.probabilities(values)
    rule: ExitRule = Patience(setting) if isinstance(setting, int) else kind(tuple(setting))
    together = replay(rule, rule.observed(task, probabilities)).tolist()
    for text, wanted in enumerate(together):
        state, rows = rule.begin(1), probabilities[:, text].tolist()
        winners = probabilities[:, text].argmax(axis=1).tolist()
        exits = [at for at in range(3) if rule.leaves_alone(state, at, task, rows[at], winners[at])]
        assert next(iter(exits), 3) == wanted


@given(many_logits, st.integers(1, 4), st.integers(1, 11))
def test_texts_of_two_calls_leave_where_those_of_one_do(values: np.ndarray, patience: int, cut: int) -> None:
    rule, task = Patience(patience), SingleLabel()
    observed = rule.observed(task, task.probabilities(values))
    apart = [replay(rule, observed[:, :cut]), replay(rule, observed[:, cut:])]
    assert np.concatenate(apart).tolist() == replay(rule, observed).tolist()


def test_two_calls_of_one_rule_share_no_state() -> None:
    rule, task = Patience(1), SingleLabel()
    one, other = rule.begin(1), rule.begin(1)
    assert not rule.leaves_alone(one, 0, task, [0.9, 0.1], 0)
    assert not rule.leaves_alone(other, 0, task, [0.1, 0.9], 1)
    assert rule.leaves_alone(one, 1, task, [0.8, 0.2], 0)
    assert not rule.leaves_alone(other, 1, task, [0.8, 0.2], 0)


@pytest.mark.parametrize("rule", [MaximumProbability((0.4, 0.4, 0.4)), Entropy((0.1, 0.1, 0.1)), Patience(1)])
@given(many_logits)
def test_without_exits_no_text_leaves_early(rule: ExitRule, values: np.ndarray) -> None:
    for task in TASKS:
        never = rule.without_exits(4)
        assert replay(never, never.observed(task, task.probabilities(values))).tolist() == [3] * 12


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), True, "0.5", [0.5], [0.5, 0.5, 0.5], [0.5, None]])
def test_thresholds_out_of_range_or_number_are_refused(wrong: object) -> None:
    with pytest.raises(InvalidOption, match="threshold") as caught:
        checked_thresholds(wrong, 3)  # type: ignore[arg-type]
    assert caught.value.field == "thresholds"


def test_thresholds_are_one_number_or_a_list() -> None:
    assert checked_thresholds(1, 3) == [1.0, 1.0]
    assert checked_thresholds(np.float64(0.5), 3) == [0.5, 0.5]
    assert checked_thresholds(0.5, 1) == []
    with pytest.raises(InputError, match=r"`thresholds`: found 1\.5, expected a number from 0 to 1"):
        checked_thresholds(1.5, 1)
    assert checked_thresholds((0.2, 0.3), 3) == [0.2, 0.3]
