"""Texts, answers and counts of a runtime."""

from __future__ import annotations

from typing import NamedTuple

Text = str | tuple[str, str]
"""One instance: a single text, or a (text, text pair)."""


class Prediction(NamedTuple):
    """The answer to one text."""

    label: str
    """Name of the most probable class."""
    score: float
    """Its probability."""
    probabilities: tuple[float, ...]
    """Probability of each class, index = class id."""
    exit: int
    """The member that answered, 0-based."""
    layers: int
    """Encoder layers executed for this text, by all members that it ran; with a stride, on each of its windows."""
    truncated: bool
    """True if the text was longer than the bundle's `max_length` tokens and was cut."""
    labels: tuple[str, ...]
    """The label alone; with several labels per text all that are above their cut, possibly none."""


class StageRun(NamedTuple):
    """A run: one execution of a stage on a micro-batch."""

    stage: int
    """0-based index of the stage."""
    name: str
    """Name of the member that the stage runs."""
    rows: int
    """Texts in the micro-batch, or with a stride their windows."""
    tokens: int
    """Tokens per row, padding included."""
    seconds: float
    """Time of the engine's call."""


class Trace(NamedTuple):
    """The runs of one call of `CascadeRuntime.predict`."""

    texts: int
    """Texts in the call."""
    tokenization_seconds: float
    """Time of tokenization."""
    runs: list[StageRun]
    """Every run of every stage, in order."""

    @property
    def seconds(self) -> float:
        """Time of tokenization and of the engine's calls."""
        return self.tokenization_seconds + sum(run.seconds for run in self.runs)


class Stats(NamedTuple):
    """Counts of a runtime's answers so far."""

    texts: int
    """Texts answered."""
    exits: list[int]
    """Texts answered by each member."""
    mean_layers: float
    """Encoder layers executed per text; NaN before the first text."""
    tuned_rates: list[float] | None
    """Share of texts that each member answered when the thresholds were tuned; None if other thresholds are in use."""
    distance: float | None
    """Total variation distance from those rates, 0 (equal) to 1; None where there is nothing to compare."""
    p_value: float | None
    """Probability of a difference at least as large if the texts are of the same kind; at least 0.0001."""
    exact_kernels: tuple[str, ...] = ()
    """Members whose int8 products run on ONNX Runtime's exact, slower kernels, because this CPU has no VNNI."""
    from_words: int = 0
    """Texts whose tokens were put together from those of words, without the tokenizers library."""
