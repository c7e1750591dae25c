"""Timing in turn, with a clock that the contestants set."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_rt.benchmark import turns
from cascade_rt.benchmark.turns import in_turns

COUNTS = st.integers(1, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(COUNTS, COUNTS, COUNTS, st.booleans())
def test_every_call_is_timed_in_every_round(
    monkeypatch: pytest.MonkeyPatch, contestants: int, calls: int, rounds: int, woken: bool
) -> None:
    now, asked, ended = [0.0], list[tuple[int, int]](), list[int]()
    monkeypatch.setattr(turns, "perf_counter", lambda: now[0])

    def contestant(own: int) -> Callable[[int], tuple[int, int, int]]:
        def answer(call: int) -> tuple[int, int, int]:
            asked.append((own, call))
            now[0] += 2.0**own * call
            return own, call, len(ended)

        return answer

    found = in_turns(
        {own: contestant(own) for own in range(contestants)},
        range(1, 1 + calls),
        rounds,
        wake=(lambda call: -call) if woken else None,
        progress=lambda: ended.append(len(asked)),
    )
    for own, timed in found.items():
        assert timed.seconds == pytest.approx(np.tile([2.0**own * call for call in range(1, 1 + calls)], (rounds, 1)))
        assert timed.answers == [(own, call, rounds) for call in range(1, 1 + calls)], "of the last round"
    assert len(ended) == 1 + rounds
    pairs = [(own, call) for own in range(contestants) for call in range(1, 1 + calls)]
    woken_before = Counter({(own, -call): 1 + rounds for own, call in pairs} if woken else {})
    assert Counter(asked) == woken_before + Counter(dict.fromkeys(pairs, 1 + rounds))
    turn = [own for own, call in asked if call > 0]
    chosen = [turn[at : at + contestants] for at in range(0, len(turn), contestants)]
    assert all(sorted(order) == list(range(contestants)) for order in chosen), "all answer a call before the next"
    first = [order[0] for order in chosen[:calls]]
    assert all(one != other for one, other in itertools.pairwise(first)) or contestants == 1


def test_no_contestants_take_no_time() -> None:
    assert in_turns({}, ["a"], 1) == {}
