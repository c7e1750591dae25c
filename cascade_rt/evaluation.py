"""Measure a cascade on labelled texts: each member alone, and the cascade at its thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MemberEntry
from .cost import cumulative_layers, flops_speedup, layer_speedup
from .errors import InputError
from .gate import confidence, exits, softmax
from .metrics import accuracy, dis, ece, f1


def label_ids(written: Sequence[tuple[str, str]], labels: Sequence[str]) -> NDArray[np.intp]:
    """Class ids, int of shape (texts,), of (label, where it stands) as a file writes them.

    A label stands there by name, or by number where no label's name is a number. Raises InputError for one that the
    bundle does not know.
    """
    ids = {label: index for index, label in enumerate(labels)}
    if not any(label.strip().isdigit() for label in labels):
        ids |= {str(index): index for index in range(len(labels))}
    for label, where in written:
        if label not in ids:
            known = ", ".join(map(repr, labels[:20])) + (", ..." if len(labels) > 20 else "")
            raise InputError(f"{where}: found the label {label!r}, expected one that the bundle knows: {known}")
    return np.fromiter((ids[label] for label, _ in written), dtype=np.intp, count=len(written))


def evaluate(
    members: Sequence[MemberEntry],
    thresholds: Sequence[float],
    logits: NDArray[np.float32],
    labels: NDArray[np.intp],
    lengths: NDArray[np.intp],
    original: MemberEntry | None = None,
) -> dict[str, Any]:
    """Accuracy, F1, DIS and ECE of each member and of the cascade, with exits and speed-up ratios.

    `logits`: float32 (members, texts, labels) and `lengths`: tokens (texts,), both as
    `CascadeRuntime.member_logits` answers; `labels`: class ids (texts,). Speed-ups are over `original`, None for the
    last member. Returns plain numbers for JSON; DIS is None where no text, or every text, is answered rightly.
    """
    probabilities = softmax(logits)
    confidences = confidence(probabilities)
    predictions = probabilities.argmax(axis=-1)
    classes = logits.shape[-1]
    left_at = exits(confidences, thresholds)
    rows = np.arange(len(labels))
    alone = [
        {"name": member.name, "layers": member.layers}
        | quality(labels, predictions[index], confidences[index], classes)
        for index, member in enumerate(members)
    ]
    return {
        "texts": len(labels),
        "f1": "of class 1" if classes == 2 else "mean over the classes",
        "members": alone,
        "cascade": quality(labels, predictions[left_at, rows], confidences[left_at, rows], classes)
        | {
            "thresholds": list(thresholds),
            "exits": np.bincount(left_at, minlength=len(members)).tolist(),
            "mean_layers": float(cumulative_layers(members)[left_at].mean()),
            "layer_speedup": layer_speedup(members, left_at, original),
            "flops_speedup": flops_speedup(members, left_at, lengths, original),
        },
    }


def quality(
    labels: NDArray[np.intp], predictions: NDArray[np.intp], confidences: NDArray[np.float64], classes: int
) -> dict[str, float | None]:
    """Accuracy, F1, DIS (None where it has no meaning) and ECE of answers, all arrays of shape (texts,)."""
    correct = labels == predictions
    inversion_score = dis(correct, confidences)
    return {
        "accuracy": accuracy(labels, predictions),
        "f1": f1(labels, predictions, classes),
        "dis": None if np.isnan(inversion_score) else inversion_score,
        "ece": ece(correct, confidences),
    }
