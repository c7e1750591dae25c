"""Metrics against scikit-learn, and ECE against an example worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from cascade_rt.errors import InputError
from cascade_rt.tuning.metrics import accuracy, dis, ece, f1

sizes = st.integers(1, 60)


@st.composite
def answers(draw: st.DrawFn, classes: int) -> tuple[np.ndarray, np.ndarray]:
    size = draw(sizes)
    ids = st.integers(0, classes - 1)
    return draw(arrays(int, size, elements=ids)), draw(arrays(int, size, elements=ids))


@given(answers(classes=4))
def test_accuracy_is_scikit_learns(both: tuple[np.ndarray, np.ndarray]) -> None:
    assert accuracy(*both) == pytest.approx(accuracy_score(*both))


@given(answers(classes=2))
def test_f1_of_two_classes_is_scikit_learns_binary(both: tuple[np.ndarray, np.ndarray]) -> None:
    assert f1(*both) == pytest.approx(f1_score(*both, zero_division=0))


@given(answers(classes=5))
def test_f1_of_more_classes_is_scikit_learns_macro(both: tuple[np.ndarray, np.ndarray]) -> None:
    expected = f1_score(*both, average="macro", labels=range(5), zero_division=0)
    assert f1(*both, classes=5) == pytest.approx(expected)


@given(st.permutations(range(40)), st.lists(st.booleans(), min_size=40, max_size=40))
def test_dis_is_the_roc_auc_when_no_confidences_tie(ranks: list[int], correct: list[bool]) -> None:
    if len(set(correct)) == 2:
        confidence = np.array(ranks) / 41
        assert dis(correct, confidence) == pytest.approx(roc_auc_score(correct, confidence))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_dis_counts_strict_inversions_pair_by_pair(rows: list[tuple[bool, int]]) -> None:
    easy = [score for correct, score in rows if correct]
    difficult = [score for correct, score in rows if not correct]
    got = dis([correct for correct, _ in rows], [score / 5 for _, score in rows])
    if not easy or not difficult:
        assert np.isnan(got)
    else:
        inversions = sum(hard > light for hard in difficult for light in easy)
        assert got == pytest.approx(1 - inversions / (len(easy) * len(difficult)))


def test_ece_by_a_written_out_example() -> None:
    # Two bins of equal width. (0, 0.5]: confidences 0.3, 0.5, one right: |0.5 - 0.4| = 0.1, weight 2/5.
    # (0.5, 1]: 0.6, 0.8, 1.0, two right: |2/3 - 0.8| = 2/15, weight 3/5. Together 0.04 + 0.08 = 0.12.
    correct = [True, False, False, True, True]
    confidence = [0.3, 0.5, 0.6, 0.8, 1.0]
    assert ece(correct, confidence, bins=2) == pytest.approx(0.12)
    # Equal mass puts 0.3, 0.5, 0.6 together: |1/3 - 1.4/3| * 3/5 + |1 - 0.9| * 2/5 = 0.08 + 0.04.
    assert ece(correct, confidence, bins=2, equal_mass=True) == pytest.approx(0.12)
    # and with three bins: {0.3, 0.5}: 0.1 * 2/5; {0.6, 0.8}: |0.5 - 0.7| * 2/5; {1.0}: 0.
    assert ece(correct, confidence, bins=3, equal_mass=True) == pytest.approx(0.12)


def test_ece_of_a_perfectly_calibrated_member_is_zero() -> None:
    assert ece([True, True, True, False], [0.75] * 4) == pytest.approx(0)


@pytest.mark.parametrize("edge", [k / 15 for k in range(1, 16)])
def test_ece_puts_an_edge_into_the_lower_bin(edge: float) -> None:
    # Two texts, one on the edge and one just below: in one bin their gaps cancel, in two they add up.
    low = edge - 1e-9
    assert ece([True, False], [edge, low]) == pytest.approx(abs(0.5 - (edge + low) / 2))


def test_vectors_of_different_or_no_length_are_refused() -> None:
    with pytest.raises(InputError, match="equally long"):
        accuracy([1, 0], [1])
    with pytest.raises(InputError, match="non-empty"):
        ece([], [])
