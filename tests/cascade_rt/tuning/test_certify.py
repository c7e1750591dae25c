"""The guarantee of Learn then Test against simulation, and its binomial bounds against SciPy's."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cascade_rt.engine import exit_rules as rules_module
from cascade_rt.engine.exit_rules import MaximumProbability
from cascade_rt.tuning import certify as certify_module
from cascade_rt.tuning import operating_points as points_module
from cascade_rt.tuning.certify import binomial_cdf, certify, texts_needed, upper_bound
from cascade_rt.tuning.operating_points import OperatingPoint, Recorded, operating_points

from .drawn import drawn


@given(st.integers(0, 300), st.integers(1, 300), st.floats(1e-4, 1 - 1e-4))
def test_binomial_cdf_is_scipys(successes: int, trials: int, probability: float) -> None:
    assert binomial_cdf(successes, trials, probability) == pytest.approx(
        stats.binom.cdf(successes, trials, probability), rel=1e-9, abs=1e-12
    )


def test_binomial_cdf_at_its_ends() -> None:
    assert [binomial_cdf(0, 5, 0.0), binomial_cdf(5, 5, 0.3), binomial_cdf(4, 5, 1.0), binomial_cdf(-1, 5, 0.3)] == [
        1.0, 1.0, 0.0, 0.0,
    ]  # fmt: skip


@given(st.integers(0, 99), st.floats(0.5, 0.999))
def test_upper_bound_is_clopper_pearsons(losses: int, confidence: float) -> None:
    expected = stats.beta.ppf(confidence, losses + 1, 100 - losses)
    assert upper_bound(losses, 100, confidence) == pytest.approx(expected, rel=1e-6)


def test_texts_needed_certify_and_fewer_do_not() -> None:
    needed = texts_needed(0.0, 0.005, 0.95)
    assert needed == math.ceil(math.log(0.05) / math.log(1 - 0.005))  # no loss seen in so many texts
    needed = texts_needed(0.004, 0.01, 0.95)
    assert needed is not None
    losses = np.random.default_rng(0).binomial(needed, 0.004, 300)
    assert np.mean([binomial_cdf(lost, needed, 0.01) <= 0.05 for lost in losses]) > 0.7
    assert texts_needed(0.01, 0.01, 0.95) is None
    assert texts_needed(0.0, 0.0, 0.95) is None


def test_the_promise_holds_in_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 1,000 draws the certified risk is broken in at most 5%, and by a search that promises itself far more."""
    monkeypatch.setattr(rules_module, "_TAUS", 30)
    monkeypatch.setattr(points_module, "_SHARES", ())
    proposed: list[list[OperatingPoint]] = []  # by certify's own search, so that each draw is searched once

    def recorded(answers: Recorded, **options: Any) -> list[OperatingPoint]:
        proposed.append(operating_points(answers, **options))
        return proposed[-1]

    monkeypatch.setattr(certify_module, "operating_points", recorded)
    everyone, max_risk, draws = drawn(0, 50_000, members=2), 0.06, 1000
    lost = np.sort(everyone.observed[0][everyone.right[1] & ~everyone.right[0]])  # where leaving early is wrong

    def true_risk(point: OperatingPoint) -> float:
        if point.members == (1,):
            return 0.0
        tau = point.rule.thresholds[0] if point.rule.thresholds else -math.inf
        return float(len(lost) - np.searchsorted(lost, tau, side="right")) / 50_000

    assert true_risk(measured := everyone.measure((0, 1), MaximumProbability((0.8,)))) == pytest.approx(measured.risk)
    generator = np.random.default_rng(1)
    broken = certified = naive = 0
    for _ in range(draws):
        rows = generator.integers(0, 50_000, 600)
        search, test = everyone.take(rows[:300]), everyone.take(rows[300:])
        chosen, _, _ = certify(search, test, max_risk, 0.95)
        if chosen is not None:
            certified += 1
            broken += true_risk(chosen) > max_risk
        within = [point for point in proposed.pop() if point.risk <= max_risk]
        naive += true_risk(min(within, key=lambda point: point.cost)) > max_risk
    assert broken <= draws * 0.05 + 3 * math.sqrt(draws * 0.05 * 0.95)
    assert certified > draws / 2
    assert naive > draws * 0.15


def test_what_is_easy_to_certify_is_nearly_always_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest point that lost nothing in the search was lucky; more careful ones before it are not."""
    monkeypatch.setattr(points_module, "_POINTS", 200)
    monkeypatch.setattr(points_module, "_SHARES", (0.05,))
    everyone = drawn(0, 20_000)
    generator = np.random.default_rng(2)
    certified = 0
    for _ in range(40):
        rows = generator.integers(0, 20_000, 400)
        chosen, certificate, sequence = certify(everyone.take(rows[:200]), everyone.take(rows[200:]), 0.05, 0.95)
        certified += chosen is not None
        assert certificate.tested <= certificate.sequence == len(sequence)
    assert certified >= 36


def test_what_cannot_be_certified_is_not() -> None:
    chosen, certificate, sequence = certify(drawn(0, 40), drawn(1, 40), 0.005, 0.95)
    assert chosen is None
    assert (certificate.certified, certificate.tested, certificate.texts) == (0, 1, 40)
    assert certificate.p_value > 0.05
    assert sequence
    chosen, _, _ = certify(drawn(0, 2000), drawn(1, 2000), 0.0, 0.95)
    assert chosen is None  # no number of texts shows that a risk is nought


def test_a_small_member_that_is_never_worse_is_certified_alone() -> None:
    answers = drawn(0, 1000, members=2)
    same = replace(answers, right=answers.right[[1, 1]])
    chosen, certificate, _ = certify(same, same, 0.01, 0.95)
    assert chosen is not None
    assert chosen.members == (0,)
    assert certificate.losses == 0
    assert certificate.bound == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-6)
