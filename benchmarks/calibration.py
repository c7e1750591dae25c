"""What makes a cascade's smallest member trustworthy: DAR, temperature scaling and distillation on real data.

    python benchmarks/calibration.py --task rte --data DATA/rte --base MINILM

Labels difficulty for the smallest member (8 folds x 5 seeds), trains it with and without DAR, distillation and
both, and the biggest one, for several seeds, and reports accuracy, F1, DIS and ECE of the smallest, and the cascade at
given layer speed-ups; `--first` adds a still smaller member, for cascades of three. Thresholds and temperatures come
from the validation part of the training file. It all resumes. Pictures of the first seed lie beside the report.
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
from cascade_train.analysis import draw_curves, draw_reliability, expected_gain, reliability, speedup_curve
from cascade_train.difficulty import label_difficulty, read_difficulty
from cascade_train.finetune import Objective, Recipe, finetune, logits_of, teacher_logits
from cascade_train.tasks import GLUE, Examples, TaskData
from common import RESULTS, read_task, run_command
from numpy.typing import NDArray

from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import MemberEntry
from cascade_rt.engine.exit_rules import Thresholds
from cascade_rt.engine.probabilities import confidence, softmax
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.evaluation import evaluate
from cascade_rt.tuning.operating_points import threshold_for_speedup

VARIANTS = ("plain", "DAR", "KD", "KD + DAR")
SCALED = "plain, temperature"
THREE = ("plain", "DAR")  # of these, cascades of three members too


def main() -> None:
    """Label, train, measure, print and write the report."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    data, reported, reported_on = read_task(options.task, options.data)
    work: Path = options.work or Path("runs") / f"calibration-{options.task}"
    output: Path = options.output or RESULTS / f"calibration-{options.task}.json"
    work.mkdir(parents=True, exist_ok=True)
    small = Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        max_length=options.max_length,
        warmup_ratio=options.warmup_ratio,
        bf16=options.bf16,
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
        "reported_on": reported_on,
        "layers": options.layers,
        "first": options.first,
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
        found, pictures = _measured(folders, data, reported, options)
        report["seeds"].append(found)
        report.setdefault("pictures", pictures)
        report["mean"], report["spread"] = _over_seeds(report["seeds"])
        write_json(output, report)
    draw_reliability(report["pictures"]["reliability"], output.with_name(f"{output.stem}-reliability.png"))
    draw_curves(report["pictures"]["speedup"], output.with_name(f"{output.stem}-speedup.png"))
    _show(report)


def _recipe_of(member: Path) -> Any:
    return json.loads((member / RECORD).read_text("utf-8"))["recipe"]


def _members(
    options: argparse.Namespace, data: TaskData, difficulty: list[int], work: Path, small: Recipe, big: Recipe
) -> dict[str, Path]:
    """Train what is not there yet; return the folders by variant, the biggest member as "big"."""
    folders = {"big": options.big or work / f"big-{big.seed}"}
    if not folders["big"].exists():
        finetune(options.base, data, folders["big"], layers=options.layers[1], recipe=big)
    wanted = [(variant, variant, options.layers[0]) for variant in VARIANTS]
    wanted += [(f"first {variant}", variant, options.first) for variant in THREE if options.first]
    for name, variant, layers in wanted:
        folders[name] = folder = work / f"{name.replace(' + ', '-').replace(' ', '-')}-{small.seed}"
        if not folder.exists():
            objective = Objective(
                difficulty=difficulty if "DAR" in variant else None,
                dar_margin=options.margin,
                teacher=_teacher(folders["big"], data, big, work) if "KD" in variant else None,
            )
            finetune(options.base, data, folder, layers=layers, recipe=small, objective=objective)
    return folders


def _teacher(folder: Path, data: TaskData, recipe: Recipe, work: Path) -> NDArray[np.float32]:
    """Return the biggest member's logits for the training examples, kept beside the members that learn from them."""
    kept = work / f"teacher-{folder.name}.npy"
    if not kept.exists():
        np.save(part := kept.with_suffix(".part.npy"), teacher_logits(str(folder), data, recipe))
        part.rename(kept)
    return np.asarray(np.load(kept))


def _measured(
    folders: dict[str, Path], data: TaskData, reported: Examples, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate every variant alone and in its cascades on the reported examples; return figures, and pictures' data."""
    held = {name: logits_of(str(folder), data, data.validation, options.max_length) for name, folder in folders.items()}
    seen = {name: logits_of(str(folder), data, reported, options.max_length) for name, folder in folders.items()}
    temperature = fit_temperature(held["plain"].astype(np.float64), np.array(data.validation.labels))
    held[SCALED], seen[SCALED] = held["plain"] / temperature, seen["plain"] / temperature
    found: dict[str, Any] = {"temperature": temperature}
    pictures: dict[str, Any] = {"reliability": {}, "speedup": {}}
    labels = np.array(reported.labels)
    for variant in (*VARIANTS, SCALED):
        names, layers = [variant, "big"], options.layers
        rows = _cascades(names, layers, held, seen, labels, options.speedups)
        alone = next(iter(rows.values()))["members"]
        found[variant] = {"small": alone[0], "cascade": {key: row["cascade"] for key, row in rows.items()}}
        found["big"] = alone[1]
        if options.first and variant in THREE:
            names, layers = [f"first {variant}", *names], [options.first, *layers]
            rows = _cascades(names, layers, held, seen, labels, options.speedups)
            found[variant] |= {
                "first": next(iter(rows.values()))["members"][0],
                "cascade of three": {key: row["cascade"] | {"gain": row["gain"]} for key, row in rows.items()},
            }
            pictures["speedup"][f"{variant}, three"] = speedup_curve(
                _entries(names, layers), softmax(np.stack([seen[name] for name in names])), labels
            )
        probabilities = softmax(np.stack([seen[variant], seen["big"]]))
        pictures["speedup"][variant] = speedup_curve(_entries(["small", "big"], options.layers), probabilities, labels)
        sure, right = confidence(probabilities[0]), probabilities[0].argmax(axis=-1) == labels
        pictures["reliability"][variant] = reliability(sure, right)
    return found, pictures


def _cascades(
    names: list[str],
    layers: list[int],
    held: dict[str, NDArray[np.float32]],
    seen: dict[str, NDArray[np.float32]],
    labels: NDArray[np.intp],
    speedups: list[float],
) -> dict[str, dict[str, Any]]:
    """Return the quality of a cascade at each speed-up, with the tau that reaches it on the held-out logits."""
    members = _entries(names, layers)
    logits = np.stack([seen[name] for name in names])
    probabilities, held_sure = softmax(logits), confidence(softmax(np.stack([held[name] for name in names])))
    lengths = np.ones(len(labels), dtype=np.intp)  # FLOPs are not reported here
    rows = {}
    for speedup in speedups:
        taus = [threshold_for_speedup(members, held_sure, speedup)] * (len(members) - 1)
        gain = expected_gain(members, probabilities, labels, taus)
        report = evaluate(members, Thresholds(taus), logits, labels, lengths)
        rows[str(speedup)] = report.to_json() | {"gain": gain[0] if gain else None}
    return rows


def _entries(names: list[str], layers: list[int]) -> list[MemberEntry]:
    return [MemberEntry(name, "", "", count, 384, 1, "fp32", None) for name, count in zip(names, layers, strict=True)]


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

    def shown(path: str) -> str:
        return f"{100 * mean[path]:.2f} +- {100 * spread[path]:.2f}" if path in mean else "-"

    print(
        f"\n{report['task']}: {report['rows']}, {100 * report['difficult']:.1f}% difficult, "
        f"{len(report['seeds'])} seeds, reported on {report['reported_on']}; in %"
    )
    print(f"biggest alone: accuracy {shown('big/accuracy')}, F1 {shown('big/f1')}")
    cascades = [(variant, "small", "cascade") for variant in (*VARIANTS, SCALED)]
    cascades += [(variant, "first", "cascade of three") for variant in THREE if report["first"]]
    for variant, smallest, cascade in cascades:
        alone = ", ".join(f"{key} {shown(f'{variant}/{smallest}/{key}')}" for key in ("accuracy", "f1", "dis", "ece"))
        print(f"{variant if smallest == 'small' else f'{variant}, first':20} {alone}")
        for speedup in report["seeds"][0][variant][cascade]:
            path = f"{variant}/{cascade}/{speedup}"
            print(
                f"{'':20}   aimed at {speedup}x: {mean[f'{path}/layer_speedup']:.2f}x, "
                f"accuracy {shown(f'{path}/accuracy')}, F1 {shown(f'{path}/f1')}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=list(GLUE))
    add("--data", type=Path, required=True, help="folder with the task's official files")
    add("--base", required=True, help="encoder to start from: a Hugging Face folder or hub id")
    add("--layers", type=int, nargs=2, default=[2, 6], metavar=("SMALL", "BIG"))
    add("--first", type=int, metavar="LAYERS", help="of a still smaller member, for cascades of three")
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
    add("--warmup-ratio", type=float, default=0.1)
    add("--bf16", action="store_true", help="train in bfloat16 where that is safe")
    add("--label-epochs", type=float, help="of the folds; default: --epochs")
    add("--max-length", type=int, default=128)
    add("--speedups", type=float, nargs="+", default=[1.5, 2.0, 2.5])
    add("--work", type=Path, help="labels and members; default: runs/calibration-TASK")
    add("--output", type=Path, help="default: results/calibration-TASK.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
