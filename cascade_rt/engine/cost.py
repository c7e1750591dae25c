"""What a cascade executes, in layers and in FLOPs, and its speed-up ratios over always running the whole big model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..bundle.manifest import TOKENS


def whole_model(members: Sequence[MemberEntry]) -> Sequence[MemberEntry]:
    """Return what a cascade is compared with: its last member, or all segments of the last model."""
    first = max(index for index, member in enumerate(members) if member.reads == TOKENS)
    return members[first:]


def cumulative_layers(members: Sequence[MemberEntry]) -> NDArray[np.int64]:
    """Layers executed by a text that exits at each member: running two members costs both. Shape (members,)."""
    return np.cumsum([member.layers for member in members], dtype=np.int64)


def layer_speedup(
    members: Sequence[MemberEntry], exits: NDArray[np.intp], original: Sequence[MemberEntry] | None = None
) -> float:
    """Speed-up ratio by layers (paper, section 4.1): N times the layers of the original, over the layers executed.

    `exits`: the exit of each text, int, shape (texts,). `original`: the members to compare with, None for the last
    member, or for segments their whole model.
    """
    whole = sum(member.layers for member in original or whole_model(members))
    return float(len(exits) * whole / cumulative_layers(members)[exits].sum())


def member_flops(member: MemberEntry, lengths: NDArray[np.intp]) -> NDArray[np.float64]:
    """FLOPs of the member's encoder for each text, shape (texts,); `lengths`: tokens without padding, (texts,).

    A layer of hidden size h and inner size i does 4 h^2 + 2 h i multiply-adds per token in its projections, and
    2 h per pair of tokens in its attention, at two FLOPs each. For h = 768 and 128 tokens the projections take
    1811.9M (the paper quotes 1809.9M a layer). Embeddings, pooler and classifier are left out, as in the paper; the
    exits of a multi-exit model before its last are counted.
    """
    hidden = float(member.hidden_size)
    inner = float(member.intermediate_size or 4 * hidden)
    tokens = lengths.astype(np.float64)
    flops: NDArray[np.float64] = (
        2 * member.layers * (tokens * (4 * hidden**2 + 2 * hidden * inner) + 2 * hidden * tokens**2)
    )
    return flops + np.polynomial.polynomial.polyval(tokens, member.exit_flops or (0,))


def flops_speedup(
    members: Sequence[MemberEntry],
    exits: NDArray[np.intp],
    lengths: NDArray[np.intp],
    original: Sequence[MemberEntry] | None = None,
) -> float:
    """Speed-up ratio by FLOPs; arguments as for `layer_speedup`, and `lengths`: tokens, int (texts,)."""
    path = np.cumsum([member_flops(member, lengths) for member in members], axis=0)
    executed = path[exits, np.arange(len(exits))].sum()
    whole = sum(member_flops(member, lengths).sum() for member in original or whole_model(members))
    return float(whole / executed)
