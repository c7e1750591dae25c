"""A member of zero layers in front of others, on a real task: averaging networks of several seeds, tuned and timed.

    python benchmarks/zero_layers.py --task banking77 --data DATA/banking77 --member 12L=DIR --member 3L=DIR

The members are fine-tuned already, by results.py for instance. Networks learn labels, and with --distill-weight the
biggest member's answers, with --augment to variants of the training texts too. Each seed's bundle is in int8.
Thresholds come from the tuning and certification parts, those of a guarantee from the tuning part alone; tasks without
a certification part take the validation part, on which checkpoints look too good. Figures are of the reported part,
which is used for nothing else. All ways to run a seed's bundle are timed in turn. It resumes: networks and bundles lie
under --work.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import transformers
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.averaging import Network
from cascade_train.averaging_training import AveragingRecipe, train_averaging
from cascade_train.finetune import LABELS_ALONE, Objective, logits_of
from cascade_train.tasks import Examples, TaskData
from cascade_train.unlabelled import variants, with_answers, with_unlabelled
from common import RESULTS, TASKS, Parts, joined, named_folders, race, read_parts, run_command
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.turns import batch_by_batch, in_turns
from cascade_rt.bundle import MANIFEST, read_bundle, write_bundle, write_manifest
from cascade_rt.engine.cost import ratio
from cascade_rt.errors import InputError, InvalidOption
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import Collected, collect, open_whole
from cascade_rt.tuning.metrics import f1
from cascade_rt.tuning.report import Question
from cascade_rt.tuning.tune import tune

DAN = "DAN"
MAX_DROPS = (0.003, 0.005, 0.01)
SPEEDUPS = (5.0,)  # by FLOPs
CONFIDENCE, CERTIFIED_DROP = 0.95, 0.01
OUT_OF_SCOPE = "oos"
NEGATIONS = {"not", "no", "never", "n't", "nor", "neither", "without", "nothing", "hardly", "cannot"}
TIMED, TIMED_IN_BULK, ROUNDS = 100, 500, 3  # texts, texts, rounds


def main() -> None:
    """Train, tune, measure, print and write the report."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    if options.augment and not options.distill_weight:
        raise InputError("--augment requires --distill-weight: variants have no labels")
    parts = read_parts(options.task, options.data)
    work: Path = options.work or Path("runs") / "zero-layers" / options.task
    work.mkdir(parents=True, exist_ok=True)
    named = dict(named_folders("member", options.member))
    big = next(iter(named))
    taught = _taught(parts.data, named[big], work, options)
    report = parts.described() | {
        "members": {
            name: json.loads((Path(folder) / RECORD).read_text("utf-8"))["recipe"] for name, folder in named.items()
        },
        "augment": options.augment,
        "distillation": {"weight": options.distill_weight, "temperature": options.temperature},
        "seeds": [],
    }
    output: Path = options.output or RESULTS / f"zero-layers-{options.task}.json"
    for seed in range(options.seeds):
        network = _network(taught, named[big], work, seed, options)
        bundle = _bundle(network, list(named.values()), work / f"bundle-{seed}", work / "bundle-0")
        report["network"] = json.loads((network / RECORD).read_text("utf-8"))["network"]
        report["seeds"].append(_measured(bundle, parts, timed=seed == 0))
        write_json(output, report)
    _show(report)
    print(f"written: {output}")


def _taught(data: TaskData, teacher: str, work: Path, options: argparse.Namespace) -> tuple[TaskData, Objective]:
    """Return the data that networks learn, variants of training texts included, and how: with the teacher's answers."""
    if not options.distill_weight:
        return data, LABELS_ALONE
    known = {*data.train.texts, *data.validation.texts}
    more = [text for text in variants(data.train.texts, options.augment, 0) if text not in known]
    labelled, data = len(data.train), with_unlabelled(data, more)
    kept = work / f"answers-{options.augment}.npy"
    if not kept.exists():
        length = json.loads((Path(teacher) / RECORD).read_text("utf-8"))["recipe"]["max_length"]
        np.save(part := kept.with_suffix(".part.npy"), logits_of(teacher, data, data.train, length))
        part.rename(kept)
    answers = np.load(kept)
    objective = Objective(teacher=answers, temperature=options.temperature, distill_weight=options.distill_weight)
    return with_answers(data, answers, labelled), objective


def _network(
    taught: tuple[TaskData, Objective], teacher: str, work: Path, seed: int, options: argparse.Namespace
) -> Path:
    """Train the network of a seed, if it is not there; return its folder."""
    data, objective = taught
    folder = work / f"{DAN}-{seed}" / DAN
    if not folder.exists():
        length = json.loads((Path(teacher) / RECORD).read_text("utf-8"))["recipe"]["max_length"]
        folder.parent.mkdir(exist_ok=True)
        train_averaging(
            data,
            folder,
            tokenizer=teacher,
            unigrams=options.unigrams or teacher,
            network=Network(ngrams=options.ngrams, buckets=options.buckets, dimension=options.dimension),
            recipe=AveragingRecipe(epochs=options.epochs, max_length=length, seed=seed),
            objective=objective,
        )
    return folder


def _bundle(network: Path, others: Sequence[str], folder: Path, first: Path) -> Path:
    """Export the bundle of a seed, if it is not there: the first with all members, the others with its other ones."""
    if (folder / MANIFEST).is_file():
        return folder
    check = Check(max_accuracy_drop=100, calibrate=True)
    if folder == first:
        export_bundle([str(network), *others], folder, precision="int8", check=check)
        return folder
    with TemporaryDirectory(prefix="zero-layers-") as work, write_bundle(folder) as target:
        alone = export_bundle([str(network)], Path(work) / "alone", precision="int8", check=check)
        shutil.copytree(first, target, dirs_exist_ok=True)
        for file in alone.members[0].files(Path(work) / "alone" / alone.members[0].file):
            shutil.copyfile(file, target / file.name)
        bundle = read_bundle(first)
        entry = replace(alone.members[0], threshold=bundle.members[0].threshold)
        write_manifest(target, replace(bundle, members=(entry, *bundle.members[1:])))
    return folder


def _measured(bundle: Path, parts: Parts, *, timed: bool) -> dict[str, Any]:
    """Return the figures of one seed: members alone, and cascades, tuned and on the clock."""
    whole = open_whole(bundle, preload=True)
    names = [member.name for member in whole.bundle.members]
    big, middle = names[-1], names[1:-1]
    chains = {name: [name] for name in names} | {
        " + ".join(chain): chain
        for chain in (
            [DAN, big],
            *([DAN, one, big] for one in middle),
            *([one, big] for one in middle),
            *([names] if len(middle) > 1 else []),
        )
    }
    ways: dict[str, CascadeRuntime] = {}
    found: dict[str, Any] = {"members": [_facts(member) for member in whole.bundle.members], "ways": {}, "tuned": {}}
    seen = joined(parts.tuning, parts.certification or parts.data.validation)
    for chain, members in chains.items():
        runtime = whole.with_members(members)
        if len(members) == 1:
            ways[chain] = runtime
            continue
        data = _collected(runtime, seen)
        for question in _questions():
            try:
                chosen = tune(runtime.bundle, data, question).chosen
            except InvalidOption:  # no member of this cascade is so fast
                continue
            if chosen is not None:
                name = f"{chain}, {_asked(question)}"
                ways[name] = runtime.with_members(chosen.members).with_thresholds(chosen.thresholds)
                found["tuned"][name] = asdict(chosen)
    if parts.certification is not None:
        question = Question(max_drop=CERTIFIED_DROP, confidence=CONFIDENCE, cost="flops")
        tuning, held_out = (_collected(whole, part) for part in (parts.tuning, parts.certification))
        tuned = tune(whole.bundle, tuning, question, held_out=held_out)
        found["guarantee"] = {"verdict": tuned.verdict, **(asdict(tuned.guarantee) if tuned.guarantee else {})}
        if tuned.chosen is not None:
            way = whole.with_members(tuned.chosen.members).with_thresholds(tuned.chosen.thresholds)
            ways[f"guaranteed, {100 * CERTIFIED_DROP:g} point"] = way
    found["ways"] = _answered(ways, big, parts)
    if timed:
        found["times"] = _timed(ways, big, parts.reported)
    return found


def _questions() -> list[Question]:
    drops = [Question(max_drop=drop, cost="flops") for drop in MAX_DROPS]
    return drops + [Question(speedup=speedup, cost="flops") for speedup in SPEEDUPS]


def _asked(question: Question) -> str:
    return f"{question.speedup:g}x" if question.speedup else f"-{100 * (question.max_drop or 0):g}"


def _collected(runtime: CascadeRuntime, examples: Examples) -> Collected:
    return collect(runtime, examples.texts, np.array(examples.labels), cache=None)


def _facts(member: Any) -> dict[str, Any]:
    return {"name": member.name, "layers": member.layers, "precision": member.precision, **member.other}


def _timed(ways: Mapping[str, CascadeRuntime], big: str, reported: Examples) -> dict[str, Any]:
    """Return milliseconds and speed-ups of each way, in turn; of single texts quantiles too."""
    drawn = np.random.default_rng(0).permutation(len(reported))[:TIMED_IN_BULK]
    texts = [reported.texts[row] for row in drawn]
    found: dict[str, Any] = dict(race(ways, big, texts, TIMED, ROUNDS))
    contestants = {way: batch_by_batch(runtime) for way, runtime in ways.items()}
    each = in_turns(contestants, [[[text]] for text in texts[:TIMED]], ROUNDS)
    for way, own in each.items():
        times = 1000 * np.median(own.seconds, axis=0)
        found[way] |= {"single_p50_ms": float(np.median(times)), "single_p95_ms": float(np.quantile(times, 0.95))}
    return found


def _answered(ways: Mapping[str, CascadeRuntime], big: str, parts: Parts) -> dict[str, Any]:
    """Return accuracy, exits and FLOPs of each way on the reported texts."""
    reported = parts.reported
    labels, names = np.array(reported.labels), ways[big].bundle.labels
    lengths = ways[big].member_logits(reported.texts)[1]
    whole = float(ways[big].bundle.members[-1].cost(lengths).sum())
    rows = {}
    for way, runtime in ways.items():
        predictions = runtime.predict(reported.texts)
        exits = np.array([answer.exit for answer in predictions])
        answers = np.array([names.index(answer.label) for answer in predictions])
        costs = np.cumsum([member.cost(lengths) for member in runtime.bundle.members], axis=0)
        rows[way] = {
            "members": [member.name for member in runtime.bundle.members],
            "thresholds": list(runtime.thresholds),
            "exits": np.bincount(exits, minlength=len(runtime.bundle.members)).tolist(),
            "accuracy": float(np.mean(answers == labels)),
            "flops_speedup": ratio(whole, float(costs[exits, np.arange(len(exits))].sum())),
            **_slices(answers, labels, names, parts),
        }
    return rows


def _slices(answers: NDArray[np.intp], labels: NDArray[np.intp], names: Sequence[str], parts: Parts) -> dict[str, Any]:
    """Return what averages hide: texts out of scope, and texts with a negation."""
    found: dict[str, Any] = {}
    if parts.data.metric == "f1":
        found["f1"] = f1(labels, answers, len(names))
    if OUT_OF_SCOPE in names:
        outside = names.index(OUT_OF_SCOPE)
        found["out_of_scope_recall"] = float(np.mean(answers[labels == outside] == outside))
        found["in_scope"] = float(np.mean((answers == labels)[labels != outside]))
    if parts.data.name == "sst-2":
        negated = np.array([bool(NEGATIONS & set(str(text).split())) for text in parts.reported.texts])
        found["negation"] = float(np.mean((answers == labels)[negated]))
        found["negation_texts"] = int(negated.sum())
    return found


def _show(report: Mapping[str, Any]) -> None:
    seeds, times = report["seeds"], report["seeds"][0]["times"]
    print(f"\n{report['task']}, {report['rows']}, {len(seeds)} seed(s); accuracy in %, the rest of the first seed")
    for way, row in seeds[0]["ways"].items():
        rows = [seed["ways"][way] for seed in seeds if way in seed["ways"]]
        accuracies = [100 * each["accuracy"] for each in rows]
        keys = [key for key in ("f1", "out_of_scope_recall", "negation") if key in row]
        more = "".join(f"  {key} {100 * np.mean([each[key] for each in rows]):.1f}" for key in keys)
        own = times[way]
        shown = "  ".join(
            f"{kind} {own[f'{kind}_ms']['median']:6.3f} ms {own[f'{kind}_speedup']['median']:6.2f}x"
            for kind in ("single", "bulk")
        )
        print(
            f"{way:27} {np.mean(accuracies):6.2f} +- {np.std(accuracies):4.2f} flops {row['flops_speedup'] or 0:7.1f}x "
            f"{shown}  p50 {own['single_p50_ms']:6.3f}  {row['exits']}{more}"
        )
    if "guarantee" in seeds[0]:
        print(f"guarantee: {seeds[0]['guarantee']['verdict']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--data", type=Path, required=True, help="folder with the task's files")
    add("--member", action="append", required=True, metavar="NAME=DIR", help="a fine-tuned member, the biggest first")
    add("--seeds", type=int, default=3, help="networks")
    add("--epochs", type=float, default=20)
    add("--ngrams", type=int, default=2)
    add("--buckets", type=int, default=131_072)
    add("--dimension", type=int, default=128)
    add("--distill-weight", type=float, default=0.0, help="weight of the biggest member's answers in the loss")
    add("--temperature", type=float, default=1.0, help="temperature of these answers")
    add("--augment", type=int, default=0, help="with --distill-weight: variants of each training text to learn from")
    add("--unigrams", metavar="DIR", help="encoder that the tokens start from (default: the biggest member)")
    add("--work", type=Path, help="networks and bundles (default: runs/zero-layers/TASK)")
    add("--output", type=Path, help="default: results/zero-layers-TASK.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
