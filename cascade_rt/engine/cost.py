"""Costs of a cascade, in layers and in FLOPs, and its speed-up ratios over always running the whole big model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..bundle.manifest import models


def whole_model(members: Sequence[MemberEntry]) -> Sequence[MemberEntry]:
    """Return the members that a cascade is compared with: its last member, or all segments of the last model."""
    return models(members)[-1]


def cumulative_layers(members: Sequence[MemberEntry]) -> NDArray[np.int64]:
    """Layers executed by a text that exits at each member: running two members costs both. Shape (members,)."""
    return np.cumsum([member.layers for member in members], dtype=np.int64)


def ratio(whole: float, executed: float) -> float | None:
    """Return a speed-up ratio; None where nothing was executed, so that it has no meaning."""
    return whole / executed if executed else None


def layer_speedup(
    members: Sequence[MemberEntry], exits: NDArray[np.intp], original: Sequence[MemberEntry] | None = None
) -> float | None:
    """Speed-up ratio by layers (paper, section 4.1): N times the layers of the original, over the layers executed.

    `exits`: the exit of each text, int, shape (texts,). `original`: the members to compare with, None for the last
    member, or for segments their whole model. None where no layer was executed.
    """
    whole = sum(member.layers for member in original or whole_model(members))
    return ratio(float(len(exits) * whole), float(cumulative_layers(members)[exits].sum()))


def flops_speedup(
    members: Sequence[MemberEntry],
    exits: NDArray[np.intp],
    lengths: NDArray[np.intp],
    original: Sequence[MemberEntry] | None = None,
) -> float | None:
    """Speed-up ratio by FLOPs; arguments as for `layer_speedup`, and `lengths`: tokens, int (texts,)."""
    path = np.cumsum([member.cost(lengths) for member in members], axis=0)
    executed = path[exits, np.arange(len(exits))].sum()
    whole = sum(float(member.cost(lengths).sum()) for member in original or whole_model(members))
    return ratio(whole, float(executed))
