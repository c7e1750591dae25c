"""Compare the exported graph with the torch checkpoint on real texts, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cascade_train.inference import text_logits
from numpy.typing import NDArray

from cascade_export.checkpoint import SENTENCES
from cascade_export.torch_checkpoint import TorchCheckpoint
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import CascadeError
from cascade_rt.types import Text

TOLERANCE = 1e-4
"""Largest allowed |difference of a class probability| between torch and the exported fp32 graph."""

_OWN_TEXTS = 48
_SHORT = ("No", "Go on", "")  # pairs of them end well before any maximum, so that some are padded


def check_texts(checkpoint: TorchCheckpoint) -> list[Text]:
    """Return texts from empty to far beyond any maximum length, and some of the member's validation texts."""
    singles = [*SENTENCES, " ".join(SENTENCES), " ".join(SENTENCES * 12)]
    shorts = [(one, other) for one in _SHORT for other in _SHORT]
    texts: list[Text] = [*shorts, *zip(singles, reversed(singles), strict=True)] if checkpoint.pair else list(singles)
    return texts + [example.text for example in checkpoint.validation(_OWN_TEXTS)]


def verify(checkpoint: TorchCheckpoint, member: Stage, tokenizer: TextTokenizer, texts: Sequence[Text]) -> float:
    """Compare probabilities of torch and of the exported member; return the largest difference.

    Each text runs alone, then in batches, so with and without padding. Both sides tokenize by themselves, so a wrong
    `tokenizer.json` is found too. Raises CascadeError, which names the text, if the difference exceeds TOLERANCE.
    """
    encoded = tokenizer.encode(texts)
    alone = [np.array([row]) for row in range(len(texts))]
    batches = [np.arange(start, min(start + 4, len(texts))) for start in range(0, len(texts), 4)]
    worst = 0.0
    for rows in [*alone, *batches]:
        exported = checkpoint.task.probabilities(member.run(encoded.batch(rows)).logits)
        original = torch_probabilities(checkpoint, [texts[row] for row in rows])
        difference = np.abs(exported - original).max(axis=1)
        at = int(difference.argmax())
        if not difference[at] <= TOLERANCE:
            raise CascadeError(
                f"member {checkpoint.name!r}: the exported graph differs from torch, probabilities by "
                f"{difference[at]:.2e} (allowed {TOLERANCE:.0e}) for check text {rows[at]}, "
                f"{encoded.lengths[rows[at]]} tokens in a batch of {len(rows)}; this model cannot be exported"
            )
        worst = max(worst, float(difference[at]))
    return worst


def torch_probabilities(checkpoint: TorchCheckpoint, texts: Sequence[Text]) -> NDArray[np.float64]:
    """Return the original's answers, float64 (texts, labels), from its own tokenizer and torch."""
    logits = text_logits(checkpoint.tokenizer, checkpoint.model, texts, checkpoint.max_length)
    return checkpoint.task.probabilities(logits)
