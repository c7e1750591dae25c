"""Questions to `tune` and its answers, as data classes; `TuningReport.to_json` is what `--json` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..bundle import MemberEntry
from ..errors import InvalidOption
from .certify import Certificate

LATENCY, AUTO = "latency", "auto"
COSTS = ("layers", "flops", LATENCY)
_TRADE_OFFS = 12


@dataclass(frozen=True)
class Question:
    """The objective: at most one of `max_drop`, `speedup` and `budget_ms`; none for the front alone.

    Raises InvalidOption for a value out of range, and InputError for options that exclude each other.
    """

    max_drop: float | None = None
    """The fastest point with at most this estimated drop, a share of accuracy lost against the last member."""
    speedup: float | None = None
    """The point with the smallest estimated drop that is at least this many times as fast as the last member."""
    budget_ms: float | None = None
    """The point with the smallest estimated drop that takes at most this many milliseconds per text."""
    p95: bool = False
    """True if the budget is for the 95th percentile; else for the mean."""
    confidence: float | None = None
    """Guarantee `max_drop` with this confidence."""
    cost: str = AUTO
    """The measure of speed-up: one of COSTS, or "auto" for what `measured_by` says."""
    shared: bool = False
    """One tau for all members, as in the paper."""
    subsets: bool = True
    """True if members may be left out."""
    seed: int = 0
    """Seed of the split into the half that proposes and the half that certifies."""

    def __post_init__(self) -> None:
        """Check the values."""
        asked = [name for name in ("max_drop", "speedup", "budget_ms") if getattr(self, name) is not None]
        for name in asked[1:]:
            raise InvalidOption(name, getattr(self, name), "one objective: a maximum drop, a speed-up or a budget")
        for name, lowest, highest, expected in (
            ("max_drop", 0.0, 1.0, "a share from 0 to below 1"),
            ("speedup", 1e-9, math.inf, "a number above 0"),
            ("budget_ms", 1e-9, math.inf, "a number above 0"),
            ("confidence", 0.5, 1.0, "a number from 0.5 to below 1"),
            ("seed", 0, 2**32, "a whole number from 0"),
        ):
            value = getattr(self, name)
            if value is not None and not lowest <= value < highest:
                raise InvalidOption(name, value, expected)
        if self.confidence is not None and self.max_drop is None:
            raise InvalidOption("confidence", self.confidence, "a maximum drop with it: that is what can be guaranteed")
        if self.p95 and self.budget_ms is None:
            raise InvalidOption("p95", self.p95, "a budget in ms with it")
        if self.cost not in (AUTO, *COSTS):
            raise InvalidOption("cost", self.cost, f"one of {', '.join((AUTO, *COSTS))}")

    def measured_by(self, members: Sequence[MemberEntry]) -> str:
        """Return the cost, one of COSTS, that the answer is chosen by; a budget in milliseconds is of latency.

        "auto" stands for layers, the paper's measure, unless one of the members has none. Then it stands for latency:
        to layers such a member is free, and its FLOPs leave out what its texts mostly take, such as tokenization.
        """
        if self.budget_ms is not None:
            return LATENCY
        if self.cost != AUTO:
            return self.cost
        return "layers" if all(member.layers for member in members) else LATENCY

    @property
    def asks(self) -> bool:
        """True if anything is asked; else only the front is shown."""
        return (self.max_drop, self.speedup, self.budget_ms) != (None, None, None)


@dataclass(frozen=True)
class Choice:
    """One way to run the bundle, with what it does on the tuning texts; speed-ups are over the last member alone."""

    members: list[str]
    thresholds: list[float]
    accuracy: float
    drop: float
    """Accuracy of the last member minus this one's."""
    drop_error: float
    """Standard error of `drop`, text by text."""
    estimated_drop: float
    """`drop`, or the estimate from labels and the last member's probabilities, where that is larger.

    Objectives go by it; a guarantee goes by `risk`.
    """
    risk: float
    """Share of texts answered wrongly here and rightly by the last member."""
    exits: list[int]
    layers_speedup: float | None
    """None where no layer is executed."""
    flops_speedup: float | None
    latency_speedup: float
    latency_ms: float
    latency_p95_ms: float
    exit_rule: dict[str, Any]
    """Kind and settings, as the manifest writes them."""

    @property
    def alone(self) -> bool:
        """True if the last of the members answers every text; under rules without thresholds, of these texts."""
        return all(tau >= 1 for tau in self.thresholds) if self.thresholds else not any(self.exits[:-1])

    def speedup(self, cost: str) -> float | None:
        """Return the speed-up ratio by one of COSTS; None where it has no meaning."""
        return {"layers": self.layers_speedup, "flops": self.flops_speedup, "latency": self.latency_speedup}[cost]


@dataclass(frozen=True)
class MoreTexts:
    """A faster point that more texts would certify."""

    speedup: float | None
    risk: float
    texts: int


@dataclass(frozen=True)
class Guarantee(Certificate):
    """The result of Learn then Test on this file, and points that more texts would certify."""

    searched_on: int
    with_more_texts: list[MoreTexts]


@dataclass(frozen=True)
class Data:
    """The texts of a tuning."""

    texts: int
    sha256: str
    stride: int | None = None
    """Tokens that the windows of long texts shared; None where they were cut."""
    aggregate: str | None = None


@dataclass(frozen=True)
class TuningReport:
    """The answer of `tune`."""

    question: Question
    data: Data
    compared_with: str
    alone: list[Choice]
    """Each member alone."""
    chosen: Choice | None
    """None where nothing was asked, or where nothing could be guaranteed."""
    held_out: Choice | None
    """The chosen point on texts that were used for no choice; None where there are none."""
    guarantee: Guarantee | None
    front: list[Choice]
    """The points that no other beats in both cost and estimated drop."""
    verdict: str
    """From the held-out texts where there are some, else from the tuning texts."""

    def trade_offs(self) -> list[Choice]:
        """Return the front, or of a long one every nth point: at most a dozen, for a table."""
        return self.front[:: max(1, -(-len(self.front) // _TRADE_OFFS))]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values for JSON; `stride` and `aggregate` only where long texts were read in windows."""
        report = asdict(self)
        report["data"] = {key: value for key, value in report["data"].items() if value is not None}
        return report


def verdict(question: Question, chosen: Choice | None, alone: list[Choice], guarantee: Guarantee | None) -> str:
    """Say whether the chosen cascade is worth it, against each member alone at its measured latency."""
    last = alone[-1]
    if chosen is None:
        if guarantee is None:
            return "nothing was asked, so nothing was chosen: these are the best trade-offs"
        return f"do not cascade on this evidence: nothing faster than {_name(last)} alone can be guaranteed"
    if chosen.alone and chosen.members == last.members:
        return f"do not cascade: use {_name(last)} alone"
    found = f"{chosen.latency_speedup:.2f}x as fast as {_name(last)} alone here, {_lost(chosen)}"
    if chosen.alone:
        return f"do not cascade: use {_name(chosen)} alone, {found}"
    return _of_cascade(chosen, alone, found, "" if question.cost == LATENCY else "; tune by measured latency")


def _of_cascade(chosen: Choice, alone: list[Choice], found: str, tune_again: str) -> str:
    """Return the verdict on several members: against the most accurate member alone that is as fast as they are."""
    as_fast = [member for member in alone if member.latency_ms <= chosen.latency_ms]
    rival = max(as_fast, key=lambda member: (member.accuracy, -member.latency_ms), default=None)
    if rival and rival.accuracy >= chosen.accuracy and rival.estimated_drop <= chosen.estimated_drop:
        return (
            f"do not cascade: {_name(rival)} alone is as accurate ({100 * rival.accuracy:.2f}%) and as fast here "
            f"({rival.latency_ms:.2f} ms against {chosen.latency_ms:.2f}){tune_again}"
        )
    if chosen.latency_speedup <= 1:
        return f"do not cascade{tune_again}: {found}"
    left_out = ", ".join(_name(member) for member in alone if _name(member) not in chosen.members)
    cascade = " + ".join(chosen.members) + (f" (without {left_out})" if left_out else "")
    beside = "" if rival is None else f"; {_name(rival)} alone: {rival.latency_speedup:.2f}x, {_lost(rival)}"
    return f"cascade {cascade}: {found}{beside}"


def _name(member: Choice) -> str:
    return member.members[-1]


def _lost(choice: Choice) -> str:
    points, error = 100 * choice.drop, 100 * choice.drop_error
    return f"{abs(points):.2f} (+- {error:.2f}) points of accuracy {'lost' if points >= 0 else 'gained'} on these texts"
