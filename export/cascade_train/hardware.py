"""Number formats that this machine computes fast: measured, because the name of an instruction set does not tell it."""

from __future__ import annotations

from time import perf_counter

import torch

_SHAPE = (512, 768, 768)  # a layer of a BERT-base on a batch of short texts
_ROUNDS = 20
_LONGEST = 0.5  # seconds, after which one round after the warm-up is enough
_LEAST_GAIN = 1.3  # of the products alone; a whole training step gains less


def bf16_pays() -> bool:
    """Return whether to train in bfloat16 here.

    On a GPU, whether it has bfloat16. On a CPU, a few matrix products are timed in bfloat16 and in float32 (about
    0.3 s in all, 1 s where it is emulated): CPUs with AMX or AVX512-BF16 are faster in bfloat16, others emulate it and
    are several times slower.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    seconds = _product_times(torch.float32, torch.bfloat16)
    return seconds[torch.float32] >= _LEAST_GAIN * seconds[torch.bfloat16]


def _product_times(*kinds: torch.dtype) -> dict[torch.dtype, float]:
    """Return the seconds of one matrix product in each type: the fastest of some, taken in turn, after a warm-up."""
    rows, inner, columns = _SHAPE
    matrices = {kind: (torch.ones(rows, inner, dtype=kind), torch.ones(inner, columns, dtype=kind)) for kind in kinds}
    times: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    began = perf_counter()
    for done in range(_ROUNDS + 1):
        if done > 1 and perf_counter() - began > _LONGEST:
            break
        for kind, (left, right) in matrices.items():
            start = perf_counter()
            torch.mm(left, right)
            times[kind].append(perf_counter() - start)
    return {kind: min(found[1:]) for kind, found in times.items()}
