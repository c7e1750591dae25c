"""Tasks: probabilities against SciPy's softmax and sigmoid, in both of their forms; answers and confidence by loops."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, logit
from scipy.special import softmax as expected_softmax
from scipy.stats import entropy

from cascade_rt.engine.exit_rules import Entropy, MaximumProbability
from cascade_rt.engine.task import MultiLabel, SingleLabel, Task

logits = arrays(np.float32, (3, 4), elements=st.floats(-200, 200, width=32))
CUTS = (0.5, 0.3, 0.7, 0.5)


def task_of(several: bool, labels: int) -> Task:
    return MultiLabel(tuple(islice(cycle((*CUTS, 0.0)), labels))) if several else SingleLabel()


@given(logits)
def test_probabilities_are_scipys(values: np.ndarray) -> None:
    wide = values.astype(np.float64)
    for task, expected in ((SingleLabel(), expected_softmax(wide, axis=-1)), (MultiLabel(CUTS), expit(wide))):
        np.testing.assert_allclose(task.probabilities(values), expected, atol=1e-12)
        np.testing.assert_allclose([task.probabilities_of_one(row)[0] for row in values], expected, atol=1e-12)


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


@given(batches(), st.booleans(), st.sampled_from([MaximumProbability, Entropy]), st.floats(0, 1))
def test_a_row_alone_and_among_others_has_the_same_bits_and_decision(
    values: np.ndarray, several: bool, kind: type[MaximumProbability], threshold: float
) -> None:
    task = task_of(several, values.shape[1])
    together = task.probabilities(values)
    alone = [task.probabilities_of_one(row) for row in values]
    assert [winner for _, winner in alone] == together.argmax(axis=1).tolist()
    assert [[p.hex() for p in row] for row, _ in alone] == [[p.hex() for p in row] for row in together.tolist()]
    assert together.tolist() == [task.probabilities(row[None])[0].tolist() for row in values]
    if kind.kind == Entropy.kind and values.shape[1] == 1 and not several:
        return  # no entropy among one class
    for chosen in (threshold, together.max()):
        rule = kind((min(1.0, float(chosen)),))
        leaving = rule.leaving(None, 0, np.arange(len(values)), rule.observed(task, together)).tolist()
        assert leaving == [rule.leaves_alone(None, 0, task, *one) for one in alone]


@given(logits)
def test_one_label_is_the_most_probable_one(values: np.ndarray) -> None:
    task = SingleLabel()
    probabilities = task.probabilities(values)
    rows = probabilities.tolist()
    assert probabilities.dtype == np.float64
    assert task.confidence(probabilities).tolist() == [max(row) for row in rows]
    answers = task.answers(probabilities)
    assert answers.tolist() == [row.index(max(row)) for row in rows]
    assert task.indicators(answers, 4).tolist() == np.eye(4, dtype=bool)[answers].tolist()
    assert task.labels("abcd", rows[0], answers[0]) == ("abcd"[answers[0]],)
    expected = 1 - entropy(probabilities, axis=-1) / np.log(4)
    np.testing.assert_allclose(task.certainty(probabilities), np.clip(expected, 0, 1), atol=1e-12)


@given(logits)
def test_several_labels_are_those_above_their_cut(values: np.ndarray) -> None:
    task = MultiLabel(CUTS)
    probabilities = task.probabilities(values)
    answers = task.answers(probabilities)
    for row, answer, sure in zip(probabilities.tolist(), answers, task.confidence(probabilities), strict=True):
        above = [p > cut for p, cut in zip(row, CUTS, strict=True)]
        assert answer.tolist() == above
        assert sure == pytest.approx(min(expit(abs(logit(p) - logit(cut))) for p, cut in zip(row, CUTS, strict=True)))
        assert task.labels("abcd", row, 0) == tuple(name for name, yes in zip("abcd", above, strict=True) if yes)
    halves = entropy([probabilities, 1 - probabilities], base=2).mean(axis=-1)
    np.testing.assert_allclose(task.certainty(probabilities), np.clip(1 - halves, 0, 1), atol=1e-12)


def test_at_a_half_confidence_is_the_least_of_p_and_its_rest() -> None:
    task = MultiLabel((0.5, 0.5))
    assert task.confidence(np.array([[0.5, 0.9], [0.2, 0.6]])).tolist() == pytest.approx([0.5, 0.6])


def test_answers_are_equal_where_all_labels_are() -> None:
    several = MultiLabel((0.5, 0.5))
    sets = np.array([[True, False], [True, True]])
    assert several.equal(sets, np.array([[True, False], [False, True]])).tolist() == [True, False]
    assert SingleLabel().equal(np.array([1, 2]), np.array([1, 0])).tolist() == [True, False]


@given(logits, st.integers(0, 2**32 - 1))
def test_the_probability_of_an_answer_is_that_of_all_its_decisions(values: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    one, several = SingleLabel(), MultiLabel(CUTS)
    classes, sets = generator.integers(0, 4, (2, 3)), generator.random((2, 3, 4)) < 0.5
    of_classes = one.probability_of(classes, one.probabilities(values))
    of_sets = several.probability_of(sets, several.probabilities(values))
    for member in range(2):
        for text in range(3):
            p = expit(values[text].astype(np.float64))
            decisions = [p[label] if sets[member, text, label] else 1 - p[label] for label in range(4)]
            assert of_sets[member, text] == pytest.approx(np.prod(decisions), abs=1e-12)
            softmax = expected_softmax(values[text].astype(np.float64))
            assert of_classes[member, text] == pytest.approx(softmax[classes[member, text]], abs=1e-12)
