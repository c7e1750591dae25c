"""Choose thresholds from labelled or unlabelled data that every member has answered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .bundle import MemberEntry
from .cost import layer_speedup
from .errors import InputError
from .gate import exits


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
