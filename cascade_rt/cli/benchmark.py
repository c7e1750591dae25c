"""Measure a bundle's speed on this machine: the cascade against its biggest member alone, in one interleaved run.

The bundle's thresholds and tuning are not used: for each speed-up, one threshold for all members is set that reaches it
on the measured texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..benchmark.latency import draw_latency, measure_latency
from ..benchmark.workload import Workload
from ..errors import MissingExtraError
from ..io.writers import check_ending, output_folder, output_path, write_json
from .options import add_bundle, add_reading, add_running, execution, of_options, progress_bar, reading
from .parser import CommandParser
from .rendering import latency_summary, printable

SUMMARY = "measure a bundle's speed on this machine"
EXAMPLE = "cascade-rt benchmark --model-dir bundle/"
PICTURE = ".png"
_DEFAULTS = Workload()


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="texts to measure on (default: synthetic, from the vocabulary)")
    parser.reads("data")
    add_reading(parser, of="--data")
    add("--words", default=_DEFAULTS.words, metavar="MEAN:SD", help="words per synthetic text")
    add("--texts", dest="count", type=int, default=_DEFAULTS.count, metavar="N", help="number of texts")
    add(
        "--speedup",
        dest="speedups",
        type=float,
        nargs="+",
        default=_DEFAULTS.speedups,
        metavar="X",
        help="layer speed-ups to aim at",
    )
    add(
        "--batch-size",
        dest="batch_sizes",
        type=int,
        nargs="+",
        default=_DEFAULTS.batch_sizes,
        metavar="N",
        help="texts per call, and all at once",
    )
    add("--rounds", type=int, default=_DEFAULTS.rounds, help="rounds after one that warms up")
    add("--output", type=Path, metavar="FILE", help="write the report as JSON, and a picture beside it (extra: plot)")
    parser.writes("output", paths=lambda path: [path, path.parent / f"{path.stem}{PICTURE}"])
    add("--json", action="store_true", help="print the report as JSON")
    add_running(parser)
    parser.aliases["speedup"] = "--speedup"


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write the JSON and the picture."""
    if options.output is not None:  # fails before the work, not after
        check_ending(options.output, ".json")
        output_folder(options.output.parent)
        output_path(options.output)
    workload = of_options(Workload, options, reading=reading(options))
    with progress_bar(unit=" rounds") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = measure_latency(
            options.model_dir,
            workload,
            execution(options),
            verify=options.verify,
            expected_sha256=options.expected_sha256,
            progress=progress,
        )
    print(json.dumps(report) if options.json else printable(latency_summary(report)))
    if options.output is None:
        return
    write_json(options.output, report)
    picture = options.output.with_suffix(PICTURE)
    try:
        draw_latency(report, picture)
        print(f"written: {options.output}, {picture}", file=sys.stderr)
    except MissingExtraError as error:
        print(f"written: {options.output}; no picture: {error}", file=sys.stderr)
