"""Operating points against a plain loop over the texts."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade_rt.bundle import MemberEntry
from cascade_rt.engine import exit_rules as rules
from cascade_rt.engine.cost import layer_speedup
from cascade_rt.engine.exit_rules import MaximumProbability, Patience, replay
from cascade_rt.errors import InputError
from cascade_rt.tuning import operating_points as module
from cascade_rt.tuning.operating_points import (
    OperatingPoint,
    fastest,
    most_accurate,
    operating_points,
    pareto_front,
    threshold_for_speedup,
)

from ..reference import patience_exit
from .drawn import calibrated, drawn


def entry(layers: int) -> MemberEntry:
    return MemberEntry(f"{layers}L", f"{layers}.onnx", "", layers, 768, 1, "fp32", None)


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
            if place == len(members) - 1 or answers.observed[member, text] > taus[place]:
                break
        costs.append(cost)
        rights += bool(answers.right[member, text])
        losses += bool(answers.right[-1, text] and not answers.right[member, text])
    found = answers.measure(members, MaximumProbability(tuple(taus)))
    assert (found.accuracy, found.risk) == (rights / 40, losses / 40)
    assert found.estimated_drop == pytest.approx(answers.right[-1].mean() - rights / 40)
    assert found.cost == pytest.approx(np.mean(costs))
    assert found.cost_p95 == pytest.approx(sorted(costs)[38])


@given(st.integers(0, 50), st.floats(0.5, 1.0))
def test_a_drop_is_estimated_from_labels_and_from_the_last_members_probabilities(seed: int, tau: float) -> None:
    answers = calibrated(seed, 60)
    assert answers.expected is not None
    found = answers.measure((0, 1), MaximumProbability((tau,)))
    lost = less = 0.0
    for text in range(60):
        member = 0 if answers.observed[0, text] > tau else 1
        lost += (float(answers.right[1, text]) - float(answers.right[member, text])) / 60
        less += (answers.expected[1, text] - answers.expected[member, text]) / 60
    assert found.estimated_drop == pytest.approx(max(lost, (60 * lost + 2_000 * less) / 2_060))
    assert answers.alone(1).estimated_drop == 0
    rows = np.arange(0, 60, 3)
    some = replace(
        answers, **{name: getattr(answers, name)[:, rows] for name in ("observed", "right", "costs", "expected")}
    )
    assert (
        answers.take(rows).alone(0).estimated_drop
        == replace(some, overhead=answers.overhead[rows]).alone(0).estimated_drop
    )


def test_on_other_texts_a_choice_loses_what_was_allowed() -> None:
    """Chosen from labels alone it loses more, because the best of many points is there by chance too."""
    allowed = 0.01
    lost: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(40):
        seen, others = calibrated(seed, 250), calibrated(seed + 1000, 4000)
        for both, drops in lost.items():
            point = fastest(operating_points(seen if both else replace(seen, expected=None)), allowed)
            then = others.measure(point.members, point.rule)
            drops.append(others.alone(1).accuracy - then.accuracy)
    assert np.mean(lost[True]) < 1.1 * allowed < np.mean(lost[False])
    assert 1.5 * np.std(lost[True]) < np.std(lost[False])


@given(st.integers(0, 50), st.floats(0.5, 1.0), st.sampled_from([(0, 2, 3), (1, 3), (0, 1, 2, 3), (2,)]))
def test_a_text_that_leaves_a_chain_ran_all_its_segments(seed: int, tau: float, members: tuple[int, ...]) -> None:
    """A complete member, which runs only if texts may leave there, and a model of three segments."""
    answers = replace(drawn(seed, 40, members=4), chains=[0, 1, 1, 1])
    costs = []
    for text in range(40):
        at = next((m for m in members[:-1] if answers.observed[m, text] > tau), members[-1])
        ran = {member for exit in members if exit <= at for member in range(0 if exit == 0 else 1, exit + 1)}
        costs.append(answers.overhead[text] + sum(answers.costs[member, text] for member in ran))
    found = answers.measure(members, MaximumProbability((tau,) * (len(members) - 1)))
    assert found.cost == pytest.approx(np.mean(costs))


@given(st.integers(0, 50), st.integers(1, 4))
def test_patience_measures_what_a_loop_counts(seed: int, patience: int) -> None:
    answers = drawn(seed, 40, members=4)
    classes = np.random.default_rng(seed).integers(0, 3, (4, 40))
    answers = replace(answers, rule=Patience(1), observed=classes[..., None], chains=[0, 0, 0, 0])
    left = [patience_exit(column.tolist(), patience) for column in classes.T]
    found = answers.measure((0, 1, 2, 3), Patience(patience))
    assert found.accuracy == np.mean(answers.right[left, range(40)])
    points = operating_points(answers)
    assert [(point.members, point.rule) for point in points[1:]] == [
        ((0, 1, 2, 3), Patience(1)),
        ((0, 1, 2, 3), Patience(2)),
    ]
    assert points[0].members == (3,)


def test_points_hold_every_member_alone_and_every_way_to_combine_them() -> None:
    points = operating_points(drawn(1, 60))
    assert {point.members for point in points} == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)}
    assert all(len(point.rule.thresholds) == len(point.members) - 1 for point in points)
    each_round = module._FRONT * 3**2  # what a round tries at most: each threshold lower, the same or higher
    assert len(points) <= 3 + 3 * rules._TAUS + module._POINTS + len(module._SHARES) * 2 * each_round
    shared = operating_points(drawn(1, 60), shared=True)
    assert all(len(set(point.rule.thresholds)) <= 1 for point in shared)
    assert {point.members for point in operating_points(drawn(1, 60), subsets=False)} == {(0, 1, 2), (2,)}
    assert {point.members for point in operating_points(drawn(1, 60, members=1))} == {(0,)}


@settings(max_examples=20)
@given(st.integers(0, 50))
def test_choices_are_what_trying_all_finds(seed: int) -> None:
    answers = drawn(seed, 80, members=2)
    points = operating_points(answers)
    whole = answers.alone(1)
    # every text's confidence is tried as a tau, so no other threshold can do better
    tried = [answers.measure((0, 1), MaximumProbability((tau,))) for tau in answers.observed[0]]
    tried += [whole, answers.alone(0)]
    assert fastest(points, 0.03).cost == min(point.cost for point in tried if point.accuracy >= whole.accuracy - 0.03)
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


@settings(max_examples=3)
@given(st.integers(0, 11))
def test_the_search_finds_what_a_plain_grid_finds(seed: int) -> None:
    """All subsets of four members, and eight quantiles for each threshold."""
    answers = drawn(seed, 60, members=4)
    points = operating_points(answers)
    assert points == operating_points(answers), "deterministic"
    grid: list[OperatingPoint] = []
    for members in (chosen for size in range(1, 5) for chosen in combinations(range(4), size)):
        taus = [np.quantile(answers.observed[member], np.linspace(0, 1, 8)).tolist() for member in members[:-1]]
        grid += answers.measured(members, map(MaximumProbability, product(*taus)))
    assert all(fastest(points, lost).cost <= fastest(grid, lost).cost + 1e-9 for lost in (0, 0.02, 0.05, 0.1))


@pytest.mark.parametrize("front", [{"quality": "risk"}, {"cost": "cost_p95"}])
def test_the_front_that_is_asked_for_is_refined(front: dict[str, Any]) -> None:
    quality, cost = ({"quality": "estimated_drop", "cost": "cost"} | front).values()
    better = 0
    for answers in (drawn(seed, 200, members=4) for seed in range(4)):
        asked, other = (
            pareto_front(operating_points(answers, **options), **front) for options in (front, dict[str, Any]())
        )
        for point in other:
            reached = [own for own in asked if getattr(own, quality) <= getattr(point, quality)]
            least = min((getattr(own, cost) for own in reached), default=np.inf)
            better += int(np.sign(getattr(point, cost) - least))
    assert better > 0


@given(
    arrays(float, (4, 30), elements=st.integers(0, 40).map(lambda percent: min(1, 0.7 + percent / 100))),
    st.lists(st.floats(0, 1), min_size=3, max_size=3).map(tuple),
    st.floats(0.01, 0.5),
    st.booleans(),
)
def test_nearby_rules_change_who_leaves_by_about_a_share(
    scores: np.ndarray, taus: tuple[float, ...], share: float, shared: bool
) -> None:
    rule = MaximumProbability(taus[:1] * 3 if shared else taus)
    found = list(rule.nearby(scores, share, shared=shared))
    assert len({near.thresholds for near in [*found, rule]}) <= (3 if shared else 27)
    assert rule not in found
    for near in found:
        assert not shared or len(set(near.thresholds)) == 1
        for column, own, tau in zip(
            [scores[:-1]] * 3 if shared else scores, rule.thresholds, near.thresholds, strict=False
        ):
            between = np.sum((column > min(own, tau)) & (column <= max(own, tau)))
            jumped = max(np.unique(column, return_counts=True)[1])  # equal scores leave together
            assert between <= share * column.size + 2 * jumped
            assert tau == own or tau == column.max() or not np.any(column == tau)


def test_many_thresholds_move_one_at_a_time() -> None:
    rule = MaximumProbability((0.5,) * 5)
    scores = np.random.default_rng(0).random((6, 40))
    moved = [
        np.flatnonzero(np.array(near.thresholds) != 0.5).tolist() for near in rule.nearby(scores, 0.1, shared=False)
    ]
    assert moved == [[at] for at in range(5) for _ in range(2)]


def test_a_budget_below_every_member_has_no_answer() -> None:
    assert most_accurate(operating_points(drawn(1, 60)), 0.5) is None


def test_taus_lie_between_the_texts() -> None:
    answers = drawn(2, 50)
    for point in operating_points(answers):
        for gate, tau in zip(point.members[:-1], point.rule.thresholds, strict=True):
            nearest = np.abs(answers.observed[gate] - tau).min()
            assert nearest > 1e-9 or tau == answers.observed[gate].max()


def test_noise_widens_the_tail_alone() -> None:
    answers = drawn(1, 60)
    rule = MaximumProbability((0.8,))
    noisy = replace(answers, noise=1.5).measure((0, 2), rule)
    still = answers.measure((0, 2), rule)
    assert (noisy.cost, noisy.cost_p95) == (still.cost, 1.5 * still.cost_p95)


def test_more_thresholds_never_do_worse_than_one() -> None:
    answers = drawn(3, 400)
    one, many = (fastest(operating_points(answers, shared=shared), 0.01) for shared in (True, False))
    assert many.cost <= one.cost * 1.02  # the grids differ, by quantiles


def speedup(members: list[MemberEntry], confidences: np.ndarray, tau: float) -> float:
    return layer_speedup(members, replay(MaximumProbability((tau,)), confidences)) or math.inf


@given(arrays(float, (2, 50), elements=st.floats(0.5, 1)), st.floats(1.01, 3.0))
def test_threshold_for_speedup_is_the_highest_that_reaches_it(confidences: np.ndarray, wanted: float) -> None:
    members = [entry(2), entry(6)]
    tau = threshold_for_speedup(members, confidences, wanted)
    assert speedup(members, confidences, tau) >= wanted
    higher = confidences[0][confidences[0] > tau]
    if higher.size:
        assert speedup(members, confidences, float(higher.min())) < wanted


def test_a_speedup_out_of_reach_is_refused() -> None:
    with pytest.raises(InputError, match=r"up to 3\.00"):
        threshold_for_speedup([entry(2), entry(6)], np.full((2, 4), 0.9), 3.5)
