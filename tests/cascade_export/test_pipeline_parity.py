"""A runtime called like a pipeline answers as transformers' own text-classification pipeline on the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import pipeline

from cascade_rt import CascadeRuntime

from ..toy import cascade_members, write_bundle
from .torch_toy import bert, tokenizer

TEXTS = ["a good film", "so sad", "", "the cat sat on the mat and that was not very witty", "dull " * 60]


@pytest.fixture(scope="module", params=[False, True], ids=["texts", "pairs"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CascadeRuntime, bool]:
    """Transformers' pipeline and ours, of one member with the same weights."""
    root = tmp_path_factory.mktemp("pipeline")
    member = cascade_members()[-1]
    folder = write_bundle(root / "bundle", [member], thresholds=[], pair=request.param)
    theirs = pipeline("text-classification", model=bert(member.weights), tokenizer=tokenizer(root), device="cpu")
    return theirs, CascadeRuntime(folder), request.param


def same(found: Any, expected: Any) -> None:
    """The same nesting, the same keys in the same order, the same labels, and scores within 1e-5."""
    assert type(found) is type(expected)
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert found["label"] == expected["label"]
        assert type(found["score"]) is float
        assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
    else:
        raise AssertionError(f"a {type(expected).__name__}")


def of(texts: list[str], pair: bool) -> list[dict[str, str]]:
    """Return the texts as dicts; transformers takes an empty text_pair for no pair at all, so none is."""
    others = [text or "a cat" for text in texts[::-1]]
    return [{"text": text} | ({"text_pair": other} if pair else {}) for text, other in zip(texts, others, strict=True)]


@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"top_k": 99}])
def test_dicts_are_answered_as_by_the_pipeline(both: tuple[Any, CascadeRuntime, bool], options: dict[str, Any]) -> None:
    theirs, ours, pair = both
    rows = of(TEXTS, pair)
    same(ours(rows, **options), theirs(rows, truncation=True, **options))
    for row in rows:
        same(ours(row, **options), theirs(row, truncation=True, **options))


@pytest.mark.parametrize("both", [False], indirect=True, ids=["texts"])  # a pipeline takes pairs as dicts
@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}])
def test_texts_are_answered_as_by_the_pipeline(both: tuple[Any, CascadeRuntime, bool], options: dict[str, Any]) -> None:
    theirs, ours, _ = both
    same(ours(TEXTS, **options), theirs(TEXTS, truncation=True, **options))
    same(ours(TEXTS, batch_size=2, **options), theirs(TEXTS, truncation=True, batch_size=2, **options))
    same(ours(np.array(TEXTS), **options), theirs(TEXTS, truncation=True, **options))
    for text in TEXTS:
        expected = theirs(text, truncation=True, **options)
        if not options:
            # One str without top_k: a pipeline answers [dict], ours a dict, as the contract says.
            (expected,) = expected
        same(ours(text, **options), expected)


def test_both_lists_may_be_empty(both: tuple[Any, CascadeRuntime, bool]) -> None:
    theirs, ours, _ = both
    assert ours([]) == theirs([]) == []
