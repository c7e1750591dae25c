"""Shared by the benchmark scripts: tasks in parts that do not overlap, timing in turn, and how a script ends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cascade_train.tasks import GLUE, Examples, TaskData, hold_out, load_evaluation, load_file, load_task, reserve

from cascade_rt import CascadeError, CascadeRuntime, InputError
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import batch_by_batch, in_turns
from cascade_rt.benchmark.workload import Spread, spread
from cascade_rt.io.readers import Reading, read_examples
from cascade_rt.types import Text, Trace

TASKS = ("sst-2", "rte", "mrpc", "sick", "banking77", "clinc150")
RESULTS = Path(__file__).parent / "results"
INK = "#808080"  # of lines and words in pictures: seen on light and on dark pages

Way = TypeVar("Way", bound=Hashable)

_RESERVED = 0.05  # for each part: checkpoints are chosen by one, thresholds by the next, and one certifies
_SMALL = 6000  # training examples; with fewer, no part certifies


@dataclass(frozen=True)
class Parts:
    """A task in parts that do not overlap."""

    data: TaskData
    """Training texts, and validation texts, which choose checkpoints."""
    tuning: Examples
    """For thresholds."""
    certification: Examples | None
    """For guarantees; None where the task is too small."""
    reported: Examples
    """For figures alone."""
    reported_on: str

    def described(self) -> dict[str, Any]:
        """Return how a report begins: the machine, the task, and the number of examples in each part."""
        rows = {
            "train": len(self.data.train),
            "validation": len(self.data.validation),
            "tuning": len(self.tuning),
            "certification": len(self.certification or ()),
            "reported": len(self.reported),
        }
        return {
            "machine": describe(),
            "task": self.data.name,
            "metric": self.data.metric,
            "rows": rows,
            "reported_on": self.reported_on,
        }


def read_parts(task: str, folder: Path) -> Parts:
    """Return a task in parts."""
    data, reported, name = read_task(task, folder)
    if len(data.train) >= _SMALL:
        return Parts(*reserve(data, _RESERVED, 0), reported, name)
    kept, one, other = reserve(data, _RESERVED / 2, 0)
    return Parts(kept, joined(one, other), None, reported, name)


def read_task(task: str, folder: Path) -> tuple[TaskData, Examples, str]:
    """Return the data to train on, the part to report on, and its name: dev, or a part of the training file."""
    if task == "sick":
        train, trial = (_sick(folder / file) for file in ("SICK_train.txt", "SICK_trial.txt"))
        return (*_held_out(task, train, trial, pair=True), "trial")
    if task == "clinc150":
        parts = json.loads((folder / "train_val.json").read_text("utf-8"))
        train, val = ([*parts[part], *parts[f"oos_{part}"]] for part in ("train", "val"))
        return (*_held_out(task, train, val, pair=False), "val, with oos_val")
    if task == "banking77":
        data, share = load_file(folder / "train.csv", reading=Reading(label_column="category")), 0.15
        data = replace(data, name=task)
    else:
        data, share = load_task(task, folder), 0.15
        if any((folder / file).is_file() for files in GLUE[task].dev.values() for file in files):
            return data, next(iter(load_evaluation(task, folder).values())), "dev"
    kept, reported = hold_out(data.train, share, 1, nested=data.nested)
    return replace(data, train=kept), reported, f"{share:.0%} of the training file: there is no dev file"


def _sick(file: Path) -> list[tuple[Text, str]]:
    rows = read_examples(file, Reading("tsv", ("sentence_A", "sentence_B")), pair=True)
    return [(row.text, row.field("entailment_judgment").lower()) for row in rows]


def _held_out(
    task: str, train: Iterable[tuple[Text, str]], reported: Iterable[tuple[Text, str]], *, pair: bool
) -> tuple[TaskData, Examples]:
    names = tuple(sorted({label for _, label in train}))

    def indexed(rows: Iterable[tuple[Text, str]]) -> Examples:
        return Examples([text for text, _ in rows], [names.index(label) for _, label in rows])

    return TaskData(task, names, pair, "accuracy", *hold_out(indexed(train), 0.1, 0)), indexed(reported)


def named_folders(option: str, written: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names and folders of an option that is written as NAME=DIR, once for each."""
    pairs = [(name, folder) for name, _, folder in (entry.partition("=") for entry in written)]
    if not all(name and folder for name, folder in pairs):
        raise InputError(f"found --{option} {' '.join(written)}, expected NAME=DIR, the biggest first")
    return pairs


def joined(one: Examples, other: Examples) -> Examples:
    """Return the examples of both."""
    return Examples([*one.texts, *other.texts], [*one.labels, *other.labels])


def race(
    ways: Mapping[Way, CascadeRuntime], base: Way, texts: Sequence[Text], single: int, rounds: int
) -> dict[Way, dict[str, Spread]]:
    """Time all ways in turn, the first `single` texts one by one and all texts in one call; one round warms up.

    Returns milliseconds per text and the speed-up over `base`, each round's ratio on its own.
    """
    calls: list[Sequence[Sequence[Text]]] = [[[text] for text in texts[:single]], [texts]]
    contestants = {way: batch_by_batch(runtime) for way, runtime in ways.items()}
    timed = in_turns(contestants, calls, rounds)
    times = {way: 1000 * own.seconds / [len(calls[0]), len(texts)] for way, own in timed.items()}
    return {
        way: {
            "single_ms": spread(found[:, 0]),
            "bulk_ms": spread(found[:, 1]),
            "single_speedup": spread(times[base][:, 0] / found[:, 0]),
            "bulk_speedup": spread(times[base][:, 1] / found[:, 1]),
        }
        for way, found in times.items()
    }


def training_parser(description: str | None, report: str) -> argparse.ArgumentParser:
    """Return a parser with the options of the scripts that train; `report`: the first word of their report's name."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--data", type=Path, required=True, help="folder with the task's files")
    add("--big-learning-rate", type=float, default=5e-5)
    add("--batch-size", type=int, default=32)
    add("--distill-weight", type=float, default=0.9)
    add("--temperature", type=float, default=3.0)
    add("--max-length", type=int, default=128)
    add("--bf16", action="store_true", help="train in bfloat16")
    add("--work", type=Path, help=f"members, logits and bundles (default: runs/{report}/TASK)")
    add("--output", type=Path, help=f"default: results/{report}-TASK.json beside this script")
    return parser


def seconds_by_part(trace: Trace, members: Sequence[str]) -> list[float]:
    """Return the seconds of tokenization, then those of each member."""
    return [
        trace.tokenization_seconds,
        *(sum(run.seconds for run in trace.runs if run.name == name) for name in members),
    ]


def inked(axis: Any) -> None:
    """Draw the lines and words of a picture's axis in ink that is seen on light and on dark pages."""
    axis.tick_params(colors=INK, which="both")
    axis.spines[:].set_color(INK)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)


def run_command(main: Callable[[], None]) -> None:
    """Run a benchmark; an error that the user can correct ends it with one line."""
    try:
        main()
    except CascadeError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
