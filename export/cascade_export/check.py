"""Check a finished member against its original on real texts, before the bundle appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_export.checkpoint import EXPORTERS, TRACE, Checkpoint
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.bundle import MemberEntry
from cascade_rt.engine.backends import usable
from cascade_rt.engine.batching import TOKEN_BUDGET, by_length, micro_batches
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.task import SingleLabel, Task
from cascade_rt.engine.tokenization import Encoded
from cascade_rt.errors import CascadeError, InputError, InvalidOption
from cascade_rt.io.readers import AS_USUAL, Reading, read_examples
from cascade_rt.tuning.evaluation import quality, true_answers
from cascade_rt.types import Text

_ONE_LABEL = SingleLabel()

MAX_ACCURACY_DROP = 0.5
"""Percentage points of accuracy that a precision may cost, by default."""

_KEPT_TEXTS = 1000  # of a member's own validation texts, where no other data are named
_BATCHINGS = 20
_TIMED_TEXTS = 64
_FEWEST_BATCHED = 8

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Check:
    """Settings that make members of torch weights, and those of the check of finished members on texts."""

    data: Path | None = None
    """Texts, with or without labels; None for those that training held out."""
    reading: Reading = AS_USUAL
    """Format and columns of `data`."""
    max_accuracy_drop: float = MAX_ACCURACY_DROP
    """Percentage points that a member may lose."""
    execution: Execution = field(default_factory=Execution)
    """Where finished members are checked and timed."""
    calibrate: bool = False
    """Divide each member's logits by the temperature that fits the texts best; they need labels."""
    choose_cuts: bool = False
    """With several labels per text: take the cuts with the best F1 of the biggest member on the texts, which need
    labels, in place of those that training chose, or of 0.5."""
    vocabulary: Path | None = None
    """Texts of the domain, whose tokens the bundle's vocabulary is trimmed to; None for all tokens."""
    most_cut_differently: float = 0.005
    """Share of held-out texts of the domain that a trimmed vocabulary may give other tokens."""
    exporter: str = TRACE
    """The converter of torch weights to ONNX, one of EXPORTERS."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for an unknown exporter, and for a loss or a share out of range."""
        if self.exporter not in EXPORTERS:
            raise InvalidOption("exporter", self.exporter, f"one of: {', '.join(EXPORTERS)}")
        if not 0 <= self.most_cut_differently <= 1:
            raise InvalidOption("most_cut_differently", self.most_cut_differently, "a share from 0 to 1")
        if not 0 <= self.max_accuracy_drop <= 100:
            raise InvalidOption(
                "max_accuracy_drop", self.max_accuracy_drop, "a number of percentage points from 0 to 100"
            )


USUAL_CHECK = Check()


@dataclass(frozen=True)
class CheckData:
    """Texts to check on; `labels`: right answers as the task gives them, or None where they are not known."""

    texts: list[Text]
    labels: NDArray[Any] | None


def load_check_data(file: Path | None, checkpoint: Checkpoint, reading: Reading = AS_USUAL) -> CheckData | None:
    """Read a labelled or unlabelled file as `reading` says, or else what training held out; None if there is neither.

    A file is labelled if it has the usual column, or where `reading` names one.
    """
    if file:
        examples = list(read_examples(file, reading, pair=checkpoint.pair))
    else:
        examples, reading = checkpoint.validation(_KEPT_TEXTS), AS_USUAL
    if not examples:
        if file:
            raise InputError(f"{file}: found no texts to check on, expected at least one")
        return None
    labels = None
    labelled = sum(reading.has_labels(example, several=checkpoint.task.several) for example in examples)
    if 0 < labelled < len(examples):
        raise InputError(f"{file}: found labels for {labelled} of {len(examples)} texts, expected all or none")
    if labelled or reading.label_column or reading.label_columns:
        labels = true_answers(checkpoint.task, examples, reading, checkpoint.labels, known_by="the member knows")
    return CheckData([example.text for example in examples], labels)


def reference(checkpoint: Checkpoint, path: Path) -> Stage:
    """Return the member in fp32 on the CPU, the reference for every provider and precision."""
    entry = MemberEntry(checkpoint.name, path.name, "", checkpoint.layers, checkpoint.hidden_size, 1, "fp32", None)
    return Stage(entry, path, len(checkpoint.labels), usable(Execution()))


def probabilities(member: Stage, encoded: Encoded, task: Task = _ONE_LABEL) -> Probabilities:
    """Return a member's probabilities as the runtime computes them, float64 (texts, labels)."""
    rows = by_length(encoded.lengths)
    batches = list(micro_batches(rows, encoded.lengths, TOKEN_BUDGET))
    answers = task.probabilities(np.concatenate([member.run(encoded.batch(batch)).logits for batch in batches]))
    return answers[np.argsort(rows)]


def batch_difference(
    member: Stage, encoded: Encoded, answers: Probabilities, task: Task = _ONE_LABEL, seed: int = 0
) -> float | None:
    """Return the largest change of a probability over 20 random batchings of some texts.

    None if there are too few texts, or if all have the same length.
    """
    if len(answers) < _FEWEST_BATCHED or np.ptp(encoded.lengths) == 0:
        return None
    draw = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(_BATCHINGS):
        rows = draw.permutation(len(answers))[:_TIMED_TEXTS]
        for batch in np.array_split(rows, int(draw.integers(1, len(rows) + 1))):
            worst = max(
                worst,
                float(np.abs(task.probabilities(member.run(encoded.batch(batch)).logits) - answers[batch]).max()),
            )
    return worst


def compare(
    original: Probabilities | None, exported: Probabilities, labels: NDArray[Any] | None, task: Task = _ONE_LABEL
) -> dict[str, Any]:
    """Compare two answers to the same texts, float64 (texts, labels); accuracy, DIS and ECE where labels are known.

    Without an original the report has the exported member's own figures only.
    """
    report: dict[str, Any] = {"texts": len(exported)}
    if original is not None:
        difference = np.abs(exported - original)
        report |= {
            "labels_agree": float(task.equal(task.answers(original), task.answers(exported)).mean()),
            "max_probability_difference": float(difference.max()),
            "mean_probability_difference": float(difference.mean()),
        }
    if labels is not None:
        before = {} if original is None else _quality(original, labels, task)
        after = _quality(exported, labels, task)
        report |= {name: {"original": before.get(name), "exported": after[name]} for name in after}
    return report


def _quality(found: Probabilities, labels: NDArray[Any], task: Task) -> dict[str, float | None]:
    figures = quality(task, labels, task.answers(found), task.confidence(found), found.shape[1])
    of_sets = {"f1": figures.f1, "f1_micro": figures.f1_micro} if task.several else {}
    return {"accuracy": figures.accuracy, **of_sets, "dis": figures.dis, "ece": figures.ece}


def check_drop(name: str, precision: str, report: dict[str, Any], allowed: float) -> None:
    """Raise CascadeError, with the numbers, where a precision costs more than `allowed` points of accuracy.

    Without labels every changed answer counts as lost, which is the largest possible drop. If a single text is already
    more than `allowed`, one lost text is accepted, unless nothing at all is allowed.
    """
    if "accuracy" in report:
        before, after = (100 * report["accuracy"][when] for when in ("original", "exported"))
        lost, found = before - after, f"accuracy {before:.2f} -> {after:.2f}"
    else:
        lost, found = 100 * (1 - report["labels_agree"]), "no labels known"
    one_text = 100 / report["texts"] if allowed else 0
    if lost > max(allowed, one_text) + 1e-9:
        raise CascadeError(
            f"member {name!r} in {precision} may lose {lost:.2f} points of accuracy, allowed are {allowed:g} ({found}; "
            f"{100 * report['labels_agree']:.2f}% of labels agree on {report['texts']} texts, probabilities differ by "
            f"up to {report['max_probability_difference']:.3f}, {report['mean_probability_difference']:.4f} in the "
            "mean); choose another precision, or auto, or allow a larger drop"
        )


@dataclass(frozen=True)
class Speed:
    """Wall-clock seconds per text: the median of texts alone, and the mean in micro-batches."""

    alone: float
    in_bulk: float


def speeds(members: Mapping[str, Stage], encoded: Encoded) -> dict[str, Speed]:
    """Measure members against each other: they take turns on every text and micro-batch, after one round to warm up."""
    rows = by_length(encoded.lengths)
    rows = rows[:: -(-len(rows) // _TIMED_TEXTS)]
    contestants = {name: member.run for name, member in members.items()}
    alone, in_bulk = (
        in_turns(contestants, [encoded.batch(batch) for batch in batches], 1)
        for batches in (np.split(rows, len(rows)), micro_batches(rows, encoded.lengths, TOKEN_BUDGET))
    )
    return {
        name: Speed(float(np.median(alone[name].seconds)), float(in_bulk[name].seconds.sum() / len(rows)))
        for name in members
    }
