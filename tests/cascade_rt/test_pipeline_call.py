"""A runtime called like a transformers pipeline: what it takes, what it answers, what it refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadeRuntime, InputError, InvalidOption

TEXTS = ["a good film", "a bad film", "", "so sad that the cat sat on the mat"]


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> CascadeRuntime:
    return CascadeRuntime(bundle, thresholds=[0.6, 0.8])


def test_called_it_answers_like_a_pipeline(runtime: CascadeRuntime, pair_bundle: Path) -> None:
    answer = runtime("a good film")
    assert answer == {"label": runtime.predict(["a good film"])[0].label, "score": answer["score"]}
    assert runtime({"text": "a good film"}) == answer
    assert [row["label"] for row in runtime(["a good film", "a bad film"])] == [
        row.label for row in runtime.predict(["a good film", "a bad film"])
    ]
    pairs = CascadeRuntime(pair_bundle)
    assert pairs(("a film", "a cat")) == pairs({"text": "a film", "text_pair": "a cat"})
    with pytest.raises(InputError, match="'txt'"):
        runtime({"txt": "a"})


@pytest.mark.parametrize("top_k", [1, 2, 3, 99, None])
def test_top_k_gives_a_list_by_descending_score(runtime: CascadeRuntime, top_k: int | None) -> None:
    for text, prediction in zip(TEXTS, runtime.predict(TEXTS), strict=True):
        ranked = sorted(zip(prediction.probabilities, runtime.bundle.labels, strict=True), reverse=True)
        wanted = [{"label": label, "score": pytest.approx(score, abs=1e-5)} for score, label in ranked[:top_k]]
        assert runtime(text, top_k=top_k) == wanted
        assert runtime([text], top_k=top_k) == [wanted]
        assert runtime({"text": text}, top_k=top_k) == wanted


def test_without_top_k_one_text_is_one_dict_and_a_list_is_a_list(runtime: CascadeRuntime) -> None:
    predictions = runtime.predict(TEXTS)
    assert runtime(TEXTS) == [{"label": row.label, "score": row.score} for row in predictions]
    assert runtime(TEXTS[0]) == runtime([TEXTS[0]])[0]
    assert runtime([]) == []
    assert runtime([], top_k=None) == []


def test_batch_size_is_accepted_and_changes_nothing(runtime: CascadeRuntime) -> None:
    for batch_size in (1, 2, 1000, None):
        assert runtime(TEXTS, batch_size=batch_size) == runtime(TEXTS)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("field", ["top_k", "batch_size"])
def test_counts_that_are_not_whole_numbers_are_refused(runtime: CascadeRuntime, field: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=f"`{field}`: found .*, expected a whole number from 1, or None") as caught:
        runtime(TEXTS, **{field: value})
    assert (caught.value.field, caught.value.found) == (field, value)


class Series:
    """As much of a pandas Series as is needed."""

    def __init__(self, texts: list[Any]) -> None:
        self._texts = texts

    def to_list(self) -> list[Any]:
        return list(self._texts)


def test_a_series_or_a_vector_of_texts_is_a_list(runtime: CascadeRuntime, pair_bundle: Path) -> None:
    wanted = runtime(TEXTS)
    assert runtime(Series(TEXTS)) == wanted
    assert runtime(np.array(TEXTS)) == wanted
    assert runtime(np.array(TEXTS, dtype=object)) == wanted
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        assert runtime(np.array(TEXTS, dtype=np.dtypes.StringDType())) == wanted
    assert runtime(np.array(TEXTS), top_k=2) == runtime(TEXTS, top_k=2)
    assert runtime(np.array([], dtype=str)) == []
    pairs = CascadeRuntime(pair_bundle)
    both = list(zip(TEXTS, TEXTS[::-1], strict=True))
    assert pairs(Series(both)) == pairs(both)


def test_a_pandas_series_is_a_list_whatever_its_index_and_type(runtime: CascadeRuntime) -> None:
    pandas = pytest.importorskip("pandas")
    wanted = runtime(TEXTS)
    assert runtime(pandas.Series(TEXTS)) == wanted
    assert runtime(pandas.Series(TEXTS, index=range(10, 14), dtype=object)) == wanted
    assert runtime(pandas.Series(TEXTS, dtype="category")) == wanted
    frame = pandas.DataFrame({"text": TEXTS, "n": range(4)})
    assert runtime(frame["text"]) == wanted
    with pytest.raises(InputError, match="found DataFrame"):
        runtime(frame)
    with pytest.raises(InputError, match="found DataFrame"):
        runtime.predict(frame)
    with pytest.raises(InputError, match="text 1: found float"):
        runtime(pandas.Series(["a film", None]))


class DataFrame:
    """As much of a table as gives it away."""

    columns = ("text", "label")

    def __iter__(self) -> Any:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: set(TEXTS), "found set"),
        (lambda: frozenset(TEXTS), "found frozenset"),
        (DataFrame, "found DataFrame"),
        (lambda: (text for text in TEXTS), "found generator.*predict_iter"),
        (lambda: iter(TEXTS), "found list_iterator"),
        (lambda: np.array([TEXTS, TEXTS]), "found ndarray"),
        (lambda: np.array("a film"), "found ndarray"),
        (lambda: np.array([1.0, 2.0]), "found ndarray"),
        (lambda: b"a film", "found bytes"),
        (lambda: bytearray(b"a film"), "found bytearray"),
        (lambda: None, "found NoneType"),
        (lambda: 3, "found int"),
        (lambda: {}, "found a dict with the keys"),
        (
            lambda: {"text": "a", "pair": "b"},
            "found a dict with the keys 'text', 'pair', expected 'text' and 'text_pair'",
        ),
        (lambda: {"text_pair": "b"}, "found a dict with the keys 'text_pair'"),
        (lambda: {"text": None}, "text 0: found NoneType"),
        (lambda: ("a", "b"), "text 0: found a tuple of 2, expected a text: this bundle's task is on single texts"),
        (lambda: ["a film", b"a film"], "text 1: found bytes"),
        (lambda: ["a film", None], "text 1: found NoneType"),
        (lambda: [["a film"]], "text 0: found a list of 1"),
        (lambda: np.array(["a film", None], dtype=object), "text 1: found NoneType"),
        (lambda: Series(["a film", float("nan")]), "text 1: found float"),
    ],
)
def test_anything_else_is_refused_by_name(runtime: CascadeRuntime, make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        runtime(make())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: set(TEXTS), "found set, expected a list of texts, or one column of a table"),
        (lambda: frozenset(TEXTS), "found frozenset"),
        (DataFrame, "found DataFrame"),
        (lambda: {"text": "a film"}, "found one dict"),
        (lambda: b"a film", "found one bytes"),
        (lambda: None, "found NoneType"),
        (lambda: 3, "found int"),
        (lambda: np.array("a film"), "found ndarray"),
        (lambda: np.array([TEXTS, TEXTS]), "text 0: found ndarray"),
    ],
)
def test_predict_refuses_what_is_not_a_collection_of_texts(
    runtime: CascadeRuntime, make: Callable[[], Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        runtime.predict(make())
    with pytest.raises(InputError, match=says):
        list(runtime.predict_iter(make()))


def test_predict_takes_any_iterable_of_texts(runtime: CascadeRuntime) -> None:
    wanted = runtime.predict(TEXTS)
    for texts in (tuple(TEXTS), iter(TEXTS), (text for text in TEXTS), np.array(TEXTS), dict.fromkeys(TEXTS).keys()):
        assert runtime.predict(texts) == wanted


@pytest.mark.parametrize("keyword", ["topk", "return_all_scores", "function_to_apply", "truncation"])
def test_an_unknown_keyword_is_a_type_error(runtime: CascadeRuntime, keyword: str) -> None:
    with pytest.raises(TypeError, match=keyword):
        runtime("a film", **{keyword: 1})
    with pytest.raises(TypeError):
        runtime("a film", "another")  # type: ignore[call-arg,arg-type]
