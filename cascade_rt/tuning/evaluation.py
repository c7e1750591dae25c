"""Measure a cascade on labelled texts: each member alone, and the cascade at its thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import MemberEntry
from ..engine.cost import cumulative_layers, flops_speedup, layer_speedup, windows_of
from ..engine.exit_rules import ExitRule, replay
from ..engine.task import SingleLabel, Task
from ..errors import InputError
from ..io.fields import nearest_label, number, same_label
from ..io.readers import Example, Reading
from .metrics import dis, ece, f1, f1_of_sets

_ONE_LABEL = SingleLabel()


@dataclass(frozen=True)
class Quality:
    """The quality of some answers."""

    accuracy: float
    f1: float
    dis: float | None
    """None where no text, or every text, is answered rightly."""
    ece: float
    f1_micro: float | None
    """Over all labels together, with several labels per text; else None, as it is the accuracy."""


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
    layer_speedup: float | None
    """None where no layer was executed."""
    flops_speedup: float | None


@dataclass(frozen=True)
class LabelQuality:
    """One label: the texts that have it, and how well the cascade, and each member alone, finds them."""

    label: str
    texts: int
    precision: float
    """0 where the cascade gives the label to no text."""
    recall: float
    """0 where no text has the label."""
    f1: float
    members: list[float]
    """F1 of each member alone."""


@dataclass(frozen=True)
class Evaluation:
    """A cascade measured on labelled texts."""

    texts: int
    f1: str
    """The F1 that is given."""
    members: list[MemberQuality]
    cascade: CascadeQuality
    by_label: list[LabelQuality] | None = None
    """None unless it was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values for JSON; `f1_micro` only with several labels per text."""
        report = asdict(self)
        if self.by_label is None:
            del report["by_label"]
        for found in (*report["members"], report["cascade"]):
            if found["f1_micro"] is None:
                del found["f1_micro"]
        return report


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


def true_answers(
    task: Task, rows: Sequence[Example], how: Reading, labels: Sequence[str], *, known_by: str = "the bundle knows"
) -> NDArray[Any]:
    """Return the right answers as the task gives them, from rows of a file: int (texts,) or bool (texts, labels).

    `known_by` says in a message what `labels` are. Raises InputError for a row without a label, where there has to be
    one, and for a label that is not among them.
    """
    if not task.several:
        return label_ids([(how.label_of(row), row.where) for row in rows], labels, known_by=known_by)
    found = [how.labels_of(row) for row in rows]
    written = [(name, row.where) for row, names in zip(rows, found, strict=True) for name in names]
    ids = label_ids(written, labels, known_by=known_by)
    answers = np.zeros((len(rows), len(labels)), dtype=bool)
    answers[np.repeat(np.arange(len(rows)), list(map(len, found))), ids] = True
    return answers


def evaluate(
    members: Sequence[MemberEntry],
    rule: ExitRule,
    logits: NDArray[np.float32],
    labels: NDArray[Any],
    lengths: NDArray[np.intp],
    original: Sequence[MemberEntry] | None = None,
    *,
    task: Task = _ONE_LABEL,
    window: int | None = None,
) -> Evaluation:
    """Measure each member alone, and the cascade under an exit rule, on labelled texts.

    `logits`: float32 (members, texts, labels), and `lengths`: tokens (texts,), both from
    `CascadeRuntime.member_logits`; `labels`: right answers as the task gives them, for instance by `true_answers`.
    Speed-up ratios are over `original`, None for the last member (or the whole model of the last segment). `window`:
    with a stride, the bundle's maximum length, from which the windows of each text follow.
    """
    texts_rows = windows_of(lengths, window)
    probabilities = task.probabilities(logits)
    confidences = task.confidence(probabilities)
    answers = task.answers(probabilities)
    classes = logits.shape[-1]
    exits = replay(rule, rule.observed(task, probabilities))
    rows = np.arange(len(labels))
    alone = [
        MemberQuality(
            **vars(quality(task, labels, answers[index], confidences[index], classes)),
            name=member.name,
            layers=member.layers,
        )
        for index, member in enumerate(members)
    ]
    cascade = CascadeQuality(
        **vars(quality(task, labels, answers[exits, rows], confidences[exits, rows], classes)),
        thresholds=list(rule.thresholds),
        exits=np.bincount(exits, minlength=len(members)).tolist(),
        mean_layers=float((texts_rows * cumulative_layers(members)[exits]).mean()),
        layer_speedup=layer_speedup(members, exits, original, texts_rows),
        flops_speedup=flops_speedup(members, exits, lengths, original, window=window),
    )
    only_one = classes == 2 and not task.several
    return Evaluation(len(labels), "of class 1" if only_one else "mean over the classes", alone, cascade)


def quality_by_label(
    rule: ExitRule,
    logits: NDArray[np.float32],
    labels: NDArray[Any],
    names: Sequence[str],
    *,
    task: Task = _ONE_LABEL,
) -> list[LabelQuality]:
    """Measure how well each label is found; `names`: of the labels, other arguments as for `evaluate`."""
    probabilities = task.probabilities(logits)
    answers = task.answers(probabilities)
    cascade = answers[replay(rule, rule.observed(task, probabilities)), np.arange(len(labels))]
    truth = task.indicators(labels, len(names))
    found = np.array([task.indicators(some, len(names)) for some in [*answers, cascade]])
    hits, given, texts = (truth & found).sum(axis=1), found.sum(axis=1), truth.sum(axis=0)
    scores = 2 * hits / np.maximum(given + texts, 1)
    precision, recall = hits[-1] / np.maximum(given[-1], 1), hits[-1] / np.maximum(texts, 1)
    return [
        LabelQuality(name, *figures)
        for name, *figures in zip(
            names, texts.tolist(), precision.tolist(), recall.tolist(), scores[-1].tolist(), scores[:-1].T.tolist(),
            strict=True,
        )
    ]  # fmt: skip


def quality(
    task: Task, labels: NDArray[Any], answers: NDArray[Any], confidences: NDArray[np.float64], classes: int
) -> Quality:
    """Return accuracy, F1, DIS and ECE of answers, against right ones; `confidences`: (texts,)."""
    correct = task.equal(labels, answers)
    inversion_score = dis(correct, confidences)
    return Quality(
        accuracy=float(np.mean(correct)),
        f1=f1_of_sets(labels, answers) if task.several else f1(labels, answers, classes),
        dis=None if np.isnan(inversion_score) else inversion_score,
        ece=ece(correct, confidences),
        f1_micro=f1_of_sets(labels, answers, micro=True) if task.several else None,
    )
