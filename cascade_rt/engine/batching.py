"""Micro-batches: texts of similar length together, so that little is computed on padding."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray

TOKEN_BUDGET = 512
"""Padded tokens per micro-batch.

Found by measurement on SST-2's dev sentences (2 threads, AVX-512): of 128 to 4096, 512 was the fastest for members of
hidden size 384 and within 4% of the fastest, 256, for 768; 1024 lost 3-16%, 4096 23-55%, to caches and padding.
"""

_WORTH_FLOPS, _MOST_TOKENS = 5_000_000, 4096
"""FLOPs that a micro-batch should have, and tokens up to which it grows to have them: members without layers need it.

An averaging network of 128 columns took 7.1 microseconds a text (of 14 tokens) with 512 tokens, 4.6 with 4096, 4.5 with
8192 and 5.2 with 16,384. Transformers have enough with 512: a layer of 128 has 400,000 FLOPs a token.
"""

DEVICE_TOKEN_BUDGET = 16_384
"""Padded tokens per micro-batch on devices other than the CPU, which need bigger batches; not measured."""

# Texts shorter than this share of the longest go into another micro-batch, if the batch is worth a call by then.
# Against cutting by the budget alone: 15-17% faster for a few dozen survivors of mixed lengths, 3-6% for hundreds.
_ALIKE = 0.9
_WORTH_A_CALL = 1 / 4  # of the budget
_WORTH_A_THREAD = 1 / 2  # of the budget; with smaller micro-batches, one per thread was no faster in fp32
_WORTH_A_THREAD_IN_INT8 = 1_000_000_000
"""FLOPs of a micro-batch in int8 that is worth a thread of its own: ONNX Runtime parallelizes small products poorly.

On 2 cores with VNNI, two threads with a half of 56 to 224 tokens each were 1.17 to 1.24 times as fast as both together
on the whole with 12 layers of 384, and 1.04 to 1.08 times with 12 of 768; with less work, as of 2 layers, slower.
"""
_EVEN = 1.1  # longest time of a thread over the mean; two threads on the same micro-batch lose about as much


def token_budget(usual: int, flops: float) -> int:
    """Return the padded tokens per micro-batch of a member that needs so many FLOPs for a token.

    `usual`: those of the backend, for members that have enough to do with them.
    """
    return max(usual, int(min(_MOST_TOKENS, _WORTH_FLOPS / max(1.0, flops))))


def worth_a_thread(budget: int, flops: float, precision: str) -> int:
    """Return the padded tokens that a micro-batch needs to be worth a thread of its own.

    `budget`: of the member, and `flops`: what it needs for a token.
    """
    usual = int(_WORTH_A_THREAD * budget)
    return min(usual, int(_WORTH_A_THREAD_IN_INT8 / max(1.0, flops))) if precision == "int8" else usual


def by_length(lengths: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the rows from the longest to the shortest text, shape (texts,); equal lengths keep input order."""
    return np.argsort(-lengths, kind="stable")


def micro_batches(rows: NDArray[np.intp], lengths: NDArray[np.intp], budget: int) -> Iterator[NDArray[np.intp]]:
    """Cut `rows`, ordered by `by_length`, into runs of at most `budget` padded tokens, at least one row each.

    A run ends early where the texts become clearly shorter than its longest, once it is worth a call. Texts that remain
    after an exit are still in order, so calling this again regroups them.
    """
    ordered = lengths[rows]
    start = 0
    while start < len(rows):
        longest = max(1, int(ordered[start]))
        full = ordered[start : start + max(1, budget // longest)]
        alike = int(np.searchsorted(-full, -_ALIKE * longest, side="right"))
        end = start + min(len(full), max(alike, -int(-_WORTH_A_CALL * budget // longest)))
        yield rows[start:end]
        start = end


def bulk_batches(
    rows: NDArray[np.intp], lengths: NDArray[np.intp], budget: int, threads: int, least: int
) -> tuple[list[NDArray[np.intp]], bool]:
    """Cut `rows` as `micro_batches` does, and say whether each thread should run a micro-batch of its own.

    It should where that keeps all threads busy for about the same time; for that, few texts are cut smaller, down to
    `least` padded tokens.
    """
    if threads > 1 and len(rows):
        share = -int(-lengths[rows].sum() // threads)
        smaller = list(micro_batches(rows, lengths, min(budget, max(1, share, least))))
        busy = [0] * threads
        for some in smaller:  # each goes to the thread that is free first
            heapreplace(busy, busy[0] + len(some) * max(1, int(lengths[some[0]])))
        if max(busy) <= _EVEN * sum(busy) / threads:
            return smaller, True
    return list(micro_batches(rows, lengths, budget)), False
