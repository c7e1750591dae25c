"""From a question and the collected answers to thresholds in the bundle.

answers -> operating points -> the point that answers the question -> a verdict against each member alone -> the
bundle's manifest.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import MANIFEST, TUNING, Bundle, write_manifest
from ..bundle.files import file_identity
from ..bundle.manifest import TRADE_OFFS
from ..engine.cost import ratio
from ..engine.exit_rules import ExitRule
from ..errors import BundleError, InputError, InvalidOption
from .certify import certify, texts_needed
from .collect import Collected
from .operating_points import OperatingPoint, Recorded, fastest, most_accurate, operating_points, pareto_front
from .report import Choice, Data, Guarantee, MoreTexts, Question, TuningReport, verdict


def tune(bundle: Bundle, data: Collected, question: Question, *, held_out: Collected | None = None) -> TuningReport:
    """Answer a question about a bundle from what its members answered.

    `held_out`: answers to other texts, used for no choice. The chosen point is measured on them, and a guarantee is
    tested on them; without them one half of `data` proposes and the other half certifies. Raises InvalidOption for a
    speed-up or a budget that no point reaches.
    """
    question = replace(question, cost=question.measured_by(bundle.members))
    answers = data.answers[question.cost]
    cost = "cost_p95" if question.p95 else "cost"
    points = operating_points(answers, shared=question.shared, subsets=question.subsets, cost=cost)
    whole = answers.alone(len(bundle.members) - 1)
    guarantee: Guarantee | None = None
    point: OperatingPoint | None = None
    if question.confidence is not None and question.max_drop is not None:
        test = None if held_out is None else held_out.answers[question.cost]
        point, guarantee = _guaranteed(answers, test, question)
    elif question.max_drop is not None:
        point = fastest(points, question.max_drop)
    elif question.speedup is not None:
        if whole.cost / question.speedup < (least := min(point.cost for point in points)):
            highest = f"at most {whole.cost / least:.2f}: the fastest member's"
            raise InvalidOption("speedup", question.speedup, highest)
        point = most_accurate(points, whole.cost / question.speedup)
    elif question.budget_ms is not None:
        point = most_accurate(points, question.budget_ms, p95=question.p95)
        if point is None:
            least = min(point.cost_p95 if question.p95 else point.cost for point in points)
            raise InvalidOption("budget_ms", question.budget_ms, f"at least {least:.3g}: the fastest member's here")
    chosen = None if point is None else choice(bundle, data, point.members, point.rule)
    alone = members_alone(bundle, data)
    confirmed = None if point is None or held_out is None else choice(bundle, held_out, point.members, point.rule)
    judged = (chosen, alone) if confirmed is None or held_out is None else (confirmed, members_alone(bundle, held_out))
    return TuningReport(
        question=question,
        data=Data(len(answers.overhead), data.digest, **({} if data.windows is None else asdict(data.windows))),
        compared_with="labels" if data.labelled else "the last member's answers",
        alone=alone,
        chosen=chosen,
        held_out=confirmed,
        guarantee=guarantee,
        front=[choice(bundle, data, point.members, point.rule) for point in pareto_front(points)],
        verdict=verdict(question, *judged, guarantee),
    )


def choice(bundle: Bundle, data: Collected, members: tuple[int, ...], rule: ExitRule) -> Choice:
    """Return what one way to run the bundle does on the data: quality, exits, and speed-ups over its last member.

    `members`: those that may answer. A choice lists those that run: a segment that no text leaves has the threshold 1.
    """
    latency = data.answers["latency"]
    whole, point = latency.alone(len(bundle.members) - 1), latency.measure(members, rule)
    place = latency.exits(members, rule)
    rows = np.arange(len(place))
    lost = latency.right[-1].astype(int) - latency.right[list(members)][place, rows]
    speedups: dict[str, Any] = {}
    for kind, answers in data.answers.items():
        executed, (alone,) = answers.paths(members), answers.paths([len(bundle.members) - 1])
        speedups[f"{kind}_speedup"] = ratio(float(alone.sum()), float(executed[place, rows].sum()))
    chains = bundle.chains
    running = sorted({index for member in members for index in range(chains[member], member + 1)})
    taus: tuple[float, ...] = ()
    if len(members) == 1:
        rule = rule.without_exits(len(running))
        taus = rule.thresholds
    elif rule.thresholds:
        own = dict(zip(members, rule.thresholds, strict=False))
        taus = tuple(own.get(index, 1.0) for index in running[:-1])
    counts = dict(zip(members, np.bincount(place, minlength=len(members)).tolist(), strict=True))
    return Choice(
        members=[bundle.members[index].name for index in running],
        thresholds=list(taus),
        accuracy=point.accuracy,
        drop=whole.accuracy - point.accuracy,
        drop_error=float(np.std(lost) / math.sqrt(len(lost))),
        estimated_drop=point.estimated_drop,
        risk=point.risk,
        exits=[counts.get(index, 0) for index in running],
        **speedups,
        latency_ms=point.cost,
        latency_p95_ms=point.cost_p95,
        exit_rule={"kind": rule.kind, **rule.settings},
    )


def members_alone(bundle: Bundle, data: Collected) -> list[Choice]:
    """Return what each member does alone on the data."""
    rule = data.answers["latency"].rule.without_exits(1)
    return [choice(bundle, data, (place,), rule) for place in range(len(bundle.members))]


def write_tuning(folder: Path, bundle: Bundle, report: TuningReport) -> None:
    """Write the chosen members and thresholds, and what is expected of them, into the bundle, atomically.

    Members that are left out get threshold 1, which no text exceeds; a chosen last one that is not the bundle's gets
    threshold 0, which every text does. So a runtime that runs all members gives the same answers. Raises BundleError if
    the bundle was replaced since it was read.
    """
    if report.chosen is None:
        raise InputError("found a report without a chosen point, expected one to write")
    if file_identity(folder / MANIFEST) != bundle.identity:
        raise BundleError(f"{folder}: replaced while it was tuned; tune it again")
    if report.chosen.exit_rule["kind"] != bundle.exit_rule["kind"]:
        expected = f"{bundle.exit_rule['kind']}, the bundle's"
        raise InputError(f"found a report on the exit rule {report.chosen.exit_rule['kind']}, expected {expected}")
    members, rule = bundle.members, {**bundle.exit_rule, **report.chosen.exit_rule}
    if bundle.thresholds:
        taus = dict(zip(report.chosen.members, [*report.chosen.thresholds, 0.0], strict=True))
        *others, last = members
        members = (*(replace(member, threshold=taus.get(member.name, 1.0)) for member in others), last)
    written = report.to_json()
    tuning: dict[str, Any] = asdict(report.chosen) | {"last_alone": {"accuracy": report.alone[-1].accuracy}}
    tuning |= {key: written[key] for key in ("question", "data", "compared_with", "guarantee", "verdict")}
    tuning[TRADE_OFFS] = [
        {key: getattr(point, key) for key in ("members", "accuracy", "estimated_drop", "latency_speedup")}
        for point in (*report.trade_offs(), *report.alone)
    ]
    write_manifest(folder, replace(bundle, members=members, exit_rule=rule, other={**bundle.other, TUNING: tuning}))


def local_folder(model_dir: str) -> Path:
    """Return the folder of a local bundle that can be written; raise BundleError for any other."""
    folder = Path(model_dir)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{model_dir}: not a local bundle; tune a copy, or make it a dry run")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BundleError(f"{model_dir}: the folder cannot be written; tune a copy, or make it a dry run")
    return folder


def _guaranteed(search: Recorded, test: Recorded | None, question: Question) -> tuple[OperatingPoint | None, Guarantee]:
    """Certify on other texts what some propose; without other texts, on one half what the other half proposes."""
    confidence, max_risk = question.confidence or 0.0, question.max_drop or 0.0
    halves = 1 if test is not None else 2
    if test is None:
        rows = np.random.default_rng(question.seed).permutation(len(search.overhead))
        half = len(rows) // 2
        search, test = search.take(rows[:half]), search.take(rows[half:])
    chosen, certificate, sequence = certify(
        search, test, max_risk, confidence, shared=question.shared, subsets=question.subsets
    )
    last = test.alone(len(test.right) - 1)
    promising = []
    for point in sequence:
        seen = test.measure(point.members, point.rule)  # points look better on the half that proposed them
        needed = texts_needed(seen.risk, max_risk, confidence)
        if needed is not None and needed > certificate.texts and (chosen is None or seen.cost < chosen.cost):
            promising.append(MoreTexts(ratio(last.cost, seen.cost), seen.risk, halves * needed))
    some = promising[:: max(1, len(promising) // 4)]
    return chosen, Guarantee(**vars(certificate), searched_on=len(search.overhead), with_more_texts=some)
