"""Which confidence decides best who leaves, where a text has several labels: measured on GoEmotions.

    python benchmarks/several_labels.py --data DATA/goemotions --parts runs/goemotions
    cascade-rt train --train-file runs/goemotions/train.jsonl --validation-file runs/goemotions/validation.jsonl ...
    python benchmarks/several_labels.py --data DATA/goemotions --member DAN=DIR --member 3L=DIR --member 12L=DIR \\
        --cascade 3L+12L --cascade DAN+3L+12L --output report.json

The first call writes the parts: for training, for checkpoints and cuts, for thresholds, and for figures. The last one
exports the members in int8 and compares confidences. At each speed-up, by the time that each member takes for a text
alone, thresholds are those with the best F1 on the part for thresholds. Figures are of dev, which is used for nothing
else. The cascades with the confidence of the runtime are then timed, in turn with the biggest member.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.tasks import Examples, TaskData, hold_out, load_file, write_examples
from common import RESULTS, named_folders, run_command
from numpy.typing import NDArray
from scipy.special import expit, logit

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import batch_by_batch, in_turns
from cascade_rt.engine.exit_rules import MaximumProbability, replay
from cascade_rt.engine.task import MultiLabel
from cascade_rt.errors import InputError
from cascade_rt.io.readers import Reading
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import open_whole
from cascade_rt.tuning.metrics import f1_of_sets

LABELS = Reading(label_column="labels", label_separator=",")
SPEEDUPS = (1.5, 2.0, 3.0, 5.0)
TIMED, TIMED_IN_BULK, ROUNDS = 100, 500, 3
_GRID = 120  # thresholds of one member, 24 of each of two

DISTANCE = "smallest distance to a cut"
"""The confidence of the runtime."""
Confidence = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""A function of logits minus those of the cuts, and of logits, both (..., labels)."""


def _distances(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far each probability is from its cut, 0.5 to 1; with cuts of 0.5, the probability of the decision."""
    distances: NDArray[np.float64] = expit(np.abs(margins))
    return distances


CONFIDENCES: dict[str, Confidence] = {
    "smallest p of a decision": lambda margins, logits: np.where(margins > 0, expit(logits), expit(-logits)).min(
        axis=-1
    ),
    DISTANCE: lambda margins, _: _distances(margins).min(axis=-1),
    "product of distances": lambda margins, _: np.exp(np.log(_distances(margins)).sum(axis=-1)),
    "mean of the two smallest distances": lambda margins, _: np.sort(_distances(margins), -1)[..., :2].mean(axis=-1),
    "largest p": lambda _, logits: expit(logits).max(axis=-1),
    "certainty": lambda _, logits: MultiLabel(()).certainty(expit(logits)),
}


def main() -> None:
    """Write the parts, or export, measure, print and write the report."""
    options = _parser().parse_args()
    data, tuning = _parts(options.data)
    dev = load_file(options.data / "train.tsv", validation=options.data / "dev.tsv", reading=LABELS).validation
    if options.parts:
        options.parts.mkdir(parents=True, exist_ok=True)
        parts = {"train": data.train, "validation": data.validation, "tuning": tuning, "reported": dev}
        for name, part in parts.items():
            write_examples(options.parts / f"{name}.jsonl", part, data.labels)
        print(f"written: {options.parts}")
        return
    members = dict(named_folders("member", options.member))
    if unknown := {name for cascade in options.cascade for name in cascade.split("+")} - members.keys():
        raise InputError(f"found a cascade of {', '.join(sorted(unknown))}, expected names of members")
    bundle: Path = options.work / "bundle"
    if not bundle.exists():
        check = Check(data=options.parts_of / "validation.jsonl" if options.parts_of else None, max_accuracy_drop=2.0)
        export_bundle(list(members.values()), bundle, precision="int8", check=check)
    runtime = open_whole(bundle)
    names = [member.name for member in runtime.bundle.members]
    folders = {Path(folder).resolve().name: name for name, folder in members.items()}
    order = [folders[name] for name in names]
    found = Measured(runtime, order, {name: _cuts(folder) for name, folder in members.items()}, tuning, dev)
    report = {
        "machine": describe(),
        "rows": {"train": len(data.train), "validation": len(data.validation), "tuning": len(tuning), "dev": len(dev)},
        "members": {
            name: json.loads((Path(folder) / RECORD).read_text("utf-8"))["recipe"] for name, folder in members.items()
        },
        "alone": {name: found.alone(name) for name in order},
        "cascades": {cascade: found.cascade(cascade.split("+")) for cascade in options.cascade},
    }
    output: Path = options.output or RESULTS / "several-labels.json"
    write_json(output, report)
    _show(report)
    print(f"written: {output}")


def _parts(folder: Path) -> tuple[TaskData, Examples]:
    """Return the data without the part for thresholds, and that part."""
    data = load_file(folder / "train.tsv", reading=LABELS)
    kept, tuning = hold_out(data.train, 1 / 9, 7)
    return TaskData(data.name, data.labels, False, "f1", kept, data.validation, several=True), tuning


def _cuts(folder: str) -> NDArray[np.float64]:
    return np.array(json.loads((Path(folder) / RECORD).read_text("utf-8"))["cuts"])


class Measured:
    """Members whose answers to the part for thresholds and to dev are known, and the time of each."""

    def __init__(
        self,
        runtime: CascadeRuntime,
        order: list[str],
        cuts: dict[str, NDArray[np.float64]],
        tuning: Examples,
        dev: Examples,
    ) -> None:
        self._runtime, self._order, self._cuts = runtime, order, cuts
        labels = len(runtime.bundle.labels)
        self._truth = {"tuning": tuning.answers(labels), "dev": dev.answers(labels)}
        shift = logit(cuts[order[-1]]) - logit(np.array([cuts[name] for name in order]))  # by the export: see its cuts
        self._logits = {
            name: runtime.member_logits(part.texts)[0].astype(np.float64) - shift[:, None]
            for name, part in (("tuning", tuning), ("dev", dev))
        }
        self._texts = list(dev.texts)
        ways = {name: self._way((name,), ()) for name in order}
        self.seconds = self._timed(ways)

    def alone(self, name: str) -> dict[str, Any]:
        """Return a member's quality at its own cuts, and at those of the biggest."""
        logits = self._logits["dev"][self._order.index(name)]
        return {
            "ms": {kind: 1000 * seconds for kind, seconds in self.seconds[name].items()},
            "own cuts": _quality(self._truth["dev"], expit(logits) > self._cuts[name]),
            "shared cuts": _quality(self._truth["dev"], expit(logits) > self._cuts[self._order[-1]]),
        }

    def cascade(self, members: list[str]) -> dict[str, Any]:
        """Return a cascade's quality under each confidence at each speed-up, and its times under the runtime's own."""
        found: dict[str, Any] = {"confidences": {}}
        for confidence, own in product(CONFIDENCES, (False, True)):
            points = {f"{speedup:g}x": self._at(members, CONFIDENCES[confidence], own, speedup) for speedup in SPEEDUPS}
            found["confidences"][confidence + (", own cuts" if own else ", shared cuts")] = points
        rule = found["confidences"][f"{DISTANCE}, own cuts"]  # the runtime's
        taus = {speedup: points["thresholds"] for speedup, points in rule.items()}
        ways = {speedup: self._way(tuple(members), tau) for speedup, tau in taus.items() if tau}
        timed = self._timed({"alone": self._way((members[-1],), ()), **ways})
        found["on the clock"] = {
            speedup: {kind: timed["alone"][kind] / timed[speedup][kind] for kind in timed[speedup]} for speedup in ways
        }
        return found

    def _at(self, members: list[str], confidence: Confidence, own: bool, speedup: float) -> dict[str, Any]:
        rows = [self._order.index(name) for name in members]
        cuts = np.array([self._cuts[name if own else members[-1]] for name in members])[:, None]
        margins = {part: logits[rows] - logit(cuts) for part, logits in self._logits.items()}
        sure = {part: confidence(margins[part], logits[rows]) for part, logits in self._logits.items()}
        paths = np.cumsum([self.seconds[name]["single"] for name in members])
        whole = self.seconds[members[-1]]["single"]
        grid = _GRID if len(members) == 2 else 24
        quantiles = [np.quantile(scores, np.linspace(0, 1, grid)) for scores in sure["tuning"][:-1]]
        best: tuple[float, tuple[float, ...]] | None = None
        for taus in product(*quantiles):
            exits = replay(MaximumProbability(tuple(map(float, np.clip(taus, 0, 1)))), sure["tuning"])
            if whole < speedup * paths[exits].mean():
                continue
            answers = margins["tuning"][exits, np.arange(len(exits))] > 0
            score = f1_of_sets(self._truth["tuning"], answers)
            if best is None or score > best[0]:
                best = score, tuple(map(float, np.clip(taus, 0, 1)))
        if best is None:
            return {"thresholds": [], "quality": None}
        exits = replay(MaximumProbability(best[1]), sure["dev"])
        answers = margins["dev"][exits, np.arange(len(exits))] > 0
        return {
            "thresholds": list(best[1]),
            "exits": np.bincount(exits, minlength=len(members)).tolist(),
            "speedup": float(whole / paths[exits].mean()),
            "quality": _quality(self._truth["dev"], answers),
        }

    def _way(self, members: tuple[str, ...], taus: Any) -> CascadeRuntime:
        names = [self._runtime.bundle.members[self._order.index(name)].name for name in members]
        runtime = self._runtime.with_members(names)
        return runtime.with_thresholds(list(taus)) if taus else runtime.without_exits()

    def _timed(self, ways: dict[str, CascadeRuntime]) -> dict[str, dict[str, float]]:
        """Return seconds per text of each way, one text a call and in bulk, the median of the rounds."""
        calls = {"single": [[[text]] for text in self._texts[:TIMED]], "bulk": [[self._texts[:TIMED_IN_BULK]]]}
        found: dict[str, dict[str, float]] = {name: {} for name in ways}
        for kind, batches in calls.items():
            texts = TIMED if kind == "single" else TIMED_IN_BULK
            timed = in_turns({name: batch_by_batch(way) for name, way in ways.items()}, batches, ROUNDS)
            for name, one in timed.items():
                found[name][kind] = float(np.median(one.seconds.sum(axis=1))) / texts
        return found


def _quality(truth: NDArray[np.bool_], answers: NDArray[np.bool_]) -> dict[str, float]:
    return {
        "f1": f1_of_sets(truth, answers),
        "f1_micro": f1_of_sets(truth, answers, micro=True),
        "exact": float((truth == answers).all(axis=1).mean()),
    }


def _show(report: dict[str, Any]) -> None:
    for name, figures in report["alone"].items():
        shown = {key: {k: round(100 * v, 2) for k, v in figures[key].items()} for key in ("own cuts", "shared cuts")}
        print(f"{name}: {figures['ms']['single']:.2f} ms alone, {figures['ms']['bulk']:.2f} in bulk, {shown}")
    for cascade, figures in report["cascades"].items():
        print(cascade, {key: {k: round(v, 2) for k, v in one.items()} for key, one in figures["on the clock"].items()})
        for confidence, points in figures["confidences"].items():
            cells = [
                f"{speedup} {100 * point['quality']['f1']:.2f} / {100 * point['quality']['exact']:.2f}"
                for speedup, point in points.items()
                if point["quality"]
            ]
            print(f"  {confidence:50} {'  '.join(cells)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of GoEmotions: train.tsv and dev.tsv")
    add("--parts", type=Path, metavar="DIR", help="write the parts there, and end")
    add("--parts-of", type=Path, metavar="DIR", help="folder of the parts, to check the exported members on")
    add("--member", action="append", default=[], metavar="NAME=DIR", help="a trained member; repeat")
    add("--cascade", action="append", default=[], metavar="NAME+NAME", help="members, the smallest first; repeat")
    add("--work", type=Path, default=Path("runs") / "several-labels", metavar="DIR", help="folder of the bundle")
    add("--output", type=Path, metavar="FILE", help="the report (default: benchmarks/results/several-labels.json)")
    return parser


if __name__ == "__main__":
    run_command(main)
