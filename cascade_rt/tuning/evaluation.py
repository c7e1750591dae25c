"""Measure a cascade on labelled texts: each member alone, and the cascade at its thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..engine.cost import cumulative_layers, flops_speedup, layer_speedup
from ..engine.exit_rules import ExitRule, Thresholds, exits_under
from ..engine.probabilities import confidence, softmax
from ..errors import InputError
from ..io.fields import nearest_label, number, same_label
from .metrics import accuracy, dis, ece, f1


@dataclass(frozen=True)
class Quality:
    """How good some answers are."""

    accuracy: float
    f1: float
    dis: float | None
    """None where no text, or every text, is answered rightly."""
    ece: float


@dataclass(frozen=True)
class MemberQuality(Quality):
    """A member alone."""

    name: str
    layers: int


@dataclass(frozen=True)
class CascadeQuality(Quality):
    """The cascade: its quality, exits and speed-up ratios."""

    thresholds: list[float]
    exits: list[int]
    mean_layers: float
    layer_speedup: float
    flops_speedup: float


@dataclass(frozen=True)
class Evaluation:
    """A cascade measured on labelled texts."""

    texts: int
    f1: str
    """Which F1 is given."""
    members: list[MemberQuality]
    cascade: CascadeQuality

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        return asdict(self)


def label_ids(
    written: Sequence[tuple[str, str]],
    labels: Sequence[str],
    *,
    by_number: bool = True,
    known_by: str = "the bundle knows",
) -> NDArray[np.intp]:
    """Return the class ids, int (texts,), of labels as a file writes them, each with its position ("file:line").

    A label is written by name, or with `by_number` by class id where no label's name is a number. Another spelling of a
    number, and white space around a name, are fine where one label alone is meant. Raises InputError for a label that
    is not among `labels`; `known_by` says in the message what those are.
    """
    ids = {label: index for index, label in enumerate(labels)}
    if by_number and all(number(label) is None for label in labels):
        ids |= {str(index): index for index in range(len(labels))}
    alike: dict[object, set[int]] = {}
    for label, index in ids.items():
        alike.setdefault(same_label(label), set()).add(index)
    for label, where in written:
        if label not in ids:
            found = alike.get(same_label(label), set())
            if len(found) != 1:
                raise InputError(f"{where}: {_unknown(label, labels, known_by)}")
            ids[label] = min(found)
    return np.fromiter((ids[label] for label, _ in written), dtype=np.intp, count=len(written))


def _unknown(label: str, labels: Sequence[str], known_by: str) -> str:
    shown = ", ".join(map(repr, labels[:20])) + (f", ... ({len(labels):,} labels)" if len(labels) > 20 else "")
    near = nearest_label(label, labels)
    hint = "" if near is None else f"; did you mean {near!r}? Correct the spelling in the file"
    return f"found the label {label[:80]!r}, expected one that {known_by}: {shown}{hint}"


def evaluate(
    members: Sequence[MemberEntry],
    rule: ExitRule,
    logits: NDArray[np.float32],
    labels: NDArray[np.intp],
    lengths: NDArray[np.intp],
    original: Sequence[MemberEntry] | None = None,
) -> Evaluation:
    """Measure each member alone, and the cascade under an exit rule, on labelled texts.

    `logits`: float32 (members, texts, labels), and `lengths`: tokens (texts,), both from
    `CascadeRuntime.member_logits`; `labels`: class ids (texts,). Speed-up ratios are over `original`, None for the last
    member (or the whole model of the last segment).
    """
    probabilities = softmax(logits)
    confidences = confidence(probabilities)
    predictions = probabilities.argmax(axis=-1)
    classes = logits.shape[-1]
    exits = exits_under(rule, probabilities)
    rows = np.arange(len(labels))
    alone = [
        MemberQuality(
            **vars(quality(labels, predictions[index], confidences[index], classes)),
            name=member.name,
            layers=member.layers,
        )
        for index, member in enumerate(members)
    ]
    cascade = CascadeQuality(
        **vars(quality(labels, predictions[exits, rows], confidences[exits, rows], classes)),
        thresholds=list(rule.thresholds) if isinstance(rule, Thresholds) else [],
        exits=np.bincount(exits, minlength=len(members)).tolist(),
        mean_layers=float(cumulative_layers(members)[exits].mean()),
        layer_speedup=layer_speedup(members, exits, original),
        flops_speedup=flops_speedup(members, exits, lengths, original),
    )
    return Evaluation(len(labels), "of class 1" if classes == 2 else "mean over the classes", alone, cascade)


def quality(
    labels: NDArray[np.intp], predictions: NDArray[np.intp], confidences: NDArray[np.float64], classes: int
) -> Quality:
    """Return accuracy, F1, DIS and ECE of answers, all arrays of shape (texts,)."""
    correct = labels == predictions
    inversion_score = dis(correct, confidences)
    return Quality(
        accuracy=accuracy(labels, predictions),
        f1=f1(labels, predictions, classes),
        dis=None if np.isnan(inversion_score) else inversion_score,
        ece=ece(correct, confidences),
    )
