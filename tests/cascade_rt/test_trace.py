"""The trace hook: per call, which stage ran how many rows for how long."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadeRuntime, StageRun, Trace

from ..toy import WORDS

_DRAW = random.Random(5)
TEXTS = [" ".join(_DRAW.choices(WORDS, k=_DRAW.randint(0, 40))) for _ in range(120)]


@pytest.mark.parametrize("size", [1, 2, 120])
def test_each_call_is_traced_with_the_texts_that_were_still_there(bundle: Path, size: int) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(bundle, thresholds=[0.6, 0.8], trace=traces.append)
    calls = [TEXTS[start : start + size] for start in range(0, 120, size)]
    answers = [runtime.predict(call) for call in calls]
    assert len(traces) == len(calls)
    lengths = [len(text.split()) + 2 for text in TEXTS]
    for number, (trace, predictions) in enumerate(zip(traces, answers, strict=True)):
        exits = np.array([answer.exit for answer in predictions])
        assert trace.texts == size
        rows = [sum(run.rows for run in trace.runs if run.stage == stage) for stage in range(3)]
        assert rows == [int(np.sum(exits >= stage)) for stage in range(3)]
        assert [run.stage for run in trace.runs] == sorted(run.stage for run in trace.runs), "in order"
        for run in trace.runs:
            assert run.name == ("tiny", "small", "big")[run.stage]
            assert run.seconds > 0
        assert trace.tokenization_seconds > 0
        tokens = [min(32, length) for length in lengths[number * size : (number + 1) * size]]
        for stage in range(3):
            seen = [run.tokens for run in trace.runs if run.stage == stage]
            staying = [length for length, exit in zip(tokens, exits, strict=True) if exit >= stage]
            assert max(seen, default=0) == max(staying, default=0)
    assert len({answer.exit for predictions in answers for answer in predictions}) == 3


def test_exits_can_be_counted_from_traces(bundle: Path) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(bundle, thresholds=0.7, trace=traces.append)
    for start in range(0, 120, 7):
        runtime.predict(TEXTS[start : start + 7])
    rows = np.zeros(4, dtype=int)
    for run in (run for trace in traces for run in trace.runs):
        rows[run.stage] += run.rows
    assert (rows[:-1] - rows[1:]).tolist() == runtime.stats().exits


def test_seconds_are_those_of_the_session(bundle: Path) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(bundle, thresholds=0.0, trace=traces.append, preload=True)
    session = runtime.plan.stages[0].load()

    class Slow:
        def run(self, *arguments: Any) -> Any:
            time.sleep(0.02)
            return session.run(*arguments)

    runtime.plan.stages[0]._sessions[False] = Slow()
    started = time.perf_counter()
    runtime.predict(["a film"])
    runtime.predict(["a film", "a cat"])
    total = time.perf_counter() - started
    seconds = [run.seconds for trace in traces for run in trace.runs]
    assert len(seconds) == 2
    assert min(seconds) >= 0.02
    assert sum(seconds) + sum(trace.tokenization_seconds for trace in traces) <= total


def test_every_way_to_predict_is_traced(bundle: Path) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(bundle, trace=traces.append)
    runtime("a film")
    runtime(TEXTS[:3])
    list(runtime.predict_iter(TEXTS[:10], chunk_size=4))
    runtime.predict([])
    assert [trace.texts for trace in traces] == [1, 3, 4, 4, 2, 0]
    assert traces[-1].runs == []


def test_a_trace_is_of_plain_values(bundle: Path) -> None:
    traces: list[Trace] = []
    CascadeRuntime(bundle, thresholds=1.0, trace=traces.append).predict(TEXTS)
    (trace,) = traces
    assert type(trace.texts) is int
    for run in trace.runs:
        assert isinstance(run, StageRun)
        assert [type(value) for value in run] == [int, str, int, int, float]


def test_there_is_no_trace_unless_asked_for(bundle: Path) -> None:
    traces: list[Trace] = []
    runtime = CascadeRuntime(bundle)
    traced = runtime.with_trace(traces.append)
    runtime.predict(TEXTS)
    traced.with_trace(None).predict(TEXTS)
    assert traces == []
    traced.predict(TEXTS)
    traced.with_thresholds(0.9).predict(TEXTS)
    traced.with_members(["tiny"]).predict(TEXTS)
    assert [trace.texts for trace in traces] == [120, 120, 120], "variants keep the hook"


def test_an_error_in_the_hook_reaches_the_caller(bundle: Path) -> None:
    def broken(_: Trace) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CascadeRuntime(bundle, trace=broken).predict(["a film"])
