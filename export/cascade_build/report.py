"""The result of a build, as data and as one HTML page without outside files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from cascade_train.analysis import draw_reliability, reliability
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.cli.rendering import times
from cascade_rt.engine.exit_rules import MaximumProbability, replay
from cascade_rt.io.writers import open_output
from cascade_rt.tuning.collect import Collected
from cascade_rt.tuning.evaluation import CascadeQuality, MemberQuality, evaluate
from cascade_rt.tuning.plot import draw_front
from cascade_rt.tuning.report import TuningReport
from cascade_rt.tuning.tune import members_alone
from cascade_rt.types import Text

if TYPE_CHECKING:
    from cascade_build.plan import Plan

_WRONG_SHOWN = 20
_OVERCONFIDENT = 0.05  # ECE
_FEW_TEXTS = 500


@dataclass(frozen=True)
class WrongEarly:
    """A text that a small member answered wrongly, and what the biggest one says to it."""

    text: Text
    label: str
    answer: str
    score: float
    member: str
    biggest: str


@dataclass(frozen=True)
class BuiltMember:
    """A member: how it was trained and exported, and its quality on the certification part."""

    quality: MemberQuality
    base: str
    validation: float
    """Best metric on the part that checkpoints are chosen by."""
    precision: str
    temperature: float | None
    ms: float
    """Estimated milliseconds per single text of the certification part."""


@dataclass(frozen=True)
class BuildReport:
    """The result of a build. Qualities are on the certification part, which is used for no choice."""

    task: str
    metric: str
    texts: dict[str, int]
    """Number of texts of each part."""
    members: list[BuiltMember]
    cascade: CascadeQuality
    tuning: TuningReport
    wrong_early: list[WrongEarly]
    """The most confident ones first."""
    early_errors: int
    advice: list[str]
    seconds: dict[str, float]
    """Time of each step."""
    machine: dict[str, Any]
    reliability: dict[str, list[dict[str, Any]]]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        return asdict(self)


def make_report(
    plan: Plan,
    found: TuningReport,
    runtime: CascadeRuntime,
    held_out: Collected,
    *,
    records: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> BuildReport:
    """Measure the chosen point on the certification part, and collect what a reader wants to know.

    `runtime`: with all members; `held_out`: their answers to the certification part; `records`: what training recorded
    of each, by name.
    """
    if found.chosen is None or found.held_out is None:
        raise ValueError("a report needs a chosen point")
    part = plan.parts.certification
    task, known = runtime.task, runtime.bundle.labels
    labels = part.answers(len(known))
    logits, lengths = runtime.member_logits(part.texts)
    members = runtime.bundle.members
    names = [member.name for member in members]
    chosen = [names.index(name) for name in found.chosen.members]
    everything = evaluate(members, MaximumProbability((1.0,) * (len(members) - 1)), logits, labels, lengths, task=task)
    cascade = evaluate(
        [members[index] for index in chosen],
        MaximumProbability(tuple(found.chosen.thresholds)),
        logits[chosen],
        labels,
        lengths,
        members[-1:],
        task=task,
    ).cascade
    probabilities = task.probabilities(logits)
    sure, answers = task.confidence(probabilities), task.answers(probabilities)
    right = np.stack([task.equal(labels, found) for found in answers])
    wrong = _wrong_early(chosen, found.chosen.thresholds, sure, ~right)

    def spelled(answer: Any) -> str:
        has = task.indicators(np.asarray(answer), len(known))
        return ", ".join(name for name, yes in zip(known, has, strict=True) if yes) or "no label"

    report_members = [
        BuiltMember(
            quality,
            Path(str(records[member.name]["base"])).name,
            float(records[member.name]["validation"]["best"]),
            member.precision,
            member.other.get("temperature", {}).get("value"),
            alone.latency_ms,
        )
        for member, quality, alone in zip(
            members, everything.members, members_alone(runtime.bundle, held_out), strict=True
        )
    ]
    report = BuildReport(
        task=plan.parts.data.name,
        metric=plan.parts.data.metric,
        texts={
            "train": len(plan.parts.data.train),
            "validation": len(plan.parts.data.validation),
            "tuning": len(plan.parts.tuning),
            "certification": len(part),
            "unlabelled": len(plan.parts.unlabelled),
        },
        members=report_members,
        cascade=cascade,
        tuning=found,
        wrong_early=[
            WrongEarly(
                part.texts[row],
                spelled(labels[row]),
                spelled(answers[member, row]),
                float(sure[member, row]),
                names[member],
                spelled(answers[-1, row]),
            )
            for member, row in wrong[:_WRONG_SHOWN]
        ],
        early_errors=len(wrong),
        advice=[],  # from the rest, below
        seconds=dict(seconds),
        machine=describe(),
        reliability={name: reliability(sure[index], right[index]) for index, name in enumerate(names)},
    )
    return replace(report, advice=_advice(report, records))


def write_report(report: BuildReport, path: Path) -> None:
    """Write the page, pictures included, atomically."""
    environment = Environment(
        loader=PackageLoader("cascade_build", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with TemporaryDirectory(prefix="cascade-build-") as folder:
        front, calibration = Path(folder) / "front.svg", Path(folder) / "reliability.svg"
        draw_front(report.tuning, front)
        draw_reliability(report.reliability, calibration)
        pictures = {"front": _inline(front), "calibration": _inline(calibration)}
    page = environment.get_template("report.html.j2").render(report=report, pictures=pictures)
    with open_output(path) as stream:
        stream.write(page)


def _inline(svg: Path) -> str:
    """Return a picture without the XML header, which HTML does not take."""
    written = svg.read_text("utf-8")
    return written[written.index("<svg") :]


def _wrong_early(
    chosen: list[int], thresholds: list[float], sure: NDArray[np.float64], wrong: NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Return (member, row) of texts that left before the last chosen member with a wrong answer, surest first.

    `sure` and `wrong`: (members, texts).
    """
    left_at = replay(MaximumProbability(tuple(thresholds)), sure[chosen])
    early = [
        (chosen[place], int(row))
        for row, place in enumerate(left_at)
        if place < len(thresholds) and wrong[chosen[place], row]
    ]
    return sorted(early, key=lambda place: -sure[place])


def _advice(report: BuildReport, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what would improve the result most, from what was measured."""
    chosen, question, found = report.tuning.chosen, report.tuning.question, []
    biggest = report.members[-1]
    for name, record in records.items():
        history = record["validation"]["history"]
        values = [entry[f"eval_{record['metric']}"] for entry in history]
        if len(values) > 2 and values[-1] == max(values) and values[-1] > values[-2]:
            small = "--small-epochs" if record["layers"] != 0 else "--dan-epochs"
            option = "--epochs" if name == biggest.quality.name else small
            found.append(f"{name} was best at its last validation: more epochs ({option}) may help.")
    if chosen is not None and chosen.members == [biggest.quality.name]:
        found.append(
            "No cascade of these members is better. A better small member changes that: give unlabelled texts "
            "(--unlabelled, --augment), or start it from an encoder that cascade-rt distil made from the biggest one."
        )
    elif report.early_errors:
        found.append(
            f"{report.early_errors} of {report.texts['certification']} texts left early with a wrong answer; the most "
            "confident ones are above. Look for wrong labels and for kinds of texts that training lacks."
        )
    if not report.texts["unlabelled"] and len(report.members) > 1:
        found.append(
            "Texts without labels (--unlabelled), for instance from your logs, let small members learn the biggest "
            "one's answers. --augment makes such texts from the training texts."
        )
    if (error := biggest.quality.ece) > _OVERCONFIDENT:
        found.append(
            f"The confidences of {biggest.quality.name} are {100 * error:.1f} points off in the mean (ECE), although "
            "they were scaled: the validation part may be small, or differ from the others."
        )
    if question.confidence is None and question.max_drop is not None:
        found.append("The drop is measured, not guaranteed: add --confidence 0.95 for a guarantee.")
    elif report.tuning.guarantee and (more := report.tuning.guarantee.with_more_texts):
        found.append(
            f"With about {more[-1].texts} texts to certify on (here {report.texts['certification']}), "
            f"{times(more[-1].speedup)} could be guaranteed, if the risk stays as measured."
        )
    if report.texts["certification"] < _FEW_TEXTS:
        found.append(
            f"{report.texts['certification']} texts measure an accuracy to about "
            f"{100 / report.texts['certification'] ** 0.5:.0f} points: figures of more texts would be firmer."
        )
    return found
