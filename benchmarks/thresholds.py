"""The promises of `cascade-rt tune`, and what comes of them on texts that it never saw.

    python benchmarks/thresholds.py --task sst-2 --data DATA/sst2 --model-dir runs/results/sst-2/bundle-fp32

Takes a bundle that results.py left, and for several random halves of the reported texts tunes on one half, freely, with
a guarantee, with all members kept, at one tau or one each, and by labels alone, as if the last member's probabilities
were not known. The other half measures the drop of accuracy and the speed-up. Without a guarantee, all that training
held out helps to tune; a guarantee takes the untouched half alone. With --held-out the halves are of what training held
out, and no reported text is used. Choices of the first split are also timed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cascade_train.tasks import Examples
from common import RESULTS, TASKS, joined, race, read_parts, run_command
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import Bundle
from cascade_rt.engine.exit_rules import MaximumProbability
from cascade_rt.io.caches import cache_folder
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import Collected, collect, open_whole
from cascade_rt.tuning.plot import draw_front
from cascade_rt.tuning.report import COSTS, Question
from cascade_rt.tuning.tune import tune
from cascade_rt.types import Text

DROPS = (0.0, 0.005, 0.01)
CONFIDENCE = 0.95


def main() -> None:
    """Tune, measure and time; print and write the report."""
    options = _parser().parse_args()
    parts = read_parts(options.task, options.data)
    reported = parts.reported
    held_out = joined(joined(parts.data.validation, parts.tuning), parts.certification or Examples([], []))
    runtime = open_whole(options.model_dir, threads=options.threads, preload=True)
    if options.held_out:
        held_out, reported = Examples([], []), held_out
    texts, labels = (list(values) for values in vars(joined(held_out, reported)).values())
    seen = collect(runtime, texts, np.array(labels, dtype=np.intp), cache=cache_folder())
    held = len(held_out)
    report: dict[str, Any] = {
        "machine": describe(),
        "task": options.task,
        "rows": {"held out of training": held, "reported": len(reported)},
        "reported_on": "held out of training" if options.held_out else parts.reported_on,
        "splits": options.splits,
        "threads": options.threads,
        "confidence": CONFIDENCE,
        "members": [
            {"name": member.name, "layers": member.layers, "accuracy": float(right[held:].mean())}
            for member, right in zip(runtime.bundle.members, seen.answers["layers"].right, strict=True)
        ],
        "questions": [],
    }
    halves = []
    for split in range(options.splits):
        rows = held + np.random.default_rng(split).permutation(len(reported))
        halves.append((np.append(np.arange(held), rows[: len(rows) // 2]), rows[len(rows) // 2 :]))
    choices: list[tuple[tuple[str, ...], tuple[float, ...]]] = []
    by_labels = replace(seen, answers={kind: replace(one, expected=None) for kind, one in seen.answers.items()})
    free = [Question(max_drop=drop, cost=options.cost) for drop in DROPS]
    asks = [(seen, question) for question in _questions(options.cost)] + [(by_labels, question) for question in free]
    for known, question in asks:
        splits = [
            _tuned(runtime.bundle, known, question, tuned_on[held if question.confidence else 0 :], test)
            for tuned_on, test in halves
        ]
        asked = {key: getattr(question, key) for key in ("max_drop", "confidence", "subsets", "shared")}
        asked["by_labels_alone"] = known is by_labels
        report["questions"].append(asked | _summary(splits, question) | {"splits": splits})
        choices.append((tuple(splits[0]["members"]), tuple(splits[0]["thresholds"])))
    front = tune(runtime.bundle, seen.take(halves[0][0]), Question(cost=options.cost))
    report["tuned_on"], report["tested_on"] = (len(half) for half in halves[0])
    report["timed"] = []
    if options.timed:
        others = [texts[row] for row in halves[0][1]]
        report["timed"] = _timed(options.model_dir, runtime.bundle.members[-1].name, choices, others, options)
    output: Path = options.output or RESULTS / f"thresholds-{options.task}.json"
    write_json(output, report)
    draw_front(front, output.with_suffix(".png"))
    _show(report)


def _questions(cost: str) -> list[Question]:
    """Return the free choice, that with a guarantee, and, all members kept, one tau for each or one for all."""
    kinds: list[dict[str, Any]] = [
        {},
        {"confidence": CONFIDENCE},
        {"subsets": False},
        {"subsets": False, "shared": True},
    ]
    return [Question(max_drop=drop, cost=cost, **kind) for kind in kinds for drop in DROPS]


def _tuned(
    bundle: Bundle, seen: Collected, question: Question, tuned_on: NDArray[np.intp], test: NDArray[np.intp]
) -> dict[str, Any]:
    """Tune on some texts, measure on others; without a certificate, the last member alone runs."""
    report = tune(bundle, seen.take(tuned_on), question)
    chosen = report.chosen or report.alone[-1]
    names = [member.name for member in bundle.members]
    members = tuple(names.index(name) for name in chosen.members)
    rule = MaximumProbability(tuple(chosen.thresholds))
    other = seen.take(test)
    kinds = [kind for kind in COSTS if kind != "layers" or all(member.layers for member in bundle.members)]
    found = {kind: other.answers[kind].measure(members, rule) for kind in kinds}
    whole = {kind: other.answers[kind].alone(len(names) - 1) for kind in kinds}
    return {
        "members": chosen.members,
        "thresholds": chosen.thresholds,
        "certified": report.chosen is not None if question.confidence else None,
        "tuned_drop": chosen.drop,
        "estimated_drop": chosen.estimated_drop,
        "bound": report.guarantee.bound if report.guarantee else None,
        "measured_drop": whole["flops"].accuracy - found["flops"].accuracy,
        "measured_risk": found["flops"].risk,
        **{f"{kind}_speedup": whole[kind].cost / found[kind].cost for kind in kinds},
        "verdict": report.verdict,
    }


def _summary(splits: list[dict[str, Any]], question: Question) -> dict[str, Any]:
    """Return means over the splits, and how often the drop exceeded what was allowed on the test half."""
    keys = [key for key in splits[0] if key.endswith(("_drop", "_risk", "_speedup"))]
    allowed = question.max_drop or 0.0
    return {
        "mean": {key: float(np.mean([split[key] for split in splits])) for key in keys},
        "spread": {key: float(np.std([split[key] for split in splits])) for key in keys},
        "drop_broken": sum(split["measured_drop"] > allowed + 1e-12 for split in splits),
        "certified": sum(bool(split["certified"]) for split in splits) if question.confidence else None,
        "chosen": Counter(" + ".join(split["members"]) for split in splits).most_common(),
    }


def _timed(
    model_dir: Path,
    last: str,
    choices: Sequence[tuple[tuple[str, ...], tuple[float, ...]]],
    texts: list[Text],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time each choice against the last member alone, in turn: texts one by one, and all in one call."""
    base = ((last,), ())
    runtimes = {
        way: CascadeRuntime(
            model_dir, members=list(way[0]), thresholds=list(way[1]), threads=options.threads, preload=True
        )
        for way in dict.fromkeys([base, *choices])
    }
    times = race(runtimes, base, texts, options.timed, options.rounds)
    return [{"members": list(way[0]), "thresholds": list(way[1]), **row} for way, row in times.items()]


def _show(report: dict[str, Any]) -> None:
    alone = ", ".join(f"{member['name']} {100 * member['accuracy']:.2f}" for member in report["members"])
    print(f"\n{report['task']}: {report['rows']}, {report['splits']} splits; alone: {alone}")
    for row in report["questions"]:
        mean = row["mean"]
        kind = "free" if row["subsets"] else "all members, one tau" if row["shared"] else "all members"
        kind += ", guaranteed" if row["confidence"] else ", labels alone" if row["by_labels_alone"] else ""
        print(
            f"{kind:24} max drop {100 * row['max_drop']:.1f}: tuned {100 * mean['tuned_drop']:+.2f}, measured "
            f"{100 * mean['measured_drop']:+.2f} +- {100 * row['spread']['measured_drop']:.2f}, broken "
            f"{row['drop_broken']}, {mean['flops_speedup']:.2f}x FLOPs, {mean['latency_speedup']:.2f}x latency, "
            f"certified {row['certified']}, {row['chosen']}"
        )
    for row in report["timed"]:
        taus = " ".join(f"{tau:.4f}" for tau in row["thresholds"])
        single, bulk = (row[f"{key}_speedup"]["median"] for key in ("single", "bulk"))
        print(f"{' + '.join(row['members']):14} {taus:16} single {single:.2f}x, bulk {bulk:.2f}x")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--data", type=Path, required=True, help="folder with the task's official files")
    add("--model-dir", type=Path, required=True, help="bundle of this task, by results.py")
    add("--cost", choices=COSTS, default="layers")
    add("--splits", type=int, default=10)
    add("--held-out", action="store_true", help="halve what training held out, not the reported texts")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=5)
    add("--timed", type=int, default=200, help="texts timed one by one; 0: none")
    add("--output", type=Path, help="default: results/thresholds-TASK.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
