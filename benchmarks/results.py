"""Complete members on a real task, from training to figures.

    python benchmarks/results.py --task sst-2 --data DATA/sst2 --base 12L=E5 --base 6L=MINILM --base 3L=MINILM-L3

The biggest base is fine-tuned on labels. The others learn its answers too (knowledge distillation), and so do members
that are cut out of the biggest base (--truncated K: BERT-kL). --plain trains the smallest of both on labels alone as
well, and --dar the smallest complete one with difficulty-aware regularization, with and without distillation.
One tau for all members comes from texts that were not trained on, and figures from the reported part, for each seed.
The deployed members of the first seed are exported in fp32 and int8 and timed, all in turn. It resumes: members, logits
and bundles lie under --work.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_export.temperature import fit_temperature
from cascade_train import RECORD
from cascade_train.analysis import draw_curves, speedup_curve
from cascade_train.difficulty import Splits, label_difficulty, read_difficulty
from cascade_train.finetune import Objective, Recipe, finetune, logits_of
from cascade_train.tasks import Examples, TaskData
from common import RESULTS, Parts, joined, named_folders, race, read_parts, run_command, training_parser
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime
from cascade_rt.bundle import MANIFEST, MemberEntry
from cascade_rt.engine.exit_rules import MaximumProbability, replay
from cascade_rt.engine.task import SingleLabel
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import Collected, collect, open_whole
from cascade_rt.tuning.evaluation import evaluate
from cascade_rt.tuning.metrics import ece
from cascade_rt.tuning.operating_points import threshold_for_speedup
from cascade_rt.tuning.report import Question
from cascade_rt.tuning.tune import tune

_TASK = SingleLabel()

EPOCHS = {"sst-2": 2, "rte": 8, "mrpc": 5, "sick": 6, "banking77": 8, "clinc150": 5}
SPEEDUPS = (2.0, 3.0, 4.0)
PRECISIONS = ("fp32", "int8")
CONFIDENCE, MAX_DROP = 0.95, 0.01
OUT_OF_SCOPE = "oos"  # CLINC150's class
TIMED, TIMED_IN_BULK = 100, 500  # texts
ROUNDS = 3


@dataclass(frozen=True)
class Kind:
    """One kind of member, and its training."""

    name: str
    base: str
    layers: int | None = None
    """The first ones of the base; None: all."""
    teacher: bool = True
    """True if it learns the biggest member's answers."""
    dar: bool = False
    for_comparison: bool = False
    """True if it is there only to be compared with one that is trained otherwise."""
    once: bool = False
    """True if all seeds share the first one's member."""

    def folder(self, seed: int) -> str:
        """Return the name of a member's folder."""
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.name)}-{0 if self.once else seed}"


def main() -> None:
    """Train, measure, print and write the report."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    parts = read_parts(options.task, options.data)
    work: Path = options.work or Path("runs") / "results" / options.task
    work.mkdir(parents=True, exist_ok=True)
    kinds = _kinds(options)
    report = parts.described() | {
        "bases": {kind.name: Path(kind.base).name for kind in kinds},
        "distillation": {"weight": options.distill_weight, "temperature": options.temperature},
        "once": [kind.name for kind in kinds if kind.once],
        "seeds": [],
    }
    output: Path = options.output or RESULTS / f"results-{options.task}.json"
    for seed in range(options.seeds):
        folders = _trained(kinds, parts.data, work, seed, options)
        records = {name: json.loads((folder / RECORD).read_text("utf-8")) for name, folder in folders.items()}
        report["recipes"] = {name: record["recipe"] for name, record in records.items()}
        report["objectives"] = {name: record["objective"] for name, record in records.items()}
        figures = _figures(kinds, folders, parts, work)
        if seed:
            del figures["curves"]
        report["seeds"].append(figures)
        write_json(output, report)
        _show(report)
    draw_curves(report["seeds"][0]["curves"], output.with_suffix(".svg"))
    folders = _trained(kinds, parts.data, work, 0, options)
    names = [kind.name for kind in _deployed(kinds)]
    for precision in PRECISIONS if options.exported else ():
        report.setdefault("exported", {})[precision] = _exported(
            [folders[name] for name in names], parts, work / f"bundle-{precision}", precision
        )
        write_json(output, report)
        _show_exported(precision, report["exported"][precision])
    print(f"written: {output}")


def _kinds(options: argparse.Namespace) -> list[Kind]:
    """Return the kinds of members, the biggest first: the one that teaches the others."""
    named = named_folders("base", options.base)
    (big, base), *others = named
    complete = [Kind(name, path, once=name in options.once) for name, path in others]
    kinds = complete + [_truncated(base, layers, options) for layers in options.truncated]
    if options.plain:
        smallest = complete[-1:] + kinds[len(complete) :][-1:]
        kinds += [replace(kind, name=f"{kind.name}, plain", teacher=False, for_comparison=True) for kind in smallest]
    if options.dar:
        for name, teacher in (("DAR", False), ("KD + DAR", True)):
            kinds += [
                replace(kind, name=f"{kind.name}, {name}", teacher=teacher, dar=True, for_comparison=True)
                for kind in complete[-1:]
            ]
    return [Kind(big, base, teacher=False, once=True), *kinds]


def _truncated(base: str, layers: int, options: argparse.Namespace) -> Kind:
    name = f"{layers}L truncated"
    return Kind(name, base, layers, once=name in options.once)


def _recipe(kind: Kind, seed: int, biggest: bool, options: argparse.Namespace) -> Recipe:
    """Return how to train a member; small ones learn at higher rates than the biggest."""
    epochs, rate = options.epochs or EPOCHS[options.task], options.big_learning_rate
    interval = 4 if epochs <= 2 else 1
    if not biggest:
        layers = (
            kind.layers or transformers.AutoConfig.from_pretrained(kind.base, trust_remote_code=False).num_hidden_layers
        )
        epochs, rate = epochs * options.longer, options.learning_rate * (1 if layers > 3 else 2)
    return Recipe(
        epochs=epochs,
        learning_rate=rate,
        batch_size=options.batch_size,
        max_length=options.max_length,
        warmup_ratio=0.06,
        evaluations_per_epoch=interval,
        seed=0 if kind.once else seed,
        bf16=options.bf16,
    )


def _trained(
    kinds: Sequence[Kind], data: TaskData, work: Path, seed: int, options: argparse.Namespace
) -> dict[str, Path]:
    """Train what is not there yet; return the folders by kind."""
    folders: dict[str, Path] = {}
    for kind in kinds:
        folders[kind.name] = folder = work / kind.folder(seed)
        recipe = _recipe(kind, seed, kind is kinds[0], options)
        if folder.exists():
            if json.loads((folder / RECORD).read_text("utf-8"))["recipe"] != asdict(recipe):
                raise InputError(f"{folder} was trained with another recipe; delete it, or choose another --work")
            continue
        objective = Objective(
            difficulty=_difficulty(kind, data, work, replace(recipe, seed=0), options) if kind.dar else None,
            teacher=_logits(folders[kinds[0].name], data, data.train, "train", work) if kind.teacher else None,
            distill_weight=options.distill_weight,
            temperature=options.temperature,
        )
        tokenizer = options.tokenizer if kind is kinds[0] else None
        finetune(kind.base, data, folder, layers=kind.layers, tokenizer=tokenizer, recipe=recipe, objective=objective)
    return folders


def _difficulty(kind: Kind, data: TaskData, work: Path, recipe: Recipe, options: argparse.Namespace) -> list[int]:
    """Return the difficulty of the training examples for a member's architecture, labelled once for all seeds."""
    labels = work / "difficulty"
    if not labels.exists():
        recipe = replace(recipe, epochs=recipe.epochs * options.label_epochs)
        splits = Splits(options.folds, options.label_seeds)
        label_difficulty(kind.base, data, labels, layers=kind.layers, recipe=recipe, splits=splits)
    return read_difficulty(labels, data.train)


def _logits(folder: Path, data: TaskData, examples: Examples, part: str, work: Path) -> NDArray[np.float32]:
    """Return a member's logits for a part, kept under `work`."""
    kept = work / f"logits-{folder.name}-{part}.npy"
    if not kept.exists():
        recipe = json.loads((folder / RECORD).read_text("utf-8"))["recipe"]
        learnt_from = recipe["bf16"] and part == "train"
        logits = logits_of(str(folder), data, examples, recipe["max_length"], bf16=learnt_from)
        np.save(part_file := kept.with_suffix(".part.npy"), logits)
        part_file.rename(kept)
    return np.asarray(np.load(kept))


def _confidences(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    task = SingleLabel()
    return task.confidence(task.probabilities(logits))


def _figures(kinds: Sequence[Kind], folders: Mapping[str, Path], parts: Parts, work: Path) -> dict[str, Any]:
    """Return the figures of each member alone, and of cascades of a small member, or several, and the biggest."""
    validation, tuning, seen = (
        {name: _logits(folder, parts.data, examples, part, work) for name, folder in folders.items()}
        for part, examples in (
            ("validation", parts.data.validation),
            ("tuning", parts.tuning),
            ("reported", parts.reported),
        )
    )
    layers = {
        name: int(json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"])
        for name, folder in folders.items()
    }
    big, *small = folders
    labels = np.array(parts.reported.labels)
    lengths = np.ones(len(labels), dtype=np.intp)  # FLOPs are not reported here
    deployed = [kind.name for kind in _deployed(kinds)]
    cascades = [[name, big] for name in small] + ([deployed] if len(deployed) > 2 else [])
    found: dict[str, Any] = {"layers": layers, "alone": {}, "cascades": {}, "curves": {}}
    for names in cascades:
        members = [MemberEntry(name, "", "", layers[name], 1, 1, "fp32", None) for name in names]
        logits = np.stack([seen[name] for name in names])
        # A tau for a speed-up needs no labels, so the texts that chose the checkpoints serve too.
        sure = [_confidences(np.concatenate([validation[name], tuning[name]])) for name in names]
        for speedup in SPEEDUPS:
            if speedup > members[-1].layers / members[0].layers:
                continue
            taus = [threshold_for_speedup(members, np.stack(sure), speedup)] * (len(members) - 1)
            rule = MaximumProbability(tuple(taus))
            row = evaluate(members, rule, logits, labels, lengths).to_json()
            found["alone"] |= {member["name"]: member for member in row["members"]}
            found["cascades"].setdefault(" + ".join(names), {})[f"{speedup:g}"] = row["cascade"]
            if OUT_OF_SCOPE in parts.data.labels:
                left_at = replay(rule, np.stack([_confidences(seen[name]) for name in names]))
                chosen = logits.argmax(axis=-1)[left_at, np.arange(len(labels))]
                row["cascade"] |= _scope(chosen, labels, parts.data.labels.index(OUT_OF_SCOPE))
        if not any(kind.for_comparison for kind in kinds if kind.name in names):
            found["curves"][" + ".join(names)] = speedup_curve(members, _TASK.probabilities(logits), labels)
    for name, figures in found["alone"].items():
        temperature = fit_temperature(validation[name].astype(np.float64), np.array(parts.data.validation.labels))
        scaled = _TASK.probabilities(seen[name] / temperature)
        figures["temperature"] = temperature
        figures["ece_scaled"] = ece(scaled.argmax(axis=-1) == labels, _TASK.confidence(scaled))
        if OUT_OF_SCOPE in parts.data.labels:
            figures.update(_scope(scaled.argmax(axis=-1), labels, parts.data.labels.index(OUT_OF_SCOPE)))
    return found


def _scope(chosen: NDArray[np.intp], labels: NDArray[np.intp], outside: int) -> dict[str, float]:
    """Return the accuracy on texts in scope, and recall and precision of the class for those that are not."""
    right = chosen == labels
    return {
        "in_scope": float(right[labels != outside].mean()),
        "out_of_scope_recall": float(right[labels == outside].mean()),
        "out_of_scope_precision": float(right[chosen == outside].mean()),
    }


def _deployed(kinds: Sequence[Kind]) -> list[Kind]:
    """Return the members that are deployed, small to big: complete ones, or truncated ones where there is no other."""
    small = [kind for kind in reversed(kinds[1:]) if not kind.for_comparison]
    return ([kind for kind in small if kind.layers is None] or small) + [kinds[0]]


def _exported(folders: Sequence[Path], parts: Parts, model_dir: Path, precision: str) -> dict[str, Any]:
    """Export members, and measure on the clock: each alone, and the cascade at each speed-up, by layers and latency."""
    if not (model_dir / MANIFEST).is_file():
        check = Check(max_accuracy_drop=100, calibrate=True)
        export_bundle([str(folder) for folder in folders], model_dir, precision=precision, check=check)
    runtime = open_whole(model_dir, preload=True)
    names = [member.name for member in runtime.bundle.members]
    tuning = _collected(runtime, parts.tuning)
    both = _collected(runtime, joined(parts.data.validation, parts.tuning))
    ways: dict[str, CascadeRuntime] = {name: runtime.with_members([name]) for name in names}
    for cost in ("layers", "latency"):
        for speedup in SPEEDUPS:
            try:
                chosen = tune(runtime.bundle, both, Question(speedup=speedup, cost=cost)).chosen
            except InvalidOption:
                continue
            if chosen is not None:
                way = runtime.with_members(chosen.members).with_thresholds(chosen.thresholds)
                ways[f"{speedup:g}x by {cost}"] = way
    found: dict[str, Any] = {"members": [_member(member) for member in runtime.bundle.members]}
    if parts.certification is not None:
        other = _collected(runtime, parts.certification)
        question = Question(max_drop=MAX_DROP, confidence=CONFIDENCE, cost="latency")
        report = tune(runtime.bundle, tuning, question, held_out=other)
        if report.chosen is not None:
            way = runtime.with_members(report.chosen.members).with_thresholds(report.chosen.thresholds)
            ways[f"guaranteed, {100 * MAX_DROP:g} point"] = way
        found["guarantee"] = asdict(report.guarantee) if report.guarantee else None
    found["ways"] = _raced(ways, names[-1], parts.reported)
    return found


def _collected(runtime: CascadeRuntime, examples: Examples) -> Collected:
    return collect(runtime, examples.texts, np.array(examples.labels), cache=None)


def _member(member: MemberEntry) -> dict[str, Any]:
    return {"name": member.name, "layers": member.layers, "parameters": member.parameters, **member.other}


def _raced(ways: Mapping[str, CascadeRuntime], big: str, reported: Examples) -> dict[str, Any]:
    """Return accuracy, layers and milliseconds of each way, text by text and in bulk, all in turn."""
    labels = np.array(reported.labels)
    rows = np.random.default_rng(0).permutation(len(labels))[:TIMED_IN_BULK]
    answers = {way: runtime.predict(reported.texts) for way, runtime in ways.items()}
    times = race(ways, big, [reported.texts[row] for row in rows], TIMED, ROUNDS)
    names = ways[big].bundle.labels
    return {
        way: {
            "members": [member.name for member in ways[way].bundle.members],
            "thresholds": list(ways[way].thresholds),
            "accuracy": float(np.mean([names.index(answer.label) for answer in answers[way]] == labels)),
            "layers": float(np.mean([answer.layers for answer in answers[way]])),
            **times[way],
        }
        for way in ways
    }


def _show(report: Mapping[str, Any]) -> None:
    metric, seeds = report["metric"], report["seeds"]

    def over(values: Sequence[float | None]) -> str:
        known = [100 * value for value in values if value is not None]
        spread = f" +- {np.std(known):4.2f}" if len(set(known)) > 1 else ""
        return f"{np.mean(known):6.2f}{spread}" if known else "     -"

    print(f"\n{report['task']}, {report['rows']}, {len(seeds)} seed(s), {metric}, DIS, ECE, ECE scaled, in %")
    if "in_scope" in next(iter(seeds[0]["alone"].values())):
        print("then accuracy in scope, recall and precision out of scope; of cascades, recall")
    for name in seeds[0]["alone"]:
        rows = [seed["alone"][name] for seed in seeds]
        scope = [key for key in ("in_scope", "out_of_scope_recall", "out_of_scope_precision") if key in rows[0]]
        columns = [over([row[key] for row in rows]) for key in (metric, "dis", "ece", "ece_scaled", *scope)]
        print(f"{name:30} " + "  ".join(columns))
    for name, speedups in seeds[0]["cascades"].items():
        for speedup in speedups:
            rows = [seed["cascades"][name][speedup] for seed in seeds]
            reached = np.mean([row["layer_speedup"] for row in rows])
            keys = [key for key in (metric, "out_of_scope_recall") if key in rows[0]]
            columns = [over([row[key] for row in rows]) for key in keys]
            print(f"{name:22} {speedup}x ({reached:4.2f}) " + "  ".join(columns))


def _show_exported(precision: str, found: Mapping[str, Any]) -> None:
    for way, row in found["ways"].items():
        print(
            f"{precision} {way:20} {100 * row['accuracy']:6.2f}  layers {row['layers']:5.2f}  single "
            f"{row['single_ms']['median']:6.2f} ms {row['single_speedup']['median']:5.2f}x  bulk "
            f"{row['bulk_ms']['median']:6.2f} ms {row['bulk_speedup']['median']:5.2f}x  {' + '.join(row['members'])}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, "results")
    add = parser.add_argument
    add("--base", action="append", required=True, metavar="NAME=DIR", help="encoder of a member, the biggest first")
    add("--truncated", type=int, action="append", default=[], metavar="K", help="also the biggest's first K layers")
    add("--plain", action="store_true", help="the smallest members on labels alone too")
    add("--dar", action="store_true", help="the smallest complete member with DAR too")
    add("--tokenizer", metavar="DIR", help="align the biggest base to this tokenizer")
    add("--seeds", type=int, default=3, help="members of each kind; the biggest is trained once")
    add("--once", action="append", default=[], metavar="NAME", help="also train this one once")
    add("--folds", type=int, default=8, help="of the difficulty labels")
    add("--label-seeds", type=int, default=5)
    add("--label-epochs", type=float, default=1.0, help="of a fold, times those of the member")
    add("--epochs", type=float, help="of the biggest member (default: by task)")
    add("--longer", type=float, default=1.0, help="epochs of the others, times those of the biggest")
    add("--learning-rate", type=float, default=1e-4, help="of the others; twice as much up to 3 layers")
    add("--no-exported", dest="exported", action="store_false", help="train and measure in torch alone")
    return parser


if __name__ == "__main__":
    run_command(main)
