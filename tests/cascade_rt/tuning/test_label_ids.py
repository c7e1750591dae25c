"""Labels that a file writes, as class ids of a bundle: one rule in evaluate, tune, analyse and export."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.errors import InputError
from cascade_rt.tuning.evaluation import label_ids


def ids(written: list[str], labels: list[str]) -> list[int]:
    return [int(found) for found in label_ids([(label, f"f:{row}") for row, label in enumerate(written, 1)], labels)]


@given(st.lists(st.text(max_size=3) | st.integers(-9, 9).map(str), min_size=2, unique=True))
def test_every_label_is_found_by_its_name(labels: list[str]) -> None:
    assert ids(labels, labels) == list(range(len(labels)))


@pytest.mark.parametrize(
    ("labels", "written", "expected"),
    [
        (["bad", "good"], ["good ", "1", "0.0"], [1, 1, 0]),
        (["-1", "1"], ["1.0", "-1", " +1"], [1, 0, 1]),
        (["0.5", "1.5"], ["1.50"], [1]),
        ([" a", "b"], ["a"], [0]),
        (["1.0", "0.0"], ["1", "0"], [0, 1]),
    ],
)
def test_another_spelling_of_the_same_label(labels: list[str], written: list[str], expected: list[int]) -> None:
    assert ids(written, labels) == expected


@pytest.mark.parametrize(
    ("labels", "written", "says"),
    [
        (
            ["Good", "bad"],
            "good",
            "expected one that the bundle knows: 'Good', 'bad'; did you mean 'Good'? Correct",
        ),
        (["not_good", "bad"], "Not Good", "did you mean 'not_good'"),
        (["1", "01"], "1.0", "found the label '1.0', expected one that the bundle knows: '1', '01'"),
        (["-1", "1"], "0", "found the label '0'"),  # labels are numbers, so class ids are not taken
        (["a", "b"], "2", "found the label '2'"),
        (["a", "b"], "x" * 999, "found the label '" + "x" * 80 + "', expected"),
        ([f"k{row}" for row in range(99)], "c", "'k19', ... (99 labels)"),
    ],
)
def test_an_unknown_label_is_named_with_a_hint(labels: list[str], written: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        ids([written], labels)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300
