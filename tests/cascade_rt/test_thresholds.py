"""Operating points against a plain loop, and the promise of Learn then Test against simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cascade_rt import thresholds
from cascade_rt.thresholds import (
    Answers,
    binomial_cdf,
    certify,
    fastest,
    measure,
    most_accurate,
    operating_points,
    pareto_front,
    texts_needed,
    upper_bound,
)


def drawn(seed: int, texts: int, members: int = 3) -> Answers:
    """Members that are the better the bigger they are, and surer where they are right."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(texts)
    skill = np.linspace(0.7, 1.0, members)[:, None]
    right = generator.random((members, texts)) < skill * (1.1 - 0.6 * hardness)
    confidences = np.clip(0.5 + 0.3 * right + 0.25 * generator.random((members, texts)), 0, 1)
    costs = np.array([1.0, 2.0, 6.0, 12.0])[:members, None] * (1 + generator.random(texts))
    return Answers(confidences, right, costs, generator.random(texts) / 10)


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


@given(st.integers(0, 50), st.lists(st.floats(0.5, 1.0), min_size=2, max_size=2), st.sampled_from([(0, 1, 2), (1, 2)]))
def test_a_point_measures_what_a_loop_over_the_texts_counts(
    seed: int, taus: list[float], members: tuple[int, ...]
) -> None:
    answers, costs, rights, losses = drawn(seed, 40), [], 0, 0
    taus = taus[: len(members) - 1]
    for text in range(40):
        cost = answers.overhead[text]
        for place, member in enumerate(members):
            cost += answers.costs[member, text]
            if place == len(members) - 1 or answers.confidences[member, text] > taus[place]:
                break
        costs.append(cost)
        rights += bool(answers.right[member, text])
        losses += bool(answers.right[-1, text] and not answers.right[member, text])
    found = measure(answers, members, taus)
    assert (found.accuracy, found.risk) == (rights / 40, losses / 40)
    assert found.cost == pytest.approx(np.mean(costs))
    assert found.cost_p95 == pytest.approx(sorted(costs)[38])


def test_points_hold_every_member_alone_and_every_way_to_combine_them() -> None:
    points = operating_points(drawn(1, 60))
    assert {point.members for point in points} == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}
    assert all(len(point.thresholds) == len(point.members) - 1 for point in points)
    assert len(points) <= 3 + 3 * thresholds._TAUS + thresholds._POINTS
    shared = operating_points(drawn(1, 60), shared=True)
    assert all(len(set(point.thresholds)) <= 1 for point in shared)
    assert {point.members for point in operating_points(drawn(1, 60), subsets=False)} == {(0, 1, 2), (2,)}
    assert {point.members for point in operating_points(drawn(1, 60, members=1))} == {(0,)}


@settings(max_examples=20)
@given(st.integers(0, 50))
def test_choices_are_what_trying_all_finds(seed: int) -> None:
    answers = drawn(seed, 80, members=2)
    points = operating_points(answers)
    whole = measure(answers, (1,), ())
    # every text's confidence is tried as a tau, so no other threshold can do better
    tried = [measure(answers, (0, 1), [tau]) for tau in answers.confidences[0]]
    tried += [whole, measure(answers, (0,), ())]
    floor = whole.accuracy - 0.03
    assert fastest(points, floor).cost == min(point.cost for point in tried if point.accuracy >= floor)
    budget = whole.cost * 0.8
    best, slow = most_accurate(points, budget), most_accurate(points, whole.cost_p95 * 0.9, p95=True)
    assert best is not None
    assert slow is not None
    assert best.accuracy == max(point.accuracy for point in tried if point.cost <= budget)
    assert slow.cost_p95 <= whole.cost_p95 * 0.9
    front = pareto_front(points)
    assert not any(
        (other.cost < point.cost and other.accuracy >= point.accuracy)
        or (other.cost <= point.cost and other.accuracy > point.accuracy)
        for point in front
        for other in tried
    )


def test_a_budget_below_every_member_has_no_answer() -> None:
    assert most_accurate(operating_points(drawn(1, 60)), 0.5) is None


def test_taus_lie_between_the_texts() -> None:
    answers = drawn(2, 50)
    for point in operating_points(answers):
        for gate, tau in zip(point.members[:-1], point.thresholds, strict=True):
            nearest = np.abs(answers.confidences[gate] - tau).min()
            assert nearest > 1e-9 or tau == answers.confidences[gate].max()


def test_noise_widens_the_tail_alone() -> None:
    answers = drawn(1, 60)
    noisy = measure(replace(answers, noise=1.5), (0, 2), [0.8])
    still = measure(answers, (0, 2), [0.8])
    assert (noisy.cost, noisy.cost_p95) == (still.cost, 1.5 * still.cost_p95)


def test_more_thresholds_never_do_worse_than_one() -> None:
    answers = drawn(3, 400)
    floor = measure(answers, (2,), ()).accuracy - 0.01
    one, many = (fastest(operating_points(answers, shared=shared), floor) for shared in (True, False))
    assert many.cost <= one.cost * 1.02  # the grids differ, by quantiles


def test_the_promise_holds_in_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 1,000 draws the certified risk is broken in at most 5%, and by a search that promises itself far more."""
    monkeypatch.setattr(thresholds, "_TAUS", 30)
    everyone, max_risk, draws = drawn(0, 50_000, members=2), 0.06, 1000
    generator = np.random.default_rng(1)
    broken = certified = naive = 0
    for _ in range(draws):
        rows = generator.integers(0, 50_000, 600)
        search, test = everyone.take(rows[:300]), everyone.take(rows[300:])
        chosen, _, _ = certify(search, test, max_risk, 0.95)
        if chosen is not None:
            certified += 1
            broken += measure(everyone, chosen.members, chosen.thresholds).risk > max_risk
        within = [point for point in operating_points(search) if point.risk <= max_risk]
        cheapest = min(within, key=lambda point: point.cost)
        naive += measure(everyone, cheapest.members, cheapest.thresholds).risk > max_risk
    assert broken <= draws * 0.05 + 3 * math.sqrt(draws * 0.05 * 0.95)
    assert certified > draws / 2
    assert naive > draws * 0.15


def test_what_is_easy_to_certify_is_nearly_always_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest point that lost nothing in the search was lucky; more careful ones before it are not."""
    monkeypatch.setattr(thresholds, "_POINTS", 400)
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
    same = Answers(answers.confidences, answers.right[[1, 1]], answers.costs, answers.overhead)
    chosen, certificate, _ = certify(same, same, 0.01, 0.95)
    assert chosen is not None
    assert chosen.members == (0,)
    assert certificate.losses == 0
    assert certificate.bound == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-6)
