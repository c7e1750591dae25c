"""Accuracy against speed-up on a real task, end to end: fine-tune the members, export, choose tau, report dev.

    python benchmarks/accuracy.py --task sst-2 --data DIR --base MODEL --member 2:4:1e-4 --member 6:3:5e-5

Every tau is chosen on examples held out from the training file; dev is only reported. Members that an earlier run
of the same request left under --work are taken up again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.finetune import Recipe, finetune
from cascade_train.tasks import TASKS, Examples, TaskData, load_evaluation, load_task
from common import RESULTS, run_command

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.engine.exit_rules import Thresholds
from cascade_rt.engine.probabilities import confidence, softmax
from cascade_rt.errors import InputError
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.evaluation import evaluate
from cascade_rt.tuning.operating_points import threshold_for_speedup


def main() -> None:
    """Run what the command line asks for and write the JSON."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    task = load_task(options.task, options.data)
    work = options.work or Path("runs") / options.task
    bundle = work / "bundle"
    sources = [_trained(member, options.base, task, work) for member in options.member]
    export_bundle([str(source) for source in sources], bundle, overwrite=bundle.exists())
    report = {
        "machine": describe(),
        "task": options.task,
        "base": options.base_name or Path(options.base).name,
    } | _measured(bundle, task, load_evaluation(options.task, options.data), options.speedup)
    output = options.output or RESULTS / f"accuracy-{options.task}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    _show(report)
    print(f"written: {output}")


def _trained(member: str, base: str, task: TaskData, work: Path) -> Path:
    """Fine-tune one member, "LAYERS:EPOCHS:LEARNING_RATE", unless its folder exists from an earlier run."""
    try:
        layers, epochs, rate = member.split(":")
        recipe = Recipe(epochs=float(epochs), learning_rate=float(rate), warmup_ratio=0.1, evaluations_per_epoch=2)
    except ValueError as error:
        raise InputError(f"found --member {member}, expected LAYERS:EPOCHS:RATE, as in 2:4:1e-4") from error
    folder = work / f"{layers}L"
    if not folder.exists():
        finetune(base, task, folder, layers=int(layers), recipe=recipe)
    record = json.loads((folder / RECORD).read_text("utf-8"))
    if (record["base"], record["recipe"]) != (base, asdict(recipe)):
        raise InputError(f"{folder} was trained from another base or recipe; delete it, or choose another --work")
    return folder


def _measured(folder: Path, task: TaskData, reported: dict[str, Examples], speedups: list[float]) -> dict[str, Any]:
    runtime = CascadeRuntime(folder)
    members = runtime.bundle.members
    held_logits, _ = runtime.member_logits(task.validation.texts)
    held_confidences = confidence(softmax(held_logits))
    taus = {speedup: threshold_for_speedup(members, held_confidences, speedup) for speedup in speedups}
    sets = {}
    for name, examples in reported.items():
        logits, lengths = runtime.member_logits(examples.texts)
        labels = np.array(examples.labels)
        sets[name] = {
            str(speedup): evaluate(members, Thresholds([tau] * (len(members) - 1)), logits, labels, lengths).to_json()
            for speedup, tau in taus.items()
        }
    return {
        "metric": task.metric,
        "threshold_data": {"rows": len(task.validation), "sha256": task.validation.digest()},
        "thresholds": {str(speedup): tau for speedup, tau in taus.items()},
        "provenance": dict(runtime.bundle.provenance),
        "reported": sets,
    }


def _show(report: dict[str, Any]) -> None:
    metric = report["metric"]
    for name, rows in report["reported"].items():
        print(f"\n{report['task']} {name}, {next(iter(rows.values()))['texts']} texts, {metric} in %")
        for member in next(iter(rows.values()))["members"]:
            print(f"  {member['name']:>10} alone        {100 * member[metric]:6.2f}")
        for speedup, row in rows.items():
            cascade = row["cascade"]
            print(
                f"  cascade, aimed at {float(speedup):.2f}x  {100 * cascade[metric]:6.2f}   "
                f"layers {cascade['layer_speedup']:.2f}x, FLOPs {cascade['flops_speedup']:.2f}x, "
                f"tau {cascade['thresholds'][0]:.4f}, exits {cascade['exits']}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--data", type=Path, help="folder with the task's official files")
    add("--base", required=True, help="encoder to start from: a Hugging Face folder or hub id")
    add("--base-name", help="what the report calls it; default: its last name")
    add("--member", action="append", required=True, metavar="LAYERS:EPOCHS:RATE", help="give it per member")
    add("--speedup", type=float, nargs="+", default=[1.25, 1.5, 2.0, 2.5], help="layer speed-ups to aim at")
    add("--work", type=Path, help="members and bundle; default: runs/TASK")
    add("--output", type=Path, help="default: results/accuracy-TASK.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
