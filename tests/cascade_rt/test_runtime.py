"""The contract of CascadeRuntime: who runs on what, and predictions that do not depend on the batch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cascade_rt
from cascade_rt import CascadeRuntime, InputError, Prediction

from ..toy import WORDS, cascade_members, write_bundle

TEXTS = ["a great film", "so sad", "the cat sat on the mat and that was not very witty", "", "dull " * 40]

texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> CascadeRuntime:
    return CascadeRuntime(bundle, thresholds=[0.6, 0.8])


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 40))) for _ in range(300)]


class CountingSession:
    """Stands before a member's session and counts the rows that reach it."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.rows = 0

    def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> Any:
        self.rows += len(feeds["input_ids"])
        return self._session.run(outputs, feeds)


def test_a_text_that_left_never_reaches_a_bigger_member(bundle: Path, corpus: list[str]) -> None:
    runtime = CascadeRuntime(bundle, thresholds=[0.6, 0.8])
    for stage in runtime.plan.stages:
        stage._sessions[False] = CountingSession(stage.load())
    predictions = runtime.predict(corpus)
    exits = [prediction.exit for prediction in predictions]
    assert len(set(exits)) == 3, "the case needs texts that leave at every member"
    seen = [stage._sessions[False].rows for stage in runtime.plan.stages]
    assert seen == [300, sum(exit > 0 for exit in exits), sum(exit > 1 for exit in exits)]


@settings(max_examples=40)
@given(data=st.data())
def test_a_prediction_is_the_same_alone_in_any_batch_and_in_any_order(
    runtime: CascadeRuntime, data: st.DataObject
) -> None:
    some = data.draw(st.lists(texts, min_size=1, max_size=90))  # several micro-batches
    order = data.draw(st.permutations(range(len(some))))
    together = runtime.predict(some)
    shuffled = runtime.predict([some[index] for index in order])
    alone = [runtime.predict([text])[0] for text in some]
    for index, other in [*zip(order, shuffled, strict=True), *enumerate(alone)]:
        assert (other.label, other.exit, other.layers) == (
            together[index].label,
            together[index].exit,
            together[index].layers,
        )
        np.testing.assert_allclose(other.probabilities, together[index].probabilities, atol=1e-5)


def test_tau_zero_answers_at_member_1_and_tau_one_at_the_last(bundle: Path, corpus: list[str]) -> None:
    assert {row.exit for row in CascadeRuntime(bundle, thresholds=0.0).predict(corpus)} == {0}
    last = CascadeRuntime(bundle, thresholds=1.0).predict(corpus)
    assert {(row.exit, row.layers) for row in last} == {(2, 1 + 2 + 4)}


def test_tau_one_equals_the_last_member_alone(bundle: Path, corpus: list[str], tmp_path: Path) -> None:
    alone = CascadeRuntime(write_bundle(tmp_path / "alone", cascade_members()[-1:], thresholds=[])).predict(corpus)
    cascade = CascadeRuntime(bundle, thresholds=1.0).predict(corpus)
    assert [row.label for row in cascade] == [row.label for row in alone]
    np.testing.assert_allclose([row.probabilities for row in cascade], [row.probabilities for row in alone], atol=1e-6)
    assert {row.layers for row in alone} == {4}


def test_predict_iter_streams_and_keeps_the_order(runtime: CascadeRuntime, corpus: list[str]) -> None:
    taken = 0

    def source() -> Iterator[str]:
        nonlocal taken
        for text in corpus:
            taken += 1
            yield text

    stream = runtime.predict_iter(source(), chunk_size=16)
    first = next(stream)
    assert taken == 16, "only the first chunk was read"
    rest = [first, *stream]
    for streamed, at_once in zip(rest, runtime.predict(corpus), strict=True):
        assert (streamed.label, streamed.exit) == (at_once.label, at_once.exit)


def test_predict_iter_refuses_one_text_and_names_the_place_of_a_bad_one(runtime: CascadeRuntime) -> None:
    with pytest.raises(InputError, match="expected a list"):
        runtime.predict_iter("lights")
    with pytest.raises(InputError, match="`chunk_size`: found 0, expected a whole number from 1"):
        runtime.predict_iter([], chunk_size=0)
    with pytest.raises(InputError, match="text 5: found int"):
        list(runtime.predict_iter(["fine"] * 5 + [1], chunk_size=2))  # type: ignore[list-item]


def test_members_are_loaded_when_a_text_first_needs_them(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, thresholds=0.0)
    runtime.predict(["a film", "a cat"])
    assert [stage.loaded for stage in runtime.plan.stages] == [True, False, False]
    runtime.with_thresholds([1.0, 0.0]).predict(["a film"])
    assert [stage.loaded for stage in runtime.plan.stages] == [True, True, False]
    assert all(stage.loaded for stage in CascadeRuntime(bundle, preload=True).plan.stages)


def test_odd_texts_get_an_answer(runtime: CascadeRuntime) -> None:
    huge = "the film was good " * 60_000  # over 1 MB
    odd = ["", "   ", "\t\r\n", "🙂🙃", "a\0b", "\u200b", "x" * 5000, huge]
    answers = runtime.predict(odd)
    assert [row.truncated for row in answers] == [False] * 7 + [True]
    for text, answer in zip(odd, answers, strict=True):
        assert answer.label in runtime.bundle.labels
        assert sum(answer.probabilities) == pytest.approx(1)
        assert runtime.predict([text])[0].label == answer.label


def test_truncated_says_exactly_when_tokens_were_cut(runtime: CascadeRuntime, pair_bundle: Path) -> None:
    words = ["good"] * 30  # with [CLS] and [SEP] exactly the 32 tokens of the bundle
    fits, cut = runtime.predict([" ".join(words), " ".join([*words, "film"])])
    assert (fits.truncated, cut.truncated) == (False, True)
    np.testing.assert_allclose(fits.probabilities, cut.probabilities, atol=1e-5)
    half = " ".join(["good"] * 14)
    fits, cut = CascadeRuntime(pair_bundle).predict([(half, half + " a"), (half + " a", half + " a")])
    assert (fits.truncated, cut.truncated) == (False, True)


def test_no_texts_give_no_predictions(runtime: CascadeRuntime) -> None:
    assert runtime.predict([]) == []
    assert runtime([]) == []
    logits, lengths = runtime.member_logits([])
    assert logits.shape == (3, 0, 3)
    assert lengths.shape == (0,)


def test_member_logits_are_those_of_every_member_on_every_text(
    runtime: CascadeRuntime, bundle: Path, corpus: list[str]
) -> None:
    logits, lengths = runtime.member_logits(corpus)
    assert logits.shape == (3, 300, 3)
    assert lengths.max() == 32
    answers = CascadeRuntime(bundle, thresholds=1.0).predict(corpus)
    assert logits[-1].argmax(axis=1).tolist() == [runtime.bundle.labels.index(row.label) for row in answers]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["fine", ("a", "pair")], "text 1: found a tuple of 2, expected a text"),
        (["fine", None], "text 1: found NoneType"),
        (["fine", b"bytes"], "text 1: found bytes"),
        (["fine", "half \ud83d a pair"], "text 1: found half a surrogate pair at character 5"),
        ("one text", r"found one str, expected a list.*\[text\]"),
    ],
)
def test_what_is_no_text_is_refused(runtime: CascadeRuntime, wrong: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        runtime.predict(wrong)


@pytest.mark.parametrize("wrong", [["single"], [("a", "b", "c")], [("a", None)], [("a", "\udc00")]])
def test_what_is_no_pair_is_refused(pair_bundle: Path, wrong: Any) -> None:
    with pytest.raises(InputError, match="text 0: found"):
        CascadeRuntime(pair_bundle).predict(wrong)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"threads": 0}, "`threads`: found 0, expected a whole number from 1 to 1024"),
        ({"threads": 10**11}, "expected a whole number from 1 to 1024"),
        ({"provider": "tpu"}, "`provider`: found 'tpu', expected one that is available: .*CPUExecutionProvider"),
        ({"provider": "cuda"}, "onnxruntime-gpu"),
        ({"thresholds": 1.5}, "from 0 to 1"),
        ({"thresholds": [0.5]}, r"`thresholds`: found \[0\.5\], expected 2 of them"),
    ],
)
def test_wrong_arguments_are_refused(bundle: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        CascadeRuntime(bundle, **arguments)


def test_importing_and_predicting_loads_nothing_of_the_offline_stage(bundle: Path) -> None:
    code = (
        "import sys\n"
        "from cascade_rt import CascadeRuntime\n"
        f"CascadeRuntime({str(bundle)!r}).predict(['a good film'])\n"
        "from cascade_rt.cli import main\n"
        f"main(['predict', '--model-dir', {str(bundle)!r}, 'a film'])\n"
        "heavy = {'torch', 'transformers', 'onnx', 'optimum', 'sklearn', 'scipy', 'cascade_export', 'cascade_train'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_public_names_are_the_documented_ones() -> None:
    assert set(cascade_rt.__all__) == {
        "Bundle",
        "BundleError",
        "CascadeError",
        "CascadeRuntime",
        "Entropy",
        "ExitRule",
        "MaximumProbability",
        "Patience",
        "InferenceError",
        "InputError",
        "InvalidOption",
        "MemberEntry",
        "MissingExtraError",
        "Prediction",
        "StageRun",
        "Stats",
        "TextError",
        "Trace",
        "__version__",
        "read_bundle",
    }
    assert all(hasattr(cascade_rt, name) for name in cascade_rt.__all__)
    assert Prediction._fields == ("label", "score", "probabilities", "exit", "layers", "truncated", "labels")


def test_stats_count_what_was_answered(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle)
    assert runtime.stats().texts == 0
    assert np.isnan(runtime.stats().mean_layers)
    texts = ["a good film", "so sad", "the cat sat", "witty"]
    with ThreadPoolExecutor(4) as pool:
        answers = [row for rows in pool.map(runtime.predict, [texts, texts[:1], texts[1:], texts] * 5) for row in rows]
    found = runtime.stats()
    assert found.texts == len(answers) == 60
    assert found.exits == np.bincount([row.exit for row in answers], minlength=3).tolist()
    assert found.mean_layers == pytest.approx(np.mean([row.layers for row in answers]))
    assert (found.tuned_rates, found.distance, found.p_value) == (None, None, None)
    runtime.member_logits(texts)  # every member: no exits
    assert runtime.stats(reset=True).texts == 60
    assert runtime.stats().texts == 0
