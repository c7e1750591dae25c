"""The stages of a runtime, for what drives them otherwise than `CascadeRuntime.predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ..types import Prediction
from .exit_rules import ExitRule
from .stage import Stage
from .tokenization import TextTokenizer


class MakePrediction(Protocol):
    """Makes the answer to one text from its probabilities, the most probable class, its exit and its truncation."""

    def __call__(self, probabilities: list[float], winner: int, exit: int, truncated: bool) -> Prediction:
        """Return the answer."""


class Chain(NamedTuple):
    """What a text runs through, in order."""

    tokenizer: TextTokenizer
    stages: Sequence[Stage]
    rule: ExitRule
    budget: int
    """Padded tokens per micro-batch."""
    prediction: MakePrediction
