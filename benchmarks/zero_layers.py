"""A member of zero layers in front of others, on a real task: averaging networks of several seeds, tuned and timed.

    python benchmarks/zero_layers.py --task banking77 --data DATA/banking77 --member 12L=DIR --member 3L=DIR

The members are fine-tuned already, by results.py for instance, and the biggest one teaches the networks. Each seed's
bundle is in int8. Thresholds come from the validation and tuning parts; figures are of the reported part, which is used
for nothing else. All ways to run a seed's bundle are timed in turn. It resumes: networks and bundles lie under --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.averaging import Network
from cascade_train.averaging_training import AveragingRecipe, train_averaging
from cascade_train.finetune import Objective, logits_of
from cascade_train.tasks import Examples, TaskData
from cascade_train.unlabelled import variants, with_answers, with_unlabelled
from common import RESULTS, TASKS, Parts, joined, race, read_parts, run_command
from numpy.typing import NDArray

from cascade_rt import CascadeRuntime
from cascade_rt.bundle import MANIFEST
from cascade_rt.engine.cost import ratio
from cascade_rt.errors import InputError
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import Collected, collect, open_whole
from cascade_rt.tuning.metrics import f1
from cascade_rt.tuning.report import Question
from cascade_rt.tuning.tune import tune

DAN = "DAN"
MAX_DROPS = (0.0, 0.003, 0.005, 0.01)
SPEEDUPS = (5.0, 10.0)  # by FLOPs
CONFIDENCE, CERTIFIED_DROP = 0.95, 0.01
OUT_OF_SCOPE = "oos"
NEGATIONS = {"not", "no", "never", "n't", "nor", "neither", "without", "nothing", "hardly", "cannot"}
TIMED, TIMED_IN_BULK, ROUNDS = 200, 1000, 3  # texts, texts, rounds


def main() -> None:
    """Train, tune, measure, print and write the report."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    parts = read_parts(options.task, options.data)
    work: Path = options.work or Path("runs") / "zero-layers" / options.task
    work.mkdir(parents=True, exist_ok=True)
    named = dict(member.partition("=")[::2] for member in options.member)
    if not all(name and folder for name, folder in named.items()):
        raise InputError(f"found --member {' '.join(options.member)}, expected NAME=DIR, the biggest first")
    big = next(iter(named))
    taught = _taught(parts.data, named[big], work, options.augment)
    report = parts.described() | {
        "members": {
            name: json.loads((Path(folder) / RECORD).read_text("utf-8"))["recipe"] for name, folder in named.items()
        },
        "augment": options.augment,
        "seeds": [],
    }
    output: Path = options.output or RESULTS / f"zero-layers-{options.task}.json"
    for seed in range(options.seeds):
        network = _network(taught, named[big], work, seed, options)
        bundle = _bundle([str(network), *reversed(list(named.values()))], work / f"bundle-{seed}")
        report["network"] = json.loads((network / RECORD).read_text("utf-8"))["network"]
        report["seeds"].append(_measured(bundle, parts, options.threads))
        write_json(output, report)
    _show(report)
    print(f"written: {output}")


def _taught(data: TaskData, teacher: str, work: Path, augment: int) -> tuple[TaskData, NDArray[np.float32]]:
    """Return the data that networks learn, variants of training texts included, and the teacher's answers to them."""
    known = {*data.train.texts, *data.validation.texts}
    more = [text for text in variants(data.train.texts, augment, 0) if text not in known]
    labelled, data = len(data.train), with_unlabelled(data, more)
    kept = work / f"answers-{augment}.npy"
    if not kept.exists():
        length = json.loads((Path(teacher) / RECORD).read_text("utf-8"))["recipe"]["max_length"]
        np.save(part := kept.with_suffix(".part.npy"), logits_of(teacher, data, data.train, length))
        part.rename(kept)
    answers = np.load(kept)
    return with_answers(data, answers, labelled), answers


def _network(
    taught: tuple[TaskData, NDArray[np.float32]], teacher: str, work: Path, seed: int, options: argparse.Namespace
) -> Path:
    """Train the network of a seed, if it is not there; return its folder."""
    data, answers = taught
    folder = work / f"{DAN}-{seed}" / DAN
    if not folder.exists():
        length = json.loads((Path(teacher) / RECORD).read_text("utf-8"))["recipe"]["max_length"]
        folder.parent.mkdir(exist_ok=True)
        train_averaging(
            data,
            folder,
            tokenizer=teacher,
            unigrams=teacher,
            network=Network(ngrams=options.ngrams, buckets=options.buckets, dimension=options.dimension),
            recipe=AveragingRecipe(epochs=options.epochs, max_length=length, seed=seed),
            objective=Objective(teacher=answers, distill_weight=options.distill_weight, temperature=3.0),
        )
    return folder


def _bundle(sources: Sequence[str], folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        export_bundle(sources, folder, precision="int8", check=Check(max_accuracy_drop=100, calibrate=True))
    return folder


def _measured(bundle: Path, parts: Parts, threads: int | None) -> dict[str, Any]:
    """Return the figures of one seed: members alone, and cascades, tuned and on the clock."""
    whole = open_whole(bundle, preload=True, threads=threads)
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
    seen = joined(parts.data.validation, parts.tuning)
    for chain, members in chains.items():
        runtime = whole.with_members(members)
        if len(members) == 1:
            ways[chain] = runtime
            continue
        data = _collected(runtime, seen)
        for question in _questions():
            chosen = tune(runtime.bundle, data, question).chosen
            if chosen is not None:
                name = f"{chain}, {_asked(question)}"
                ways[name] = runtime.with_members(chosen.members).with_thresholds(chosen.thresholds)
                found["tuned"][name] = asdict(chosen)
    if parts.certification is not None:
        question = Question(max_drop=CERTIFIED_DROP, confidence=CONFIDENCE, cost="flops")
        tuned = tune(whole.bundle, _collected(whole, seen), question, held_out=_collected(whole, parts.certification))
        found["guarantee"] = {"verdict": tuned.verdict, **(asdict(tuned.guarantee) if tuned.guarantee else {})}
        if tuned.chosen is not None:
            way = whole.with_members(tuned.chosen.members).with_thresholds(tuned.chosen.thresholds)
            ways[f"guaranteed, {100 * CERTIFIED_DROP:g} point"] = way
    found["ways"] = _raced(ways, big, parts)
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


def _raced(ways: Mapping[str, CascadeRuntime], big: str, parts: Parts) -> dict[str, Any]:
    """Return accuracy, FLOPs and milliseconds of each way on the reported texts; all are timed in turn."""
    reported = parts.reported
    labels = np.array(reported.labels)
    names = ways[big].bundle.labels
    drawn = np.random.default_rng(0).permutation(len(labels))[:TIMED_IN_BULK]
    times = race(ways, big, [reported.texts[row] for row in drawn], TIMED, ROUNDS)
    lengths = ways[big].member_logits(reported.texts)[1]
    right = {
        way: np.array([names.index(answer.label) for answer in runtime.predict(reported.texts)])
        for way, runtime in ways.items()
    }
    whole = float(ways[big].bundle.members[-1].cost(lengths).sum())
    rows = {}
    for way, runtime in ways.items():
        exits = np.array([answer.exit for answer in runtime.predict(reported.texts)])
        costs = np.cumsum([member.cost(lengths) for member in runtime.bundle.members], axis=0)
        rows[way] = {
            "members": [member.name for member in runtime.bundle.members],
            "thresholds": list(runtime.thresholds),
            "exits": np.bincount(exits, minlength=len(runtime.bundle.members)).tolist(),
            "accuracy": float(np.mean(right[way] == labels)),
            "flops_speedup": ratio(whole, float(costs[exits, np.arange(len(exits))].sum())),
            **_slices(right[way], labels, names, parts),
            **times[way],
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
    seeds = report["seeds"]
    print(f"\n{report['task']}, {report['rows']}, {len(seeds)} seed(s); accuracy in %, speed-ups over {DAN}'s teacher")
    for way in seeds[0]["ways"]:
        rows = [seed["ways"][way] for seed in seeds if way in seed["ways"]]
        columns = [100 * row["accuracy"] for row in rows]
        speedups = [[row[key]["median"] for row in rows] for key in ("single_speedup", "bulk_speedup")]
        flops = [row["flops_speedup"] for row in rows if row["flops_speedup"]]
        more = "".join(
            f"  {key} {100 * np.mean([row[key] for row in rows]):.1f}"
            for key in ("f1", "out_of_scope_recall", "negation")
            if key in rows[0]
        )
        print(
            f"{way:30} {np.mean(columns):6.2f} +- {np.std(columns):4.2f}  flops {np.mean(flops):8.2f}x  single "
            f"{np.mean(speedups[0]):6.2f}x  bulk {np.mean(speedups[1]):6.2f}x  exits {rows[0]['exits']}{more}"
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
    add("--augment", type=int, default=0, help="variants of each training text, answered by the biggest member")
    add("--distill-weight", type=float, default=0.9)
    add("--threads", type=int, help="threads of each member (default: all)")
    add("--work", type=Path, help="networks and bundles (default: runs/zero-layers/TASK)")
    add("--output", type=Path, help="default: results/zero-layers-TASK.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
