"""Choose members and thresholds on a labelled file, and write them into the bundle.

Without an objective it prints the best trade-offs and writes nothing. With --confidence the answer to --max-drop is
guaranteed, or nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from ..bundle import Bundle
from ..bundle.manifest import MULTI_LABEL
from ..errors import InputError
from ..io.caches import cache_folder
from ..io.writers import output_folder, write_json
from ..tuning.collect import collect, open_whole
from ..tuning.evaluation import true_answers
from ..tuning.plot import draw_front, pyplot
from ..tuning.report import AUTO, COSTS, Question
from ..tuning.tune import local_folder, tune, write_tuning
from .options import (
    add_bundle,
    add_input,
    add_label_column,
    add_running,
    add_windows,
    examples,
    located,
    of_options,
    progress_bar,
    reading,
    settings,
)
from .parser import CommandParser
from .rendering import printable, tuning_summary

SUMMARY = "choose members and thresholds"
REPORT, PICTURE = "tuning.json", "front.png"
_NOT_CALIBRATED = (
    "note: the probabilities of {name} are not calibrated; if they are too high, the drop is overestimated and the "
    "choice slower than it could be (cascade-rt export --calibrate)"
)
EXAMPLE = "cascade-rt tune --model-dir bundle/ --input labelled.tsv --max-drop 0.005"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    add_input(
        parser,
        required=True,
        help="labelled texts like those in production, not used for training; with --confidence, nor for model "
        "selection",
    )
    add_label_column(parser)
    parser.add_argument(
        "--agreement", action="store_true", help="compare with the last member's answers instead of labels"
    )
    asked = parser.add_argument_group("objective; without one, the best trade-offs are printed and nothing is written")
    asked.add_argument(
        "--max-drop",
        type=float,
        metavar="SHARE",
        help="the fastest that loses at most this share of accuracy, estimated for other texts; 0.005 is half a point",
    )
    asked.add_argument(
        "--speedup", type=float, metavar="X", help="the most accurate that is X times as fast, by --cost"
    )
    asked.add_argument(
        "--budget-ms",
        type=float,
        metavar="MS",
        help="the most accurate within MS milliseconds per text, one at a time, measured here",
    )
    asked.add_argument("--p95", action="store_true", help="the budget is for the 95th percentile, not for the mean")
    asked.add_argument(
        "--confidence", type=float, metavar="P", help="guarantee --max-drop with this confidence, e.g. 0.95"
    )
    asked.add_argument(
        "--fall-back", action="store_true", help="if nothing can be guaranteed, write the last member alone"
    )
    asked.add_argument(
        "--cost",
        choices=(AUTO, *COSTS),
        default=Question.cost,
        help="how speed is measured; latency is timed here; auto: by layers, or by latency if a member has no layers",
    )
    asked.add_argument(
        "--shared-threshold", dest="shared", action="store_true", help="one threshold for all members, as in the paper"
    )
    asked.add_argument("--all-members", dest="subsets", action="store_false", help="leave no member out")
    asked.add_argument(
        "--seed", type=int, default=Question.seed, help="random seed of the split: one half proposes, one certifies"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write {REPORT} and {PICTURE} (extra: plot)")
    parser.writes("output", paths=lambda folder: [folder / REPORT, folder / PICTURE])
    parser.add_argument("--dry-run", action="store_true", help="write nothing into the bundle")
    parser.add_argument("--no-cache", action="store_true", help="run the members again, and do not cache their logits")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_windows(parser)
    add_running(parser)


def run(options: argparse.Namespace) -> None:
    """Collect, tune, print and write."""
    question = of_options(Question, options)
    if options.fall_back and question.confidence is None:
        raise InputError("--fall-back requires --confidence")
    folder = local_folder(options.model_dir) if question.asks and not options.dry_run else None
    if options.output:
        pyplot()  # fails before the work, not after
        output_folder(options.output)
    runtime = open_whole(options.model_dir, **settings(options))
    bundle = runtime.bundle
    records = list(examples(options, bundle.pair, labelled=not options.agreement))
    labels = None
    if not options.agreement:
        labels = true_answers(runtime.task, records, reading(options), bundle.labels)
    cache = None if options.no_cache else cache_folder()
    with progress_bar() as progress, located(records, runtime):
        data = collect(runtime, [row.text for row in records], labels, cache=cache, progress=progress.update)
    report = tune(bundle, data, question)
    if report.guarantee and report.chosen is None and options.fall_back:
        report = replace(report, chosen=report.alone[-1])
    if question.asks and labels is not None and not _calibrated(bundle):
        print(_NOT_CALIBRATED.format(name=printable(bundle.members[-1].name)), file=sys.stderr)
    if options.output:
        write_json(options.output / REPORT, report.to_json())
        draw_front(report, options.output / PICTURE)
    print(json.dumps(report.to_json()) if options.json else printable(tuning_summary(report)))
    if folder is not None and report.chosen:
        write_tuning(folder, bundle, report)
        print(f"{folder}: thresholds written", file=sys.stderr)
    elif folder is not None:
        raise InputError(
            "nothing can be guaranteed on these texts; nothing was written (--fall-back writes the last member alone)"
        )


def _calibrated(bundle: Bundle) -> bool:
    """Return True if the last member has a temperature, or if none can be fitted: to several labels."""
    return bundle.task == MULTI_LABEL or "temperature" in bundle.members[-1].other
