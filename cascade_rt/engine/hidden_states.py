"""Hidden states that one segment leaves and the next one reads, for the texts that have not left."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .windows import rows_of, rows_of_picks


class HiddenStates:
    """Hidden states and attention mask of some texts, padded on the right to the longest row of a micro-batch.

    Those of texts that leave are never copied; they are freed together with all others of their stage.
    """

    def __init__(self, lengths: NDArray[np.intp], counts: NDArray[np.intp] | None = None) -> None:
        """`lengths`: tokens of each row of the call, (rows,). `counts`: rows of each text, None where each has one."""
        self.lengths = lengths
        self.counts = counts
        self._states: dict[int, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}  # views into the micro-batches

    @classmethod
    def gathered(cls, picks: Sequence[tuple[HiddenStates, int]]) -> HiddenStates:
        """Return the states of single texts of several calls together: for each the call's, and its position there."""
        rows, counts = rows_of_picks(picks)
        found = cls(np.array([source.lengths[row] for source, row in rows], dtype=np.intp), counts)
        found._states = {at: source._states[row] for at, (source, row) in enumerate(rows)}
        return found

    def kept(self, texts: NDArray[np.intp]) -> HiddenStates:
        """Return the states of these texts, still under their rows."""
        found = HiddenStates(self.lengths, self.counts)
        rows = rows_of(self.counts, texts).tolist()
        found._states = {row: self._states[row] for row in rows if row in self._states}
        return found

    def put(self, rows: NDArray[np.intp], mask: NDArray[np.int64], states: NDArray[np.float32] | None) -> None:
        """Keep the states of a micro-batch, (rows, tokens, hidden), without its padding; None keeps nothing.

        `rows`: positions in the call, (rows,). `mask`: attention mask of the micro-batch, (rows, tokens).
        """
        if states is None:
            return
        for at, row in enumerate(rows.tolist()):
            start = int(mask[at].argmax())
            own = slice(start, start + max(1, int(self.lengths[row])))  # a text without a token has one of padding
            self._states[row] = states[at, own], mask[at, own]

    def batch(self, rows: NDArray[np.intp], names: Collection[str] = ()) -> dict[str, NDArray[Any]]:
        """Pad some texts to the longest: `hidden_states` (rows, tokens, hidden) and `attention_mask` (rows, tokens).

        Both, whatever the `names` of those that are needed.
        """
        some = [self._states[row] for row in rows.tolist()]
        shape = (len(some), max(len(mask) for _, mask in some))
        hidden = np.zeros((*shape, some[0][0].shape[-1]), dtype=np.float32)
        mask = np.zeros(shape, dtype=np.int64)
        for at, (states, own) in enumerate(some):
            hidden[at, : len(own)] = states
            mask[at, : len(own)] = own
        return {"hidden_states": hidden, "attention_mask": mask}
