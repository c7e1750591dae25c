"""Learn then Test: the operating point whose risk can be guaranteed.

Points proposed by one part of the texts are tested on the other with exact binomial p-values along a fixed sequence
(Angelopoulos et al., 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .operating_points import OperatingPoint, Recorded, operating_points, pareto_front


@dataclass(frozen=True)
class Certificate:
    """The result of Learn then Test.

    `tested` of `sequence` points were tested on `texts` texts, and `certified` of them passed. `losses`: texts that the
    chosen point answers wrongly and the last member rightly; `bound`: exact upper confidence bound (Clopper-Pearson) of
    the risk of that point, if it were the only one tested. The guarantee is `max_risk`, not `bound`. Where no point is
    certified, `losses`, `bound` and `p_value` are those of the first.
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


def certify(
    search: Recorded,
    test: Recorded,
    max_risk: float,
    confidence: float,
    *,
    shared: bool = False,
    subsets: bool = True,
) -> tuple[OperatingPoint | None, Certificate, list[OperatingPoint]]:
    """Return the cheapest point whose risk is at most `max_risk` with this confidence, and what was tested.

    The sequence, returned last, comes from `search` alone: the points on the front of cost and risk, from the smallest
    risk on, and before them more careful versions of the first, because the cheapest of the points without a loss is
    there by chance. Each is tested on `test` (other texts) against the hypothesis "its risk exceeds `max_risk`", with
    the exact binomial p-value, until one cannot be rejected. So the probability that the returned point's risk exceeds
    `max_risk` is at most 1 - `confidence`, whatever the texts. Returns None if not even the first is certified; the
    last member alone needs no test and is never returned.
    """
    last_alone = search.alone(len(search.right) - 1)
    points = operating_points(search, shared=shared, subsets=subsets, quality="risk")
    faster = (point for point in points if point.members != last_alone.members and point.cost < last_alone.cost)
    front = pareto_front(faster, quality="risk")
    careful = [
        careful
        for first in front[:1]
        for careful in search.measured(first.members, first.rule.more_careful(search.observed[list(first.members)]))
    ]
    sequence = [point for point in careful if point.cost < last_alone.cost] + front
    texts = len(test.overhead)
    chosen, certified, tested = None, 0, 0
    losses, p_value = 0, 1.0
    for point in sequence:
        tested += 1
        found = test.measure(point.members, point.rule)
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
    """Return P(X <= successes) of the binomial distribution, exact: a sum of terms from their logarithms."""
    if probability <= 0 or successes >= trials:
        return 1.0
    if probability >= 1 or successes < 0:
        return 0.0
    taken = np.arange(successes + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log(trials - taken[:-1]) - np.log(taken[1:]))])
    terms = ways + taken * np.log(probability) + (trials - taken) * np.log1p(-probability)
    return float(min(1.0, np.exp(terms).sum()))


def upper_bound(losses: int, texts: int, confidence: float) -> float:
    """Return the exact one-sided upper confidence bound (Clopper-Pearson) of a rate with `losses` in `texts`."""
    low, high = losses / texts, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(losses, texts, middle) > 1 - confidence else (low, middle)
    return high


def texts_needed(risk: float, max_risk: float, confidence: float) -> int | None:
    """Return about how many texts certify `max_risk` if the risk stays `risk`; None if no number does.

    With that many texts it is certified 5 times out of 6: the losses may be one standard deviation above the expected.
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
