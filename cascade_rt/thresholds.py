"""Choose an operating point, members and their thresholds, from texts that every member has answered.

`operating_points` measures what a cascade can be; `fastest` and `most_accurate` choose by what was measured, and
`certify` by what can be promised: Learn then Test (Angelopoulos et al., 2021) with exact binomial p-values along a
fixed sequence. The paper's case, one tau for all members, is `shared`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from .bundle import MemberEntry
from .cost import layer_speedup
from .errors import InputError
from .gate import exits

_POINTS = 10_000  # tried for each number of members
_TAUS = 200  # tried for one gate at most
_LARGEST = 4  # members of a subset
_CAREFUL = 12  # points before the first of the front, each more careful than the next


@dataclass(frozen=True)
class Answers:
    """What every member answers to some texts, and what that costs.

    `confidences`: float64 (members, texts); `right`: bool (members, texts), against the labels or, without labels,
    against the last member's answers; `costs`: float64 (members, texts), of running a member on a text, in any unit;
    `overhead`: float64 (texts,), what a text costs before the first member.
    """

    confidences: NDArray[np.float64]
    right: NDArray[np.bool_]
    costs: NDArray[np.float64]
    overhead: NDArray[np.float64]
    noise: float = 1.0
    """How many times what is told here the slowest 5% of the same texts' costs were, where costs are measured times."""

    def take(self, rows: NDArray[np.intp]) -> Answers:
        """Return those for some of the texts."""
        taken = self.confidences[:, rows], self.right[:, rows], self.costs[:, rows], self.overhead[rows]
        return Answers(*taken, self.noise)


@dataclass(frozen=True)
class OperatingPoint:
    """A way to run a bundle, and what it does on some texts.

    `members` are places among the bundle's members, ascending; the last one named always emits. `thresholds`: one for
    each but the last. `risk` is the share of texts that it answers wrongly and the bundle's last member rightly: it
    bounds the drop of accuracy, because texts that only the cascade answers rightly can but make up for some.
    """

    members: tuple[int, ...]
    thresholds: tuple[float, ...]
    accuracy: float
    risk: float
    cost: float
    cost_p95: float


@dataclass(frozen=True)
class Certificate:
    """What Learn then Test found.

    `tested` of `sequence` points were tested on `texts` texts, `certified` of them hold. `losses`: texts of those
    that the chosen point answers wrongly and the last member rightly; `bound`: the exact upper confidence bound
    (Clopper-Pearson) of the risk of one point looked at alone; only `max_risk` is promised of a chosen one. Both are
    of the first point where none is certified.
    """

    max_risk: float
    confidence: float
    texts: int
    sequence: int
    tested: int
    certified: int
    losses: int
    bound: float
    p_value: float


def left_at(answers: Answers, members: Sequence[int], thresholds: Sequence[float]) -> NDArray[np.intp]:
    """Return where each text leaves, as a place in `members`, int (texts,)."""
    return exits(answers.confidences[list(members)], thresholds)


def measure(answers: Answers, members: Sequence[int], thresholds: Sequence[float]) -> OperatingPoint:
    """Measure one way to run the bundle."""
    return next(_measured(answers, tuple(members), [tuple(thresholds)]))


def operating_points(answers: Answers, *, shared: bool = False, subsets: bool = True) -> list[OperatingPoint]:
    """Measure every way to run the bundle that is worth trying, each member alone among them.

    `shared`: one tau for all members. `subsets=False`: all members, or the last one alone; else cascades of up to four
    members. Thresholds lie between the members' confidences, at quantiles, so many for each gate that about 10,000
    points are tried per number of members.
    """
    count = len(answers.confidences)
    found = list(_measured(answers, (count - 1,), [()]))
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


def certify(
    search: Answers,
    test: Answers,
    max_risk: float,
    confidence: float,
    *,
    shared: bool = False,
    subsets: bool = True,
) -> tuple[OperatingPoint | None, Certificate, list[OperatingPoint]]:
    """Return the cheapest point whose risk is at most `max_risk` with this confidence, and what was tested.

    The sequence, returned last, comes from `search` alone: the points that none beats in cost and risk, from the
    smallest risk on, and before them more careful versions of the first, because the cheapest of the points that lost
    nothing was lucky. Each is tested on `test` (other texts) against "its risk exceeds `max_risk`", with the exact
    binomial p-value, until one cannot be rejected; so the chance that the returned point breaks the promise is at
    most 1 - `confidence`, whatever the texts. None where not even the first can be certified; the last member alone
    needs no test and is never returned.
    """
    last_alone = (len(search.confidences) - 1,)
    points = operating_points(search, shared=shared, subsets=subsets)
    cost = measure(search, last_alone, ()).cost
    front = pareto_front((point for point in points if point.members != last_alone and point.cost < cost), by="risk")
    sequence = [point for point in _more_careful(search, front[:1]) if point.cost < cost] + front
    texts = len(test.overhead)
    chosen, certified, tested = None, 0, 0
    losses, p_value = 0, 1.0
    for point in sequence:
        tested += 1
        found = measure(test, point.members, point.thresholds)
        now = round(found.risk * texts)
        p = binomial_cdf(now, texts, max_risk)
        if tested == 1 or p <= 1 - confidence:
            losses, p_value = now, p
        if p > 1 - confidence:
            break
        chosen, certified = found, tested
    bound = upper_bound(losses, texts, confidence) if tested else 1.0
    return (
        chosen,
        Certificate(max_risk, confidence, texts, len(sequence), tested, certified, losses, bound, p_value),
        sequence,
    )


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """Return P(X <= successes) for X of the binomial distribution, exactly (summed from the terms' logarithms)."""
    if probability <= 0 or successes >= trials:
        return 1.0
    if probability >= 1 or successes < 0:
        return 0.0
    taken = np.arange(successes + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log(trials - taken[:-1]) - np.log(taken[1:]))])
    terms = ways + taken * np.log(probability) + (trials - taken) * np.log1p(-probability)
    return float(min(1.0, np.exp(terms).sum()))


def upper_bound(losses: int, texts: int, confidence: float) -> float:
    """Return the exact one-sided upper confidence bound (Clopper-Pearson) of a rate seen as `losses` in `texts`."""
    low, high = losses / texts, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(losses, texts, middle) > 1 - confidence else (low, middle)
    return high


def texts_needed(risk: float, max_risk: float, confidence: float) -> int | None:
    """Return about how many texts certify `max_risk`, if the risk stays `risk`; None where no number does.

    With so many it is certified 5 times of 6: one standard deviation above the losses to be expected is allowed for.
    """

    def enough(texts: int) -> bool:
        losses = math.ceil(risk * texts + math.sqrt(risk * (1 - risk) * texts))
        return binomial_cdf(losses, texts, max_risk) <= 1 - confidence

    if risk >= max_risk:
        return None
    low, high = 0, 1
    while not enough(high):
        if high > 10**6:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def threshold_for_speedup(members: Sequence[MemberEntry], confidences: NDArray[np.float64], speedup: float) -> float:
    """Return the highest single tau at which the cascade reaches `speedup` (by layers) on this data.

    `confidences`: float64, shape (members, texts). The higher tau, the fewer texts leave early, so this is the
    most careful cascade of that speed. Raises InputError for a speed-up beyond what the members allow.
    """
    fastest = members[-1].layers / members[0].layers
    if not 0 < speedup <= fastest:
        raise InputError(
            f"found a layer speed-up of {speedup}, expected one up to {fastest:.2f}: the first member's alone"
        )
    candidates = np.unique(np.concatenate([[0.0, 1.0], confidences[:-1].ravel()]))
    low, high = 0, len(candidates) - 1  # the speed-up falls as tau rises; candidates[0] = 0 sends everyone out first
    while low < high:
        middle = (low + high + 1) // 2
        taus = [float(candidates[middle])] * (len(members) - 1)
        if layer_speedup(members, exits(confidences, taus)) >= speedup:
            low = middle
        else:
            high = middle - 1
    return float(candidates[low])


def _candidates(answers: Answers, members: tuple[int, ...], shared: bool, points: int) -> Iterator[tuple[float, ...]]:
    gates = members[:-1]
    if shared and gates:
        for tau in _quantiles(answers.confidences[list(gates)].ravel(), min(_TAUS, points)):
            yield (tau,) * len(gates)
        return
    each = min(_TAUS, max(2, int(points ** (1 / max(1, len(gates))))))
    yield from product(*(_quantiles(answers.confidences[gate], each) for gate in gates))


def _quantiles(confidences: NDArray[np.float64], count: int) -> list[float]:
    """Return values between those that texts have, so that no text sits on a tau and leaves by its last digit."""
    values = np.unique(confidences)
    places = np.searchsorted(values, np.quantile(confidences, np.linspace(0, 1, count), method="lower"))
    middles = (values + np.append(values[1:], values[-1])) / 2
    found: list[float] = middles[np.unique(places)].tolist()
    return found


def _more_careful(answers: Answers, first: Sequence[OperatingPoint]) -> Iterator[OperatingPoint]:
    """Yield points with the same members and ever lower thresholds, from where almost nobody leaves early."""
    for point in first:
        gates = list(zip(point.members[:-1], point.thresholds, strict=True))
        stay = [float(np.mean(answers.confidences[gate] <= tau)) for gate, tau in gates]
        for step in range(_CAREFUL, 0, -1):
            levels = [share + (1 - share) * step / (_CAREFUL + 1) for share in stay]
            taus = tuple(
                float(np.quantile(answers.confidences[gate], level))
                for (gate, _), level in zip(gates, levels, strict=True)
            )
            if taus:
                yield measure(answers, point.members, taus)


def _measured(
    answers: Answers, members: tuple[int, ...], thresholds: Iterable[tuple[float, ...]]
) -> Iterator[OperatingPoint]:
    rows = np.arange(len(answers.overhead))
    right, last = answers.right[list(members)], answers.right[-1]
    paths = answers.overhead + np.cumsum(answers.costs[list(members)], axis=0)
    for taus in thresholds:
        place = left_at(answers, members, taus)
        answered, costs = right[place, rows], paths[place, rows]
        yield OperatingPoint(
            members,
            taus,
            float(answered.mean()),
            float((last & ~answered).mean()),
            float(costs.mean()),
            answers.noise * float(np.partition(costs, (95 * len(costs)) // 100)[(95 * len(costs)) // 100]),
        )
