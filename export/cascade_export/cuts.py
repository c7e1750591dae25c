"""Cuts of several labels: a bundle has those of its biggest member, and the others' logits are shifted to them.

The best cuts of members differ: a small one is less sure of rare labels. The logits of a label are shifted by the
difference between the logits of the two cuts, in the bias of the last layer, so that the member decides as at its own
cuts, and its distances from them, which the exit rule compares with thresholds, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cascade_export.check import Check, Probabilities, load_check_data
from cascade_export.checkpoint import Checkpoint
from cascade_export.onnx_checkpoint import OnnxCheckpoint
from cascade_rt.engine.task import MultiLabel
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.tuning.cuts import best_cuts
from cascade_rt.types import Text

if TYPE_CHECKING:
    from cascade_export.torch_checkpoint import TorchCheckpoint


def with_chosen_cuts(checkpoint: Checkpoint, tokenizer: TextTokenizer, check: Check) -> Checkpoint:
    """Return a checkpoint with the cuts that have the best F1 on the check data.

    `tokenizer`: the bundle's. Raises InvalidOption for one label per text, and InputError without labelled texts.
    """
    if not checkpoint.task.several:
        raise InvalidOption("choose_cuts", True, "False with one label per text, which has no cuts")
    data = load_check_data(check.data, checkpoint, check.reading)
    if data is None or data.labels is None:
        raise InputError(f"member {checkpoint.name!r}: found no labelled texts to choose cuts on; give check data")
    found = _probabilities(checkpoint, data.texts, tokenizer)
    if found is None:
        raise InputError(f"member {checkpoint.name!r}: found no fp32 file to choose cuts by; add it to the folder")
    return replace(checkpoint, task=MultiLabel(best_cuts(found, data.labels)))


def with_shared_cuts(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], dict[str, tuple[float, ...]]]:
    """Return checkpoints with the cuts of the last one, and the cuts that others had, by the member's name.

    Those with torch weights are changed; ONNX files keep their logits, so they are read at other cuts than their own.
    """
    task, own = checkpoints[-1].task, {}
    for one in checkpoints:
        if not isinstance(task, MultiLabel) or not isinstance(one.task, MultiLabel) or one.task == task:
            continue
        if not isinstance(one, OnnxCheckpoint):
            _of_torch(one).shift_logits(_logit(task.cuts) - _logit(one.task.cuts))
            own[one.name] = one.task.cuts
    return [replace(one, task=task) for one in checkpoints], own


def _logit(cuts: Sequence[float]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.log(cuts) - np.log1p(-np.array(cuts))
    return found


def _probabilities(checkpoint: Checkpoint, texts: Sequence[Text], tokenizer: TextTokenizer) -> Probabilities | None:
    if isinstance(checkpoint, OnnxCheckpoint):
        return checkpoint.original(texts, tokenizer)
    from cascade_export.verify import torch_probabilities  # noqa: PLC0415 - loads torch

    member = _of_torch(checkpoint)
    return torch_probabilities(member.original or member, texts)


def _of_torch(checkpoint: Checkpoint) -> TorchCheckpoint:
    from cascade_export.torch_checkpoint import TorchCheckpoint  # noqa: PLC0415 - loads torch, ONNX files need none

    if not isinstance(checkpoint, TorchCheckpoint):
        raise TypeError(f"found {type(checkpoint).__name__}, expected a TorchCheckpoint")
    return checkpoint
