"""Texts on their way: what `CascadeRuntime.predict` knows of them between two stages.

The stages of one journey may run in several processes. Pickling keeps the tokens, or hidden states, of the texts that
have not left, and drops those of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .exit_rules import Decisions
from .hidden_states import HiddenStates
from .tokenization import Encoded

StageCall = tuple[int, tuple[int, int], float]
"""One run of a stage: its index, (rows, tokens) of the micro-batch, and seconds."""


@dataclass
class Journey:
    """The texts of one call."""

    probabilities: NDArray[np.float64]
    """Of the member that ran last, shape (texts, labels)."""
    exits: NDArray[np.intp]
    """Which member answered, shape (texts,); valid for texts that have left."""
    waiting: NDArray[np.intp]
    """Rows of the texts that have not left, from the longest to the shortest."""
    truncated: list[bool]
    """Whether tokens were cut off, for each text."""
    decisions: Decisions
    inputs: dict[str, Encoded | HiddenStates]
    """What stages read, by its kind."""
    tokenization_seconds: float = 0.0
    runs: list[StageCall] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tokens and hidden states of texts that have left."""
        kept = {kind: read.kept(self.waiting) for kind, read in self.inputs.items()}
        return vars(replace(self, inputs=kept))
