"""What makes a cascade's smallest member trustworthy: DAR, temperature scaling and distillation on real data.

    python benchmarks/calibration.py --task rte --data DATA/rte --base MINILM

Labels difficulty for the smallest member (8 folds x 5 seeds), trains it with and without DAR, distillation and
both, and the biggest one, for several seeds, and reports accuracy, F1, DIS and ECE of the smallest, and the cascade at
given layer speed-ups. Thresholds and temperatures come from the validation part of the training file. It all resumes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from cascade_export.temperature import fit_temperature
from cascade_train import RECORD
from cascade_train.difficulty import label_difficulty, read_difficulty
from cascade_train.finetune import Objective, Recipe, finetune, logits_of, teacher_logits
from cascade_train.tasks import GLUE, Examples, TaskData, hold_out, load_evaluation, load_task
from machine import describe
from numpy.typing import NDArray
from workload import run_command

from cascade_rt.bundle import MemberEntry
from cascade_rt.evaluation import evaluate
from cascade_rt.gate import confidence, softmax
from cascade_rt.records import write_json
from cascade_rt.thresholds import threshold_for_speedup

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("plain", "DAR", "KD", "KD + DAR")
SCALED = "plain, temperature"


def main() -> None:
    """Label, train, measure, print and write the report."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    data, reported = _split(options)
    work: Path = options.work or Path("runs") / f"calibration-{options.task}"
    work.mkdir(parents=True, exist_ok=True)
    small = Recipe(
        epochs=options.epochs, learning_rate=options.learning_rate, max_length=options.max_length, bf16=options.bf16
    )
    big = replace(small, epochs=options.big_epochs, learning_rate=options.big_learning_rate)
    labels = work / "difficulty"
    if not labels.exists():
        label_difficulty(
            options.base,
            data,
            labels,
            layers=options.layers[0],
            recipe=replace(small, epochs=options.label_epochs or small.epochs),
            folds=options.folds,
            seeds=options.label_seeds,
            jobs=options.jobs,
        )
    difficulty = read_difficulty(labels, data.train)
    report: dict[str, Any] = {
        "machine": describe(),
        "task": options.task,
        "rows": {"train": len(data.train), "validation": len(data.validation), "reported": len(reported)},
        "reported_on": options.reported_on,
        "layers": options.layers,
        "recipes": {"small": asdict(small), "big": _recipe_of(options.big) if options.big else asdict(big)},
        "folds": options.folds,
        "label_seeds": options.label_seeds,
        "label_epochs": options.label_epochs or small.epochs,
        "margin": options.margin,
        "difficult": float(np.mean(difficulty)),
        "seeds": [],
    }
    for seed in range(options.seeds):
        folders = _members(options, data, difficulty, work, replace(small, seed=seed), replace(big, seed=seed))
        report["seeds"].append(_measured(folders, data, reported, options))
        report["mean"], report["spread"] = _over_seeds(report["seeds"])
        write_json(options.output or RESULTS / f"calibration-{options.task}.json", report)
    _show(report)


def _recipe_of(member: Path) -> Any:
    return json.loads((member / RECORD).read_text("utf-8"))["recipe"]


def _split(options: argparse.Namespace) -> tuple[TaskData, Examples]:
    """Return what to learn and what to report on: the dev set, or a part of the training file where there is none."""
    data = load_task(options.task, options.data)
    try:
        reported = next(iter(load_evaluation(options.task, options.data).values()))
        options.reported_on = "dev"
    except Exception:
        kept, reported = hold_out(data.train, 0.15, 1, nested=GLUE[options.task].nested)
        data = replace(data, train=kept)
        options.reported_on = "15% of the training file, held out: there is no dev file"
    return data, reported


def _members(
    options: argparse.Namespace, data: TaskData, difficulty: list[int], work: Path, small: Recipe, big: Recipe
) -> dict[str, Path]:
    """Train what is not there yet; return the folders by variant, the biggest member as "big"."""
    folders = {"big": options.big or work / f"big-{big.seed}"}
    if not folders["big"].exists():
        finetune(options.base, data, folders["big"], layers=options.layers[1], recipe=big)
    for variant in VARIANTS:
        folders[variant] = folder = work / f"{variant.replace(' + ', '-')}-{small.seed}"
        if not folder.exists():
            objective = Objective(
                difficulty=difficulty if "DAR" in variant else None,
                dar_margin=options.margin,
                teacher=teacher_logits(str(folders["big"]), data, big) if "KD" in variant else None,
            )
            finetune(options.base, data, folder, layers=options.layers[0], recipe=small, objective=objective)
    return folders


def _measured(
    folders: dict[str, Path], data: TaskData, reported: Examples, options: argparse.Namespace
) -> dict[str, Any]:
    """Evaluate every variant alone, and in a cascade with the biggest member, on the reported examples."""
    held = {name: logits_of(str(folder), data, data.validation, options.max_length) for name, folder in folders.items()}
    seen = {name: logits_of(str(folder), data, reported, options.max_length) for name, folder in folders.items()}
    temperature = fit_temperature(held["plain"].astype(np.float64), np.array(data.validation.labels))
    held[SCALED], seen[SCALED] = held["plain"] / temperature, seen["plain"] / temperature
    members = [
        MemberEntry(name, "", "", layers, 384, 1, "fp32", None)
        for name, layers in zip(("small", "big"), options.layers, strict=True)
    ]
    found: dict[str, Any] = {"temperature": temperature}
    for variant in (*VARIANTS, SCALED):
        pair_held = softmax(np.stack([held[variant], held["big"]]))
        taus = {speedup: threshold_for_speedup(members, confidence(pair_held), speedup) for speedup in options.speedups}
        rows = {
            str(speedup): _evaluated(members, tau, np.stack([seen[variant], seen["big"]]), reported)
            for speedup, tau in taus.items()
        }
        first = next(iter(rows.values()))
        found[variant] = {"small": first["members"][0], "cascade": {key: row["cascade"] for key, row in rows.items()}}
        found["big"] = first["members"][1]
    return found


def _evaluated(
    members: list[MemberEntry], tau: float, logits: NDArray[np.float32], reported: Examples
) -> dict[str, Any]:
    lengths = np.ones(len(reported), dtype=np.intp)  # FLOPs are not reported here
    return evaluate(members, [tau], logits, np.array(reported.labels), lengths)


def _over_seeds(seeds: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Return mean and standard deviation of every number, by its path."""
    values: dict[str, list[float]] = defaultdict(list)

    def walk(at: Any, path: str) -> None:
        if isinstance(at, dict):
            for key, value in at.items():
                walk(value, f"{path}/{key}" if path else str(key))
        elif isinstance(at, int | float):
            values[path].append(float(at))

    for seed in seeds:
        walk(seed, "")
    return (
        {path: float(np.mean(found)) for path, found in values.items()},
        {path: float(np.std(found)) for path, found in values.items()},
    )


def _show(report: dict[str, Any]) -> None:
    mean, spread = report["mean"], report["spread"]

    def told(path: str) -> str:
        return f"{100 * mean[path]:.2f} +- {100 * spread[path]:.2f}" if path in mean else "-"

    print(
        f"\n{report['task']}: {report['rows']}, {100 * report['difficult']:.1f}% difficult, "
        f"{len(report['seeds'])} seeds, reported on {report['reported_on']}; in %"
    )
    print(f"biggest alone: accuracy {told('big/accuracy')}, F1 {told('big/f1')}")
    for variant in (*VARIANTS, SCALED):
        alone = ", ".join(f"{key} {told(f'{variant}/small/{key}')}" for key in ("accuracy", "f1", "dis", "ece"))
        print(f"{variant:20} {alone}")
        for speedup in next(iter(report["seeds"]))[variant]["cascade"]:
            path = f"{variant}/cascade/{speedup}"
            print(
                f"{'':20}   aimed at {speedup}x: {mean[f'{path}/layer_speedup']:.2f}x, "
                f"accuracy {told(f'{path}/accuracy')}, F1 {told(f'{path}/f1')}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=list(GLUE))
    add("--data", type=Path, required=True, help="folder with the task's official files")
    add("--base", required=True, help="encoder to start from: a Hugging Face folder or hub id")
    add("--layers", type=int, nargs=2, default=[2, 6], metavar=("SMALL", "BIG"))
    add("--folds", type=int, default=8)
    add("--label-seeds", type=int, default=5)
    add("--jobs", type=int, default=1, help="folds trained side by side")
    add("--seeds", type=int, default=3, help="members of every variant")
    add("--margin", type=float, default=0.5, help="eps of DAR")
    add("--epochs", type=float, default=5)
    add("--learning-rate", type=float, default=1e-4)
    add("--big-epochs", type=float, default=4)
    add("--big-learning-rate", type=float, default=5e-5)
    add("--big", type=Path, metavar="DIR", help="a biggest member that is trained already, for all seeds")
    add("--bf16", action="store_true", help="train in bfloat16 where that is safe")
    add("--label-epochs", type=float, help="of the folds; default: --epochs")
    add("--max-length", type=int, default=128)
    add("--speedups", type=float, nargs="+", default=[1.5, 2.0, 2.5])
    add("--work", type=Path, help="labels and members; default: runs/calibration-TASK")
    add("--output", type=Path, help="default: results/calibration-TASK.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
