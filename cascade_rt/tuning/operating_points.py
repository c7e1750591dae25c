"""Operating points: members and exit rules, measured on texts that every member has answered.

`operating_points` measures the ways to run a bundle; `fastest` and `most_accurate` choose one by what was measured. The
paper's case, one threshold for all members, is `shared`. Of a cascade, members that answer nothing do not run; of a
chain of segments, those before the last exit do.

The best of thousands of points on some texts loses more on others: a text that a small member answers rightly by chance
counts as a gain. So the drop of a point is estimated from two sources: the labels, and the probabilities that the last
member gives to the answers, which selection does not bias. The probabilities have a pseudo-count of
2,000 texts: much beside hundreds of labelled texts, little beside tens of thousands. Where the labels' drop is larger,
it is the estimate. All this is conservative: the last member's probabilities give no credit for what a smaller member
knows and the last does not, and one that is too sure of itself overstates what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..engine.cost import cumulative_layers, whole_model
from ..engine.exit_rules import ExitRule, MaximumProbability, replay
from ..errors import InvalidOption

_POINTS = 1_000  # tried for each number of members, and again in each round of refinement
_LARGEST = 4  # members of a subset
_FRONT = 200  # points that a round refines, about
_PSEUDO_COUNT = 2_000  # texts, of the last member's probabilities
_SHARES = 0.1 * 0.5 ** np.arange(6)  # of the texts that leave elsewhere, round by round


@dataclass(frozen=True)
class Recorded:
    """Some texts that every member has answered, with the cost of each answer.

    `rule`: the bundle's exit rule. `observed`: (members, texts, ...), what it looks at. `right`: bool (members, texts),
    against the labels or, without labels, against the last member's answers. `costs`: float64 (members, texts), of
    running a member on a text, in any unit. `overhead`: float64 (texts,), the cost of a text apart from its members.
    """

    rule: ExitRule
    observed: NDArray[Any]
    right: NDArray[np.bool_]
    costs: NDArray[np.float64]
    overhead: NDArray[np.float64]
    noise: float = 1.0
    """Measured p95 over fitted time; 1.0 if not timed."""
    chains: Sequence[int] | None = None
    """For each member, the first segment of its model; None where all are complete models."""
    expected: NDArray[np.float64] | None = None
    """The last member's probability of each answer, float64 (members, texts); None where there are no labels."""

    def take(self, rows: NDArray[np.intp]) -> Recorded:
        """Return some of the texts."""
        return replace(
            self,
            observed=self.observed[:, rows],
            right=self.right[:, rows],
            costs=self.costs[:, rows],
            overhead=self.overhead[rows],
            expected=None if self.expected is None else self.expected[:, rows],
        )

    def exits(self, members: Sequence[int], rule: ExitRule) -> NDArray[np.intp]:
        """Return the exit of each text as an index into `members`, int (texts,)."""
        return replay(rule, self.observed[list(members)])

    def paths(self, members: Sequence[int]) -> NDArray[np.float64]:
        """Return the cost of each text if it leaves at each of these members, float64 (members, texts)."""
        ran, steps = -1, []
        for member in members:
            start = member if self.chains is None else max(self.chains[member], ran + 1)
            steps.append(self.costs[start : member + 1].sum(axis=0))
            ran = member
        paths: NDArray[np.float64] = self.overhead + np.cumsum(steps, axis=0)
        return paths

    def alone(self, member: int) -> OperatingPoint:
        """Measure a member that answers every text."""
        return self.measure((member,), self.rule.without_exits(1))

    def measure(self, members: tuple[int, ...], rule: ExitRule) -> OperatingPoint:
        """Measure one way to run the bundle."""
        return next(self.measured(members, [rule]))

    def measured(self, members: tuple[int, ...], rules: Iterable[ExitRule]) -> Iterator[OperatingPoint]:
        """Measure some members under several rules."""
        rows = np.arange(len(self.overhead))
        observed, right, last = self.observed[list(members)], self.right[list(members)], self.right[-1]
        expected = self.right if self.expected is None else self.expected
        chosen, right_last, expected_last = expected[list(members)], last.mean(), expected[-1].mean()
        paths = self.paths(members)
        weight = _PSEUDO_COUNT / (_PSEUDO_COUNT + len(rows))
        quantile = (95 * len(rows)) // 100
        for rule in rules:
            place = replay(rule, observed)
            answered, costs = right[place, rows], paths[place, rows]
            accuracy = answered.mean()
            by_labels, expected_drop = right_last - accuracy, expected_last - chosen[place, rows].mean()
            yield OperatingPoint(
                members,
                rule,
                float(accuracy),
                float(max(by_labels, (1 - weight) * by_labels + weight * expected_drop)),
                float((last & ~answered).mean()),
                float(costs.mean()),
                self.noise * float(np.partition(costs, quantile)[quantile]),
            )


@dataclass(frozen=True)
class OperatingPoint:
    """A way to run a bundle, measured on some texts.

    `members`: ascending indices of the bundle's members that may answer; the last of them always answers.
    `estimated_drop`: of accuracy against the bundle's last member, estimated as above and at least the one on these
    texts. `risk`: share of texts that the point answers wrongly and the last member rightly.
    """

    members: tuple[int, ...]
    rule: ExitRule
    accuracy: float
    estimated_drop: float
    risk: float
    cost: float
    cost_p95: float


def operating_points(
    recorded: Recorded,
    *,
    shared: bool = False,
    subsets: bool = True,
    quality: str = "estimated_drop",
    cost: str = "cost",
) -> list[OperatingPoint]:
    """Measure the ways to run the bundle that are worth trying, each member alone among them.

    `shared`: one threshold for all members. `subsets=False`: all members, or the last one alone; else up to four
    members where texts may leave. The exit rule names its candidates, a coarse grid; then, in rounds, rules nearer and
    nearer to those on the front of `quality` and `cost` (see `pareto_front`). With segments, one threshold for all of
    them is tried too.
    """
    count = len(recorded.right)
    everyone = tuple(range(count))
    found = [recorded.alone(count - 1)]

    def try_all(members: tuple[int, ...], shared: bool, points: int) -> None:
        candidates = recorded.rule.candidates(recorded.observed[list(members)], shared=shared, points=points)
        found.extend(recorded.measured(members, candidates))

    if not recorded.rule.chooses_members:
        try_all(everyone, shared, _POINTS)
        return found
    if recorded.chains is not None and count > _LARGEST:
        try_all(everyone, True, _POINTS)
    for size in range(1, min(count, _LARGEST) + 1) if subsets else [count]:
        chosen = list(combinations(everyone, size))
        for members in chosen:
            if members != (count - 1,):
                try_all(members, shared, _POINTS // len(chosen))
    tried: set[tuple[tuple[int, ...], ExitRule]] = set()
    for share in _SHARES:
        front = pareto_front(found, quality=quality, cost=cost)
        for point in front[:: 1 + len(front) // _FRONT]:
            near = point.rule.nearby(recorded.observed[list(point.members)], share, shared=shared)
            new = [rule for rule in near if (point.members, rule) not in tried]
            tried.update((point.members, rule) for rule in new)
            found.extend(recorded.measured(point.members, new))
    return found


def fastest(points: Iterable[OperatingPoint], max_drop: float) -> OperatingPoint:
    """Return the cheapest point with at most this estimated drop; of equals, the one with the smallest drop."""
    return min(
        (point for point in points if point.estimated_drop <= max_drop + 1e-12),
        key=lambda point: (point.cost, point.estimated_drop, len(point.members)),
    )


def most_accurate(points: Iterable[OperatingPoint], cost: float, *, p95: bool = False) -> OperatingPoint | None:
    """Return the point with the smallest estimated drop within a cost, the mean or the 95th percentile.

    Of equals, the cheapest; None where all cost more.
    """
    within = (point for point in points if (point.cost_p95 if p95 else point.cost) <= cost + 1e-12)
    return min(within, key=lambda point: (point.estimated_drop, point.cost, len(point.members)), default=None)


def pareto_front(
    points: Iterable[OperatingPoint], *, quality: str = "estimated_drop", cost: str = "cost"
) -> list[OperatingPoint]:
    """Return the points that no other beats in both of two fields, the most expensive first.

    `quality`: "estimated_drop" or "risk"; `cost`: "cost" or "cost_p95".
    """
    of_quality, of_cost = attrgetter(quality), attrgetter(cost)
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (of_quality(point), of_cost(point), len(point.members))):
        if not front or of_cost(point) < of_cost(front[-1]):
            front.append(point)
    return front


def threshold_for_speedup(members: Sequence[MemberEntry], scores: NDArray[np.float64], speedup: float) -> float:
    """Return the highest single tau at which the cascade reaches `speedup` (by layers) on this data.

    `scores`: what the exit rule compares with tau, float64, shape (members, texts). The higher tau is, the fewer texts
    leave early, so this is the most careful cascade of that speed. Raises InvalidOption for a speed-up that the members
    cannot reach.
    """
    whole, layers = sum(member.layers for member in whole_model(members)), cumulative_layers(members)
    fastest = whole / members[0].layers if members[0].layers else math.inf
    if not 0 < speedup <= fastest:
        raise InvalidOption("speedup", speedup, f"a number above 0 and up to {fastest:.2f}: the first member's alone")
    candidates = np.unique(np.concatenate([[0.0, 1.0], scores[:-1].ravel()]))
    low, high = 0, len(candidates) - 1  # the speed-up falls as tau rises; candidates[0] = 0 sends everyone out first
    while low < high:
        middle = (low + high + 1) // 2
        taus = (float(candidates[middle]),) * (len(members) - 1)
        executed = layers[replay(MaximumProbability(taus), scores)].sum()
        if not executed or scores.shape[1] * whole / executed >= speedup:
            low = middle
        else:
            high = middle - 1
    return float(candidates[low])
