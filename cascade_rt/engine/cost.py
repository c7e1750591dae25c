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


def windows_of(lengths: NDArray[np.intp], window: int | None) -> NDArray[np.intp]:
    """Return how many rows texts have, (texts,), from the tokens in all of their rows.

    `window`: tokens of a full one, which all rows of a text are but the last; None where each text is one row.
    """
    if window is None:
        return np.ones(len(lengths), dtype=np.intp)
    return np.maximum(1, -(-lengths // window))


def text_flops(entry: MemberEntry, lengths: NDArray[np.intp], window: int | None = None) -> NDArray[np.float64]:
    """FLOPs of a member for each text, float64 (texts,); arguments as for `windows_of`."""
    if window is None:
        whole: NDArray[np.float64] = entry.cost(lengths)
        return whole
    full = windows_of(lengths, window) - 1
    rows: NDArray[np.float64] = full * entry.cost(window) + entry.cost(lengths - full * window)
    return rows


def ratio(whole: float, executed: float) -> float | None:
    """Return a speed-up ratio; None where nothing was executed, so that it has no meaning."""
    return whole / executed if executed else None


def layer_speedup(
    members: Sequence[MemberEntry],
    exits: NDArray[np.intp],
    original: Sequence[MemberEntry] | None = None,
    rows: NDArray[np.intp] | None = None,
) -> float | None:
    """Speed-up ratio by layers (paper, section 4.1): N times the layers of the original, over the layers executed.

    `exits`: the exit of each text, int, shape (texts,). `original`: the members to compare with, None for the last
    member, or for segments their whole model. `rows`: those of each text, (texts,), None for one. None where no layer
    was executed.
    """
    whole = sum(member.layers for member in original or whole_model(members))
    each = np.ones(len(exits), dtype=np.intp) if rows is None else rows
    return ratio(float(each.sum() * whole), float((each * cumulative_layers(members)[exits]).sum()))


def flops_speedup(
    members: Sequence[MemberEntry],
    exits: NDArray[np.intp],
    lengths: NDArray[np.intp],
    original: Sequence[MemberEntry] | None = None,
    *,
    window: int | None = None,
) -> float | None:
    """Speed-up ratio by FLOPs; arguments as for `layer_speedup`, and `lengths` and `window` as for `windows_of`."""
    path = np.cumsum([text_flops(member, lengths, window) for member in members], axis=0)
    executed = path[exits, np.arange(len(exits))].sum()
    whole = sum(float(text_flops(member, lengths, window).sum()) for member in original or whole_model(members))
    return ratio(whole, float(executed))
