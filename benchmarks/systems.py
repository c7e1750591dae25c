"""The systems that the CascadeBERT paper compares, from one big model, on the same runtime.

    python benchmarks/systems.py --task sst-2 --data DATA/sst2 --base E5 --complete 3=MINILM-L3 --compressed 3

Trains what is not under --work yet: the big model on labels; its first K layers (BERT-kL) and complete encoders
(--complete K=DIR) on labels; DeeBERT, PABEE and FastBERT; and, with K layers (--compressed K), BERT-PKD,
BERT-of-Theseus, BERT-PD (where there is a complete encoder of that depth) and DistilBERT (--distilled DIR). Each is
exported in fp32. The points of early exits and cascades (one threshold or patience for all exits) are chosen by
`tune` on the validation and tuning parts; quality is that of the reported part, and all are timed in turn. The report
has the data of the paper's Tables 2 and 3 and Figures 2 and 3, and quality over clock; pictures lie beside it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from cascade_export.check import Check
from cascade_export.exits import export_exits
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.exits import DEEBERT, FASTBERT, KINDS, PABEE, train_exits
from cascade_train.finetune import Objective, Recipe, finetune, teacher_logits, teacher_states
from cascade_train.tasks import TaskData
from common import RESULTS, Parts, joined, race, read_parts, run_command, training_parser
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime, MemberEntry
from cascade_rt.bundle import MANIFEST
from cascade_rt.engine.cost import cumulative_layers
from cascade_rt.engine.exit_rules import replay
from cascade_rt.engine.task import SingleLabel
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import collect, open_whole
from cascade_rt.tuning.evaluation import evaluate, quality
from cascade_rt.tuning.plot import pyplot
from cascade_rt.tuning.report import Question
from cascade_rt.tuning.tune import tune

BIG, ALONE = "big model", "alone"
NAMES = {DEEBERT: "DeeBERT", PABEE: "PABEE", FASTBERT: "FastBERT"}
DEEBERT_NAME = NAMES[DEEBERT]
SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
TIMED, TIMED_IN_BULK = 60, 400  # texts
ROUNDS = 3

Training = Callable[[Path], object]


@dataclass(frozen=True)
class System:
    """One system of the comparison."""

    name: str
    models: tuple[str, ...]
    """Trained models: one, or the members of a cascade."""
    row: str | None = None
    """Row of Figures 2 and 3; None where it is in neither."""
    leaves_early: bool = False


def main() -> None:
    """Train, export, measure, print and write the report."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    parts = read_parts(options.task, options.data)
    work: Path = options.work or Path("runs") / "systems" / options.task
    (work / "bundles").mkdir(parents=True, exist_ok=True)
    output: Path = options.output or RESULTS / f"systems-{options.task}.json"
    report = parts.described() | {
        "complete": {f"{layers}L": Path(base).name for layers, base in _complete(options).items()},
        "seeds": [],
    }
    for seed in range(options.seeds):
        trainings = _trainings(options, parts.data, work, seed)
        folders = {name: _folder(name, seed, options, work) for name in trainings}
        for name, train in trainings.items():
            if not folders[name].exists():
                train(folders[name])
        records = {name: json.loads((folder / RECORD).read_text("utf-8")) for name, folder in folders.items()}
        report["recipes"] = {name: record["recipe"] for name, record in records.items()}
        systems = _systems(options, folders)
        runtimes = {system.name: _exported(system, folders, work / "bundles", seed) for system in systems}
        report["seeds"].append(_measured(systems, runtimes, parts, timed=seed == 0 and options.timed))
        write_json(output, report)
        _show(report)
    first = report["seeds"][0]
    draw_curves(first["systems"], parts.data.metric, output.with_suffix(".svg"))
    draw_layers(first["by_layer"], output.with_name(f"{output.stem}-layers.svg"))
    draw_inversions(first["by_layer"], output.with_name(f"{output.stem}-dis.svg"))
    print(f"written: {output}")


def _folder(name: str, seed: int, options: argparse.Namespace, work: Path) -> Path:
    taken = dict(entry.split("=", 1) for entry in options.take)
    return Path(taken[name]) if name in taken else work / _file_name(name, 0 if name == BIG else seed)


def _file_name(name: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{seed}"


def _complete(options: argparse.Namespace) -> dict[int, str]:
    """Return the complete small encoders by their number of layers, the smallest first."""
    try:
        return dict(sorted((int(layers), base) for layers, base in (entry.split("=", 1) for entry in options.complete)))
    except ValueError as error:
        raise InputError(f"found --complete {' '.join(options.complete)}, expected K=DIR") from error


def _trainings(options: argparse.Namespace, data: TaskData, work: Path, seed: int) -> dict[str, Training]:
    """Return how to train each model into a folder, by name, the big model first."""
    big, k, complete = str(_folder(BIG, seed, options, work)), options.compressed, _complete(options)
    recipe = Recipe(
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_length=options.max_length,
        warmup_ratio=0.06,
        evaluations_per_epoch=4 if options.epochs <= 2 else 1,
        seed=seed,
        bf16=options.bf16,
    )
    whole = replace(recipe, learning_rate=options.big_learning_rate, epochs=options.big_epochs)

    @cache
    def answers() -> NDArray[np.float32]:
        return teacher_logits(big, data, recipe)

    def objective(**more: Any) -> Objective:
        taught = {"distill_weight": options.distill_weight, "temperature": options.temperature}
        return Objective(teacher=answers(), **taught, **more)

    def labels(base: str, **more: Any) -> Training:
        return lambda to: finetune(base, data, to, recipe=recipe, **more)

    def student(base: str) -> Training:
        return lambda to: finetune(base, data, to, recipe=recipe, objective=objective())

    def patient(to: Path) -> None:
        learns = objective(patient=teacher_states(big, data, recipe, k))
        finetune(options.base, data, to, layers=k, recipe=recipe, objective=learns)

    def exits(kind: str) -> Training:
        # PABEE trains the whole model, so it takes the big model's recipe; the others train their exits alone.
        alone = replace(recipe, learning_rate=options.exit_learning_rate, epochs=options.exit_epochs)
        base, how = (options.base, whole) if kind == PABEE else (big, alone)
        return lambda to: train_exits(base, data, to, kind=kind, recipe=how)

    found: dict[str, Training] = {BIG: lambda to: finetune(options.base, data, to, recipe=replace(whole, seed=0))}
    found |= {f"BERT-{layers}L": labels(options.base, layers=layers) for layers in options.first}
    found |= {f"complete {layers}L": labels(base) for layers, base in complete.items()}
    found |= {NAMES[kind]: exits(kind) for kind in KINDS}
    found |= {f"BERT-PD {layers}L": student(base) for layers, base in complete.items()}
    found[f"BERT-PKD {k}L"] = patient
    found[f"BERT-of-Theseus {k}L"] = labels(big, layers=k, module_replacing=True)
    if options.distilled:
        found[f"DistilBERT {k}L"] = student(options.distilled)
    return found


def _systems(options: argparse.Namespace, models: Mapping[str, Path]) -> list[System]:
    rows = {BIG: "BERT-kL"} | {name: name for name in NAMES.values()}
    rows |= {f"BERT-{layers}L": "BERT-kL" for layers in options.first}
    rows |= {f"complete {layers}L": "complete" for layers in _complete(options)}
    smallest = min(_complete(options))
    return [
        *(System(name, (name,), rows.get(name), name in NAMES.values()) for name in models),
        System("CascadeBERT", (f"complete {smallest}L", BIG), leaves_early=True),
        System("CascadeBERT, distilled", (f"BERT-PD {smallest}L", BIG), leaves_early=True),
    ]


def _exported(system: System, folders: Mapping[str, Path], bundles: Path, seed: int) -> CascadeRuntime:
    target = bundles / _file_name(system.name, seed)
    if not (target / MANIFEST).is_file():
        if system.name in NAMES.values():
            export_exits(str(folders[system.name]), target, check=Check(max_accuracy_drop=100))
        else:
            export_bundle([str(folders[name]) for name in system.models], target, check=Check(max_accuracy_drop=100))
    return open_whole(target, preload=True)


def _measured(
    systems: Sequence[System], runtimes: Mapping[str, CascadeRuntime], parts: Parts, *, timed: bool
) -> dict[str, Any]:
    """Return quality and speed of each system at its operating points, and quality by layer."""
    original = runtimes[BIG].bundle.members
    reported, labels = parts.reported, np.array(parts.reported.labels)
    answers = {name: runtime.member_logits(reported.texts) for name, runtime in runtimes.items()}
    ways: dict[tuple[str, str], CascadeRuntime] = {}
    found: dict[str, dict[str, Any]] = {}
    for system in systems:
        runtime = runtimes[system.name]
        points = _points(runtime, parts) if system.leaves_early else {ALONE: runtime}
        if len(system.models) == 1 and system.leaves_early:
            points[ALONE] = runtime.without_exits()  # what its speed-ups on the clock are realised against
        ways |= {(system.name, speed): way for speed, way in points.items()}
        found[system.name] = {
            speed: _quality(way, runtime, *answers[system.name], labels, original) for speed, way in points.items()
        }
    if timed:
        rows = np.random.default_rng(0).permutation(len(labels))[:TIMED_IN_BULK]
        times = race(ways, (BIG, ALONE), [reported.texts[row] for row in rows], TIMED, ROUNDS)
        for (name, speed), row in times.items():
            found[name][speed] |= row
    task, rule = SingleLabel(), ways.get((DEEBERT_NAME, "3x"), runtimes[DEEBERT_NAME]).exit_rule
    emitted = replay(rule, rule.observed(task, task.probabilities(answers[DEEBERT_NAME][0])))
    deebert_layers = cumulative_layers(runtimes[DEEBERT_NAME].bundle.members)
    by_layer: dict[str, dict[str, Any]] = {}
    for system in systems:
        if system.row is None:
            continue
        layers = cumulative_layers(runtimes[system.name].bundle.members).tolist()
        for depth, logits in zip(layers, answers[system.name][0], strict=True):
            there = deebert_layers[emitted] == depth
            by_layer.setdefault(system.row, {})[str(depth)] = _by_layer(task.probabilities(logits), labels, there)
    return {"systems": found, "by_layer": by_layer}


def _points(runtime: CascadeRuntime, parts: Parts) -> dict[str, CascadeRuntime]:
    """Return the most accurate way to run a system at each layer speed-up that it reaches."""
    seen = joined(parts.data.validation, parts.tuning)
    collected = collect(runtime, seen.texts, np.array(seen.labels), cache=None)
    points = {}
    for speedup in SPEEDUPS:
        try:
            question = Question(speedup=speedup, shared=True, subsets=False)
            chosen = tune(runtime.bundle, collected, question).chosen
        except InvalidOption:  # it does not get that fast
            continue
        if chosen is not None:
            way = runtime.with_members(chosen.members)
            patience = chosen.exit_rule.get("patience")
            points[f"{speedup:g}x"] = (
                way.with_patience(patience) if patience else way.with_thresholds(chosen.thresholds or None)
            )
    return points


def _quality(
    way: CascadeRuntime,
    whole: CascadeRuntime,
    logits: NDArray[np.float32],
    lengths: NDArray[np.intp],
    labels: NDArray[np.intp],
    original: Sequence[MemberEntry],
) -> dict[str, Any]:
    """Return the quality of one way to run a system, and its speed-ups over the big model."""
    names = [member.name for member in way.bundle.members]
    rows = [row for row, member in enumerate(whole.bundle.members) if member.name in names]
    measured = evaluate(way.bundle.members, way.exit_rule, logits[rows], labels, lengths, original)
    return asdict(measured.cascade) | {"patience": way.exit_rule.settings.get("patience")}


def _by_layer(
    probabilities: NDArray[np.float64], labels: NDArray[np.intp], emitted: NDArray[np.bool_]
) -> dict[str, Any]:
    """Return what one classifier does on all texts, and its accuracy on those that DeeBERT emits after its layers."""
    task = SingleLabel()
    answers = task.answers(probabilities)
    found = quality(task, labels, answers, task.confidence(probabilities), probabilities.shape[-1])
    right = answers == labels
    return asdict(found) | {
        "emitted_texts": int(emitted.sum()),
        "emitted_accuracy": float(right[emitted].mean()) if emitted.any() else None,
    }


def draw_curves(systems: Mapping[str, Mapping[str, Any]], metric: str, path: Path) -> None:
    """Draw quality over measured speed-up, in bulk, or where nothing was timed over layer speed-up."""
    timed = all("bulk_speedup" in row for row in systems[BIG].values())
    figure, axis = pyplot().subplots(figsize=(7, 5), layout="constrained")
    for name, points in systems.items():
        rows = [row for row in points.values() if row["layer_speedup"] < 8]
        speeds = [row["bulk_speedup"]["median"] if timed else row["layer_speedup"] for row in rows]
        order = np.argsort(speeds)
        style = ".-" if len(points) > 1 else "s"
        axis.plot(np.array(speeds)[order], [100 * rows[row][metric] for row in order], style, label=name)
    axis.set(xlabel="measured speed-up, in bulk" if timed else "layer speed-up", ylabel=f"{metric}, %")
    axis.legend(fontsize="small")
    figure.savefig(path)


def draw_layers(by_layer: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy by layers, on all texts and on those that DeeBERT emits there (paper, Figure 2)."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axis, key, title in zip(
        axes, ("accuracy", "emitted_accuracy"), ("all texts", "texts that DeeBERT emits there"), strict=True
    ):
        for name, rows in by_layer.items():
            depths = sorted((int(depth) for depth, row in rows.items() if row[key] is not None))
            axis.plot(depths, [100 * rows[str(depth)][key] for depth in depths], ".-", label=name)
        axis.set(xlabel="layers", ylabel="accuracy, %", title=title)
    axes[0].legend()
    figure.savefig(path)


def draw_inversions(by_layer: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw DIS by model and layers as a heat map (paper, Figure 3)."""
    depths = sorted({int(depth) for rows in by_layer.values() for depth in rows})
    values = np.full((len(by_layer), len(depths)), np.nan)
    for row, scores in enumerate(by_layer.values()):
        for depth, found in scores.items():
            values[row, depths.index(int(depth))] = np.nan if found["dis"] is None else 100 * found["dis"]
    figure, axis = pyplot().subplots(figsize=(9, 3), layout="constrained")
    axis.imshow(values, aspect="auto")
    axis.set(xticks=range(len(depths)), xticklabels=depths, xlabel="layers")
    axis.set(yticks=range(len(by_layer)), yticklabels=list(by_layer))
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center")
    figure.savefig(path)


def _show(report: Mapping[str, Any]) -> None:
    metric, seeds = report["metric"], [seed["systems"] for seed in report["seeds"]]
    print(f"\n{report['task']}, {len(seeds)} seed(s): {metric}, then speed-ups by layers, FLOPs, clock (single, bulk)")
    for name, points in seeds[0].items():
        for speed in points:
            rows = [seed[name][speed] for seed in seeds if speed in seed[name]]
            values = [100 * row[metric] for row in rows]
            clock = [f"{rows[0][key]['median']:5.2f}x" for key in ("single_speedup", "bulk_speedup") if key in rows[0]]
            means = [f"{np.mean([row[key] for row in rows]):5.2f}x" for key in ("layer_speedup", "flops_speedup")]
            print(f"{name:24} {speed:5} {np.mean(values):6.2f} +- {np.std(values):4.2f}  {'  '.join(means + clock)}")
    print("\nby layer, first seed: accuracy, on the texts that DeeBERT emits there at 3x (their number), DIS")
    for name, found in report["seeds"][0]["by_layer"].items():
        for depth, row in sorted(found.items(), key=lambda item: int(item[0])):
            emitted = "-" if row["emitted_accuracy"] is None else f"{100 * row['emitted_accuracy']:.2f}"
            scores = f"{100 * row['accuracy']:6.2f}  {emitted:>6} ({row['emitted_texts']:3})  {100 * row['dis']:6.2f}"
            print(f"{name:24} {depth:>2}L  {scores}")


def _parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, "systems")
    add = parser.add_argument
    add("--base", required=True, metavar="DIR", help="the big encoder")
    add("--complete", action="append", required=True, metavar="K=DIR", help="complete encoder of K layers")
    add(
        "--first", type=int, nargs="*", default=[6, 4, 3], metavar="K", help="BERT-kL: the big encoder's first K layers"
    )
    add("--compressed", type=int, default=3, metavar="K", help="layers of the compressed rivals")
    add("--distilled", metavar="DIR", help="the big encoder, distilled to that many layers: DistilBERT")
    add("--take", action="append", default=[], metavar="NAME=DIR", help=f'take this model, for instance "{BIG}=DIR"')
    add("--seeds", type=int, default=1, help="of all models but the big one; the first is timed")
    add("--big-epochs", type=float, default=3, help="of the big model and PABEE")
    add("--epochs", type=float, default=3, help="of the small models")
    add("--learning-rate", type=float, default=1e-4)
    add("--exit-epochs", type=float, default=3, help="of the exits of DeeBERT and FastBERT")
    add("--exit-learning-rate", type=float, default=1e-3)
    add("--no-timing", dest="timed", action="store_false", help="quality alone")
    return parser


if __name__ == "__main__":
    run_command(main)
