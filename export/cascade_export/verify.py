"""The exported graph answers, not the checkpoint: compare the two on real texts before anything is written."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from cascade_train.finetune import VALIDATION

from cascade_export.checkpoint import Checkpoint
from cascade_rt.errors import CascadeError
from cascade_rt.gate import softmax
from cascade_rt.member import Member
from cascade_rt.records import Text, read_examples
from cascade_rt.tokenization import TextTokenizer

TOLERANCE = 1e-4
"""Largest allowed |difference of a class probability| between torch and the exported fp32 graph."""

_OWN_TEXTS = 48

SENTENCES = (
    "Fine.",
    "The kettle is on and nobody is home 🙂",
    "What a curious little machine this has turned out to be!",
    "Please move my Thursday appointment to the week after next, if that suits the doctor.",
    "She read the letter twice, folded it along the old creases, and put it back where nobody would ever look for it.",
    "Der Zug nach Zürich fährt um 8:05 Uhr; le café coûte 3,20 €.",
    "",
    "Although the forecast had promised sunshine, the hikers reached the hut soaked to the skin, laughed about it over "
    "a bowl of soup, and agreed that they would not have missed the walk along the ridge for anything in the world.",
)
"""Written for the check; together with their own repetition they span every length up to a model's maximum."""


def check_texts(checkpoint: Checkpoint) -> list[Text]:
    """Return texts from empty to far beyond any maximum length, and texts of the member's own task if it kept some."""
    singles = [*SENTENCES, " ".join(SENTENCES), " ".join(SENTENCES * 12)]
    texts: list[Text] = list(zip(singles, reversed(singles), strict=True)) if checkpoint.pair else list(singles)
    kept = Path(checkpoint.source) / VALIDATION
    if kept.is_file():
        texts += [example.text for example in islice(read_examples(kept, pair=checkpoint.pair), _OWN_TEXTS)]
    return texts


def verify(checkpoint: Checkpoint, member: Member, tokenizer: TextTokenizer, texts: Sequence[Text]) -> float:
    """Compare probabilities of torch and of the exported member; return the largest difference.

    Each text runs alone, then in batches of neighbours, so with and without padding. Both sides tokenize for
    themselves, so a wrong `tokenizer.json` shows too. Raises CascadeError beyond TOLERANCE, and says where.
    """
    encoded = tokenizer.encode(texts)
    alone = [np.array([row]) for row in range(len(texts))]
    batches = [np.arange(start, min(start + 4, len(texts))) for start in range(0, len(texts), 4)]
    worst = 0.0
    for rows in [*alone, *batches]:
        exported = softmax(member.run(encoded.batch(rows)))
        original = softmax(_torch_logits(checkpoint, [texts[row] for row in rows], tokenizer.max_length))
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


def _torch_logits(checkpoint: Checkpoint, texts: Sequence[Text], max_length: int) -> np.ndarray:
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    batch = checkpoint.tokenizer(
        first, second, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    taken = inspect.signature(checkpoint.model.forward).parameters  # DistilBERT, for one, takes no token types
    with torch.inference_mode():
        output = checkpoint.model(**{name: array for name, array in batch.items() if name in taken})
    logits: np.ndarray = output.logits.float().numpy()
    return logits
