"""Windows: a text of more tokens than a bundle takes, as several rows whose answers become one before the exit rule.

Rows and texts are two numberings then. `counts` says how many rows, one after another, each text has; it is None where
each has one, so that a text is a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidOption
from .task import AGGREGATES, MEAN, Task


@dataclass(frozen=True)
class Windows:
    """The way to read long texts: the arguments of `CascadeRuntime` of the same names."""

    stride: int
    """Tokens that two neighbouring windows share."""
    aggregate: str = MEAN
    """One of AGGREGATES: what becomes of the windows' probabilities."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value that is out of range; how much can be shared depends on the tokenizer."""
        if isinstance(self.stride, bool) or not isinstance(self.stride, Integral) or self.stride < 0:
            raise InvalidOption("stride", self.stride, "a whole number of tokens from 0, or none at all")
        object.__setattr__(self, "stride", int(self.stride))
        if self.aggregate not in AGGREGATES:
            raise InvalidOption("aggregate", self.aggregate, " or ".join(AGGREGATES))

    @classmethod
    def of(cls, stride: int | None, aggregate: str | None) -> Windows | None:
        """Return the windows that two settings ask for; None without a stride, where texts are cut."""
        if stride is not None:
            return cls(stride, MEAN if aggregate is None else aggregate)
        if aggregate is not None:
            raise InvalidOption("aggregate", aggregate, "a stride with it: without one, long texts are cut")
        return None


class _InRows(Protocol):
    @property
    def counts(self) -> NDArray[np.intp] | None: ...


Source = TypeVar("Source", bound=_InRows)


def rows_of(counts: NDArray[np.intp] | None, texts: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the rows of some texts, (texts,), one text after another."""
    if counts is None:
        return texts
    own = counts[texts]
    starts = (counts.cumsum() - counts)[texts]
    first = (starts - (own.cumsum() - own)).astype(np.intp).repeat(own)  # of each text, less the rows before it
    return first + np.arange(len(first))


def rows_of_picks(
    picks: Sequence[tuple[Source, int]],
) -> tuple[Sequence[tuple[Source, int]], NDArray[np.intp] | None]:
    """Return the rows of single texts of several calls, and their counts; `picks`: each call, and the text there."""
    if all(source.counts is None for source, _ in picks):
        return picks, None
    texts = [rows_of(source.counts, np.array([text], dtype=np.intp)).tolist() for source, text in picks]
    rows = [(source, row) for (source, _), own in zip(picks, texts, strict=True) for row in own]
    return rows, np.array(list(map(len, texts)), dtype=np.intp)


def aggregated(
    task: Task, logits: NDArray[np.float32], counts: NDArray[np.intp], aggregate: str
) -> NDArray[np.float32]:
    """Return one answer for each text, (texts, labels), from those to its windows, (windows, labels), in their order.

    A text of one window keeps its logits as they are. Others are computed text by text, so that the last bit does not
    depend on the texts beside them.
    """
    starts = counts.cumsum() - counts
    answers: NDArray[np.float32] = logits[starts]
    for text in np.flatnonzero(counts > 1).tolist():
        own = logits[starts[text] : starts[text] + counts[text]]
        answers[text] = task.aggregated(own, aggregate)
    return answers
