"""A toy exit rule with a state, in one file: leave when the margins of the members so far add up to enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cascade_rt import Bundle, ExitRule
from cascade_rt.bundle.manifest import ManifestFields
from cascade_rt.engine.exit_rules import register
from cascade_rt.engine.task import Task
from cascade_rt.errors import InvalidOption


@register
@dataclass(frozen=True)
class MarginVotes(ExitRule):
    """Leave when the sum of the margins, of the two most probable classes, is at least `enough`."""

    enough: float

    kind: ClassVar[str] = "margin_votes"
    parameter: ClassVar[str] = "enough"
    flag: ClassVar[str] = "--enough"
    option: ClassVar[Mapping[str, Any]] = {"type": float, "metavar": "SUM", "help": "sum of margins at which to leave"}

    @classmethod
    def read(cls, fields: ManifestFields) -> Mapping[str, Any]:
        return {"enough": fields.take("enough", float)}

    @classmethod
    def of(cls, bundle: Bundle) -> MarginVotes:
        return cls(bundle.exit_rule["enough"])

    @property
    def settings(self) -> dict[str, Any]:
        return {"enough": self.enough}

    def changed(self, value: float, members: int) -> MarginVotes:
        if not value > 0:
            raise InvalidOption("enough", value, "a number above 0")
        return MarginVotes(float(value))

    def without_exits(self, members: int) -> MarginVotes:
        return MarginVotes(float(members))

    def observed(self, task: Task, probabilities: NDArray[np.float64]) -> NDArray[Any]:
        largest = np.sort(probabilities, axis=-1)
        margins: NDArray[Any] = largest[..., -1] - largest[..., -2]
        return margins

    def begin(self, texts: int) -> NDArray[np.float64]:
        return np.zeros(texts)

    def leaving(
        self, state: NDArray[np.float64], stage: int, rows: NDArray[np.intp], observed: NDArray[Any]
    ) -> NDArray[np.bool_]:
        state[rows] += observed
        enough: NDArray[np.bool_] = state[rows] >= self.enough
        return enough

    def candidates(self, observed: NDArray[Any], *, shared: bool, points: int) -> Iterator[MarginVotes]:
        for enough in np.quantile(observed.cumsum(axis=0), np.linspace(0.05, 0.95, 19)).tolist():
            yield MarginVotes(enough)
