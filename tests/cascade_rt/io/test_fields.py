"""The rules for labels and for texts without anything to read."""

from __future__ import annotations

import datetime
import decimal
from fractions import Fraction
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_rt.io.fields import is_blank, label, label_order, number

digits = st.text("0123456789", min_size=1, max_size=3)
signed = st.builds("".join, st.tuples(st.sampled_from(["", "-", "+"]), digits))
numbers = signed | st.builds("".join, st.tuples(signed, st.just("."), digits))
numbers |= st.builds("".join, st.tuples(numbers, st.sampled_from("eE"), signed))
words = st.text(max_size=4)


@given(st.lists(numbers | words, max_size=8))
def test_numbers_come_first_by_value_then_by_spelling(labels: list[str]) -> None:
    found = sorted(labels, key=label_order)
    values = [number(one) for one in found]
    assert values == sorted(value for value in values if value is not None) + [None] * values.count(None)
    for one, other in pairwise(found):
        if number(one) == number(other):
            assert one <= other
    for one, value in zip(found, values, strict=True):
        if value is not None and "e" not in one.lower():
            assert Fraction(one) == Fraction(value)


@pytest.mark.parametrize("text", ["nan", "inf", "Infinity", "1_000", "1,5", "0x1", "", ".", "e5", "1e", "--1", "1 2"])
def test_these_are_no_numbers(text: str) -> None:
    assert number(text) is None


def test_the_order_does_not_depend_on_that_of_the_input_nor_on_huge_exponents() -> None:
    labels = ["-1e999999999", "01", "1", "1.0", "1e999999999", "1e" + "9" * 40]  # the last is more than a number can be
    for order in permutations(labels):
        assert sorted(order, key=label_order) == labels


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        *((1, "1"), (1.0, "1"), (-0.0, "0"), (0.5, "0.5"), (1e22, "10000000000000000000000"), (True, "True")),
        *(("1.0", "1.0"), (" pos\u00a0", "pos"), (b"pos", "pos"), (decimal.Decimal("1.50"), "1.50")),
        *((decimal.Decimal("2.00"), "2"), (datetime.date(2026, 1, 2), "2026-01-02"), (float("inf"), "inf")),
        *((None, ""), (float("nan"), ""), (" \t", ""), ("", "")),
    ],
)
def test_labels_of_values(value: object, spelled: str) -> None:
    assert label(value) == spelled


@pytest.mark.parametrize(("value", "says"), [([], "a list"), (("a", "b"), "a list"), ({"a": 1}, "an object")])
def test_several_values_are_no_label(value: object, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        label(value)


@pytest.mark.parametrize("text", ["", " ", "\t\r\n", "\u00a0\u2003", "\u200b\u200d\ufeff", "\x00\x1f", "\u2028"])
def test_texts_with_nothing_to_read(text: str) -> None:
    assert is_blank(text)
    assert is_blank(("a", text))
    assert is_blank((text, "a"))
    assert not is_blank(text + "a")


@pytest.mark.parametrize("text", ["a", ".", "\U0001f469\u200d\U0001f4bb", "0", "\u0301", "\ue000", "\u4e2d"])
def test_other_texts(text: str) -> None:
    assert not is_blank(text)
