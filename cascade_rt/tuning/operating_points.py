"""Operating points: where texts may leave, and with which thresholds, measured on texts that every member has answered.

`operating_points` measures the ways to run a bundle; `fastest` and `most_accurate` choose one by what was measured. The
paper's case, one tau for all members, is `shared`. Of a cascade, members that answer nothing do not run; of a chain of
segments, those before the last exit do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..engine.cost import layer_speedup, whole_model
from ..engine.exit_rules import exits, patient_exits
from ..errors import InvalidOption

_POINTS = 10_000  # tried for each number of members
_TAUS = 200  # tried for one member at most
_LARGEST = 4  # members of a subset


@dataclass(frozen=True)
class Answers:
    """What every member answers to some texts, and the cost of each answer.

    `scores`: float64 (members, texts), what the exit rule compares with thresholds; `right`: bool (members, texts),
    against the labels or, without labels, against the last member's answers; `costs`: float64 (members, texts), of
    running a member on a text, in any unit; `overhead`: float64 (texts,), the cost of a text apart from its members.
    """

    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    costs: NDArray[np.float64]
    overhead: NDArray[np.float64]
    noise: float = 1.0
    """Measured p95 over fitted time; 1.0 if not timed."""
    chains: Sequence[int] | None = None
    """For each member, the first segment of its model; None where all are complete models."""
    classes: NDArray[np.intp] | None = None
    """What each member answers, int (members, texts), under patience; None under rules with thresholds."""

    def take(self, rows: NDArray[np.intp]) -> Answers:
        """Return the answers to some of the texts."""
        return replace(
            self,
            scores=self.scores[:, rows],
            right=self.right[:, rows],
            costs=self.costs[:, rows],
            overhead=self.overhead[rows],
            classes=None if self.classes is None else self.classes[:, rows],
        )

    def paths(self, members: Sequence[int]) -> NDArray[np.float64]:
        """Return the cost of each text if it leaves at each of these members, float64 (members, texts)."""
        ran, steps = -1, []
        for member in members:
            start = member if self.chains is None else max(self.chains[member], ran + 1)
            steps.append(self.costs[start : member + 1].sum(axis=0))
            ran = member
        paths: NDArray[np.float64] = self.overhead + np.cumsum(steps, axis=0)
        return paths


@dataclass(frozen=True)
class OperatingPoint:
    """A way to run a bundle, measured on some texts.

    `members`: ascending indices of the bundle's members that may answer; the last of them always answers. `thresholds`:
    one for each but the last, none under patience. `risk`: share of texts that the point answers wrongly and the
    bundle's last member rightly; the drop of accuracy is never larger.
    """

    members: tuple[int, ...]
    thresholds: tuple[float, ...]
    accuracy: float
    risk: float
    cost: float
    cost_p95: float
    patience: int | None = None
    """Of the exit rule; None under rules with thresholds."""

    @property
    def way(self) -> tuple[tuple[int, ...], tuple[float, ...], int | None]:
        """The way alone, without what was measured: the arguments of `left_at` and `measure`."""
        return self.members, self.thresholds, self.patience


def left_at(
    answers: Answers, members: Sequence[int], thresholds: Sequence[float], patience: int | None = None
) -> NDArray[np.intp]:
    """Return the exit of each text as an index into `members`, int (texts,)."""
    if patience is not None and answers.classes is not None:
        return patient_exits(answers.classes[list(members)], patience)
    return exits(answers.scores[list(members)], thresholds)


def measure(
    answers: Answers, members: Sequence[int], thresholds: Sequence[float], patience: int | None = None
) -> OperatingPoint:
    """Measure one way to run the bundle."""
    return next(_measured(answers, tuple(members), [tuple(thresholds)], patience))


def operating_points(answers: Answers, *, shared: bool = False, subsets: bool = True) -> list[OperatingPoint]:
    """Measure the ways to run the bundle that are worth trying, each member alone among them.

    `shared`: one tau for all members. `subsets=False`: all members, or the last one alone; else up to four members
    where texts may leave. Thresholds are quantiles of the members' scores, as many per member as give about 10,000
    points for each number of members. With segments, one tau for all of them is tried too. Under patience, each number
    is tried.
    """
    count = len(answers.scores)
    found = list(_measured(answers, (count - 1,), [()]))
    if answers.classes is not None:
        for patience in range(1, count - 1):
            found += _measured(answers, tuple(range(count)), [()], patience)
        return found
    if answers.chains is not None and count > _LARGEST:
        everyone = tuple(range(count))
        found += _measured(answers, everyone, _candidates(answers, everyone, True, _POINTS))
    for size in range(1, min(count, _LARGEST) + 1) if subsets else [count]:
        chosen = list(combinations(range(count), size))
        for members in chosen:
            if members != (count - 1,):
                found += _measured(answers, members, _candidates(answers, members, shared, _POINTS // len(chosen)))
    return found


def fastest(points: Iterable[OperatingPoint], accuracy: float) -> OperatingPoint:
    """Return the cheapest point of at least this accuracy; of equals, the most accurate, then the smallest."""
    return min(
        (point for point in points if point.accuracy >= accuracy - 1e-12),
        key=lambda point: (point.cost, -point.accuracy, len(point.members)),
    )


def most_accurate(points: Iterable[OperatingPoint], cost: float, *, p95: bool = False) -> OperatingPoint | None:
    """Return the most accurate point of at most this cost, its mean or its 95th percentile; of equals, the cheapest.

    None where all cost more.
    """
    within = (point for point in points if (point.cost_p95 if p95 else point.cost) <= cost + 1e-12)
    return max(within, key=lambda point: (point.accuracy, -point.cost, -len(point.members)), default=None)


def pareto_front(points: Iterable[OperatingPoint], *, by: str = "accuracy") -> list[OperatingPoint]:
    """Return the points that no other beats both in cost and in accuracy, or in `risk`; the most expensive first."""
    front: list[OperatingPoint] = []
    best = -1.0 if by == "accuracy" else 1.0
    for point in sorted(points, key=lambda point: (best * getattr(point, by), point.cost, len(point.members))):
        if not front or point.cost < front[-1].cost:
            front.append(point)
    return front


def threshold_for_speedup(members: Sequence[MemberEntry], scores: NDArray[np.float64], speedup: float) -> float:
    """Return the highest single tau at which the cascade reaches `speedup` (by layers) on this data.

    `scores`: what the exit rule compares with tau, float64, shape (members, texts). The higher tau is, the fewer texts
    leave early, so this is the most careful cascade of that speed. Raises InvalidOption for a speed-up that the members
    cannot reach.
    """
    fastest = sum(member.layers for member in whole_model(members)) / members[0].layers
    if not 0 < speedup <= fastest:
        raise InvalidOption("speedup", speedup, f"a number above 0 and up to {fastest:.2f}: the first member's alone")
    candidates = np.unique(np.concatenate([[0.0, 1.0], scores[:-1].ravel()]))
    low, high = 0, len(candidates) - 1  # the speed-up falls as tau rises; candidates[0] = 0 sends everyone out first
    while low < high:
        middle = (low + high + 1) // 2
        taus = [float(candidates[middle])] * (len(members) - 1)
        if layer_speedup(members, exits(scores, taus)) >= speedup:
            low = middle
        else:
            high = middle - 1
    return float(candidates[low])


def _candidates(answers: Answers, members: tuple[int, ...], shared: bool, points: int) -> Iterator[tuple[float, ...]]:
    early = members[:-1]
    if shared and early:
        for tau in _quantiles(answers.scores[list(early)].ravel(), min(_TAUS, points)):
            yield (tau,) * len(early)
        return
    each = min(_TAUS, max(2, int(points ** (1 / max(1, len(early))))))
    yield from product(*(_quantiles(answers.scores[member], each) for member in early))


def _quantiles(scores: NDArray[np.float64], count: int) -> list[float]:
    """Return values between the scores of texts, so that no text's score equals a threshold."""
    values = np.unique(scores)
    places = np.searchsorted(values, np.quantile(scores, np.linspace(0, 1, count), method="lower"))
    middles = (values + np.append(values[1:], values[-1])) / 2
    found: list[float] = middles[np.unique(places)].tolist()
    return found


def _measured(
    answers: Answers,
    members: tuple[int, ...],
    thresholds: Iterable[tuple[float, ...]],
    patience: int | None = None,
) -> Iterator[OperatingPoint]:
    rows = np.arange(len(answers.overhead))
    right, last = answers.right[list(members)], answers.right[-1]
    paths = answers.paths(members)
    for taus in thresholds:
        place = left_at(answers, members, taus, patience)
        answered, costs = right[place, rows], paths[place, rows]
        yield OperatingPoint(
            members,
            taus,
            float(answered.mean()),
            float((last & ~answered).mean()),
            float(costs.mean()),
            answers.noise * float(np.partition(costs, (95 * len(costs)) // 100)[(95 * len(costs)) // 100]),
            patience,
        )
