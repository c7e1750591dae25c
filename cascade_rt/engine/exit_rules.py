"""Exit rules: after each stage, which texts leave with its answer. At the last stage every text leaves.

A rule is an immutable value that owns its settings, what it looks at, its state, its candidates for tuning and its
option on the command line. `register` makes a manifest and the command line know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle, MemberEntry
from ..bundle.manifest import ENTROPY, EXIT_RULES, MAXIMUM_PROBABILITY, PATIENCE, ManifestFields
from ..errors import InvalidOption
from .task import Task

_FIRST = np.zeros(1, dtype=np.intp)
_TAUS = 200  # tried for one member at most
_TOGETHER = 3  # thresholds that change together at most
_CAREFUL = 12  # rules before one, each more careful than the next


class ExitRule(ABC):
    """Decides after each stage which texts leave."""

    kind: ClassVar[str]
    """As the manifest writes it."""
    parameter: ClassVar[str]
    """The setting that `CascadeRuntime` and the command line can change."""
    flag: ClassVar[str]
    """The command-line option for it."""
    option: ClassVar[Mapping[str, Any]]
    """Further arguments of argparse's `add_argument` for that option."""
    chooses_members: ClassVar[bool] = False
    """True if tuning may leave members out."""
    thresholds: tuple[float, ...] = ()
    """One for each member but the last; empty under rules without thresholds."""

    @classmethod
    @abstractmethod
    def read(cls, fields: ManifestFields) -> Mapping[str, Any]:
        """Take the settings out of a manifest's `exit_rule`; raise BundleError for what cannot be."""

    @classmethod
    @abstractmethod
    def of(cls, bundle: Bundle) -> ExitRule:
        """Return the rule of a bundle of this kind."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The manifest's `exit_rule` without the kind."""

    @abstractmethod
    def changed(self, value: Any, members: int) -> ExitRule:
        """Return the rule with another value of its parameter; raise InvalidOption for one that cannot be."""

    @abstractmethod
    def without_exits(self, members: int) -> ExitRule:
        """Return a rule of this kind under which no text leaves before the last of this many members."""

    @abstractmethod
    def observed(self, task: Task, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """Return what decisions are made from, (..., texts, ...), from probabilities (..., texts, labels)."""

    def begin(self, texts: int) -> Any:
        """Return the state for a call with this many texts; None for a rule that keeps none."""
        return None

    @abstractmethod
    def leaving(self, state: Any, stage: int, rows: NDArray[np.intp], observed: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which texts leave after `stage`, which is not the last: bool (rows,).

        `rows`: positions of the texts in the call, (rows,). `observed`: what `observed` returns for them, (rows, ...).
        """

    def leaves_alone(self, state: Any, stage: int, task: Task, probabilities: list[float], winner: int) -> bool:
        """Return whether the only text of a call leaves after `stage`, which is not the last; as `leaving` does.

        `winner`: its most probable class.
        """
        return bool(self.leaving(state, stage, _FIRST, self.observed(task, np.array([probabilities])))[0])

    def among(self, own: Sequence[MemberEntry], members: Sequence[MemberEntry]) -> ExitRule:
        """Return the rule for other members than its `own`."""
        return self

    def candidates(self, observed: NDArray[Any], *, shared: bool, points: int) -> Iterator[ExitRule]:
        """Yield about so many rules that are worth trying on recorded texts.

        `observed`: what `observed` returns, (members, texts, ...). `shared`: one setting for all members, where each
        may have its own.
        """
        yield self

    def nearby(self, observed: NDArray[Any], share: float, *, shared: bool) -> Iterator[ExitRule]:
        """Yield rules that differ a little: about this share of the texts leaves elsewhere. Arguments: `candidates`."""
        yield from ()

    def more_careful(self, observed: NDArray[Any]) -> Iterator[ExitRule]:
        """Yield rules under which fewer texts leave early, from where almost none does."""
        yield from ()


def register(rule: type[ExitRule]) -> type[ExitRule]:
    """Make manifests and the command line know a kind of exit rule; a decorator."""
    EXIT_RULES[rule.kind] = rule
    return rule


def exit_rule(bundle: Bundle) -> ExitRule:
    """Return the exit rule that a manifest describes."""
    rule: ExitRule = EXIT_RULES[bundle.exit_rule["kind"]].of(bundle)
    return rule


def replay(rule: ExitRule, observed: NDArray[Any]) -> NDArray[np.intp]:
    """Return the exit of each text, int (texts,), from what a rule has observed at all stages, (stages, texts, ...)."""
    last, texts = len(observed) - 1, observed.shape[1]
    state = rule.begin(texts)
    exits = np.full(texts, last, dtype=np.intp)
    waiting = np.arange(texts)
    for stage in range(last):
        seen = observed[stage] if len(waiting) == texts else observed[stage][waiting]
        leaving = rule.leaving(state, stage, waiting, seen)
        exits[waiting[leaving]] = stage
        if stage + 1 < last:
            waiting = waiting[~leaving]
    return exits


@dataclass(frozen=True)
class Thresholds(ExitRule):
    """Leave where a score exceeds the stage's threshold, strictly."""

    thresholds: tuple[float, ...]

    chooses_members: ClassVar[bool] = True
    parameter: ClassVar[str] = "thresholds"
    flag: ClassVar[str] = "--threshold"
    option: ClassVar[Mapping[str, Any]] = {
        "type": float,
        "metavar": "TAU",
        "help": "one threshold for all members, also those that tuning left out (default: the bundle's)",
    }

    @classmethod
    def read(cls, fields: ManifestFields) -> Mapping[str, Any]:
        """Take no settings: the thresholds are those of the members."""
        return {}

    @classmethod
    def of(cls, bundle: Bundle) -> Thresholds:
        """Return the rule with the thresholds of a bundle's members."""
        return cls(tuple(bundle.thresholds))

    @property
    def settings(self) -> dict[str, Any]:
        """No settings: thresholds are those of the members."""
        return {}

    def changed(self, value: float | Sequence[float], members: int) -> Thresholds:
        """Return the rule with one number for all members, or a list of one per member but the last."""
        return replace(self, thresholds=tuple(checked_thresholds(value, members)))

    def without_exits(self, members: int) -> Thresholds:
        """Return the rule with threshold 1, which no score exceeds."""
        return replace(self, thresholds=(1.0,) * (members - 1))

    def leaving(self, state: Any, stage: int, rows: NDArray[np.intp], observed: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which scores exceed the threshold of the stage."""
        decisions: NDArray[np.bool_] = observed > self.thresholds[stage]
        return decisions

    def among(self, own: Sequence[MemberEntry], members: Sequence[MemberEntry]) -> Thresholds:
        """Return the rule for other members: those that it has keep their thresholds, others take the bundle's.

        Where the bundle has none either, no text leaves.
        """
        ours = dict(zip((entry.name for entry in own), self.thresholds, strict=False))
        kept = [ours.get(entry.name, entry.threshold) for entry in members[:-1]]
        return replace(self, thresholds=tuple(1.0 if threshold is None else threshold for threshold in kept))

    def candidates(self, observed: NDArray[Any], *, shared: bool, points: int) -> Iterator[Thresholds]:
        """Yield rules with quantiles of the members' scores as thresholds."""
        early = observed[:-1]
        if shared and len(early):
            for tau in _quantiles(early.ravel(), min(_TAUS, points)):
                yield replace(self, thresholds=(tau,) * len(early))
            return
        each = min(_TAUS, max(2, int(points ** (1 / max(1, len(early))))))
        for taus in product(*(_quantiles(scores, each) for scores in early)):
            yield replace(self, thresholds=taus)

    def nearby(self, observed: NDArray[Any], share: float, *, shared: bool) -> Iterator[Thresholds]:
        """Yield rules with thresholds lower and higher by this share of the scores.

        Up to three thresholds change together in all ways, more of them one at a time.
        """
        early = observed[:-1]
        columns, own = ([early.ravel()], self.thresholds[:1]) if shared and len(early) else (early, self.thresholds)
        around = [_around(scores, tau, share) for scores, tau in zip(columns, own, strict=True)]
        if len(own) <= _TOGETHER:
            moved: Iterable[tuple[float, ...]] = product(*around)
        else:
            moved = ((*own[:at], tau, *own[at + 1 :]) for at, taus in enumerate(around) for tau in taus)
        for taus in moved:
            if taus != own:
                yield replace(self, thresholds=taus * len(early) if shared else taus)

    def more_careful(self, observed: NDArray[Any]) -> Iterator[Thresholds]:
        """Yield rules with higher thresholds, the highest first."""
        early = list(zip(observed[:-1], self.thresholds, strict=True))
        stay = [float(np.mean(scores <= tau)) for scores, tau in early]
        for step in range(_CAREFUL if early else 0, 0, -1):
            levels = [share + (1 - share) * step / (_CAREFUL + 1) for share in stay]
            taus = (float(np.quantile(scores, level)) for (scores, _), level in zip(early, levels, strict=True))
            yield replace(self, thresholds=tuple(taus))


@register
class MaximumProbability(Thresholds):
    """Leave where the confidence exceeds the stage's threshold (paper, Algorithm 1)."""

    kind = MAXIMUM_PROBABILITY

    def observed(self, task: Task, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """Return the confidence of each text."""
        return task.confidence(probabilities)

    def leaves_alone(self, state: Any, stage: int, task: Task, probabilities: list[float], winner: int) -> bool:
        """Return whether the confidence exceeds the threshold."""
        return task.confidence_of_one(probabilities, winner) > self.thresholds[stage]


@register
class Entropy(Thresholds):
    """Leave where the certainty, 1 minus the normalised entropy, exceeds the threshold (DeeBERT, FastBERT)."""

    kind = ENTROPY

    def observed(self, task: Task, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """Return the certainty of each text."""
        return task.certainty(probabilities)


@register
@dataclass(frozen=True)
class Patience(ExitRule):
    """Leave when this many stages in a row have given the answer of the one before them (PABEE; Zhou et al., 2020)."""

    patience: int

    kind: ClassVar[str] = PATIENCE
    parameter: ClassVar[str] = "patience"
    flag: ClassVar[str] = "--patience"
    option: ClassVar[Mapping[str, Any]] = {
        "type": int,
        "metavar": "N",
        "help": "for bundles with this exit rule: how many members in a row must agree (default: the bundle's)",
    }

    @classmethod
    def read(cls, fields: ManifestFields) -> Mapping[str, Any]:
        """Take the number out of a manifest's `exit_rule`."""
        return {"patience": fields.take("patience", int, at_least=1)}

    @classmethod
    def of(cls, bundle: Bundle) -> Patience:
        """Return the rule of a bundle of this kind."""
        return cls(bundle.exit_rule["patience"])

    @property
    def settings(self) -> dict[str, Any]:
        """The number."""
        return {"patience": self.patience}

    def changed(self, value: int, members: int) -> Patience:
        """Return the rule with another number, from 1."""
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InvalidOption("patience", value, "a whole number from 1")
        return Patience(int(value))

    def without_exits(self, members: int) -> Patience:
        """Return the rule with as many as there are members: at most one fewer can agree with the one before."""
        return Patience(members)

    def observed(self, task: Task, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        """Return the answers, with one more axis where they have none: (..., texts, labels or 1)."""
        answers = task.answers(probabilities)
        return answers if task.several else answers[..., None]

    def begin(self, texts: int) -> _Agreements:
        """Return counts for a call with this many texts."""
        return _Agreements(np.zeros(texts, dtype=np.intp))

    def leaving(
        self, state: _Agreements, stage: int, rows: NDArray[np.intp], observed: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Return for which texts enough stages in a row have agreed."""
        decisions: NDArray[np.bool_] = state.counted(stage, rows, observed) >= self.patience
        return decisions

    def candidates(self, observed: NDArray[Any], *, shared: bool, points: int) -> Iterator[Patience]:
        """Yield each number."""
        yield from map(Patience, range(1, len(observed) - 1))


class _Agreements:
    """Counts, for each text, of the stages in a row that have agreed with the one before them."""

    def __init__(self, counts: NDArray[np.intp]) -> None:
        self._counts = counts
        self._before: NDArray[Any] | None = None

    def counted(self, stage: int, rows: NDArray[np.intp], answers: NDArray[Any]) -> NDArray[np.intp]:
        """Take a stage's answers, (rows, ...), and return the counts, (rows,)."""
        if self._before is None:
            self._before = np.empty((len(self._counts), answers.shape[-1]), dtype=answers.dtype)
        if stage:
            agree = (answers == self._before[rows]).all(axis=-1)
            self._counts[rows] = np.where(agree, self._counts[rows] + 1, 0)
        self._before[rows] = answers
        return self._counts[rows]


def checked_thresholds(thresholds: float | Sequence[float], members: int) -> list[float]:
    """Return one threshold per member but the last, from one number for all or a list.

    Raises InvalidOption for a wrong count or a value outside [0, 1].
    """
    if isinstance(thresholds, Real):
        return [_checked(thresholds)] * (members - 1)
    if isinstance(thresholds, str | bytes | Mapping) or np.ndim(thresholds) != 1:
        raise InvalidOption("thresholds", thresholds, "a number from 0 to 1, or a list of one per member but the last")
    chosen = [_checked(threshold) for threshold in np.asarray(thresholds, dtype=object).tolist()]
    if len(chosen) != members - 1:
        raise InvalidOption("thresholds", chosen, f"{members - 1} of them: one per member but the last")
    return chosen


def _checked(threshold: object) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise InvalidOption("thresholds", threshold, "a number from 0 to 1")
    return float(threshold)


def _quantiles(scores: NDArray[np.float64], count: int) -> list[float]:
    """Return values between the scores of texts, so that no text's score equals a threshold."""
    values = np.unique(scores)
    places = np.searchsorted(values, np.quantile(scores, np.linspace(0, 1, count), method="lower"))
    found: list[float] = _above(values)[np.unique(places)].tolist()
    return found


def _around(scores: NDArray[np.float64], tau: float, share: float) -> tuple[float, float, float]:
    """Return a lower threshold, this one, and a higher one: each about this share of the scores apart."""
    values, counts = np.unique(scores, return_counts=True)
    stay = np.cumsum(counts)  # scores that do not exceed a threshold above each value
    here = max(0, int(np.searchsorted(values, tau, side="right")) - 1)
    step = share * len(scores)
    low = min(here - 1, int(np.searchsorted(stay, stay[here] - step)))
    high = max(here + 1, int(np.searchsorted(stay, stay[here] + step)))
    lower, higher = _above(values)[np.clip([low, high], 0, len(values) - 1)].tolist()
    return lower, tau, higher


def _above(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the middle between each of ascending values and the next; for the last, itself."""
    middles: NDArray[np.float64] = (values + np.append(values[1:], values[-1])) / 2
    return middles
