"""`predict` in steps: `begin`, `advance`, `finish`, with pickling between them, as member pools do."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_rt import CascadeRuntime, Prediction, TextError
from cascade_rt.bundle.manifest import TOKENS

from ..toy import WORDS

THRESHOLDS = 0.7
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), max_size=12)


def in_steps(runtime: CascadeRuntime, texts: Sequence[str]) -> list[Prediction]:
    journey = runtime.begin(texts)
    for member in range(len(runtime.bundle.members)):
        journey = pickle.loads(pickle.dumps(journey))
        runtime.advance(journey, member)
    return runtime.finish(pickle.loads(pickle.dumps(journey)))


@pytest.fixture(scope="module", params=["cascade", "segments"])
def runtime(request: pytest.FixtureRequest) -> CascadeRuntime:
    if request.param == "cascade":
        return CascadeRuntime(request.getfixturevalue("bundle"), thresholds=THRESHOLDS)
    return CascadeRuntime(request.getfixturevalue("four_segments"))


@settings(max_examples=40)
@given(texts)
def test_steps_in_several_processes_answer_as_one_call(runtime: CascadeRuntime, some: list[str]) -> None:
    whole = runtime.predict(some) if len(some) != 1 else runtime.predict([*some, "a"])[:1]
    assert in_steps(runtime, some) == whole


def test_every_exit_is_taken_and_counted(runtime: CascadeRuntime) -> None:
    some = [" ".join(WORDS[at : at + 1 + at % 7]) for at in range(30)]
    before = runtime.stats().exits
    answers = in_steps(runtime, some)
    counted = [now - then for now, then in zip(runtime.stats().exits, before, strict=True)]
    exits = [answer.exit for answer in answers]
    assert counted == [exits.count(exit) for exit in range(len(counted))]
    assert len(set(exits)) > 1


def test_a_pickled_journey_leaves_out_what_has_left(runtime: CascadeRuntime) -> None:
    some = [" ".join(WORDS[at : at + 1 + at % 7]) for at in range(30)]
    journey = runtime.begin(some)
    runtime.advance(journey, 0)
    runtime.advance(journey, 1)
    assert 0 < len(journey.waiting) < len(some)
    same = pickle.loads(pickle.dumps(journey))
    left = np.setdiff1d(np.arange(len(some)), same.waiting)
    kind = runtime.bundle.members[2].reads
    for name, array in journey.inputs[kind].batch(journey.waiting).items():
        assert np.array_equal(array, same.inputs[kind].batch(same.waiting)[name])
    assert not same.inputs[TOKENS].lengths[left].any()
    assert same.inputs[TOKENS].lengths[same.waiting].all()


def test_truncation_survives_pickling(bundle: Path) -> None:
    runtime = CascadeRuntime(bundle)
    some = ["the film " * 100, "the film"]
    answers = in_steps(runtime, some)
    assert [answer.truncated for answer in answers] == [True, False]
    assert answers == runtime.predict(some)


def test_what_is_not_a_text_is_refused_at_the_beginning(bundle: Path) -> None:
    with pytest.raises(TextError, match="text 1: found int"):
        CascadeRuntime(bundle).begin(["a", 3])  # type: ignore[list-item]
