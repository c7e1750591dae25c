"""Draw a bundle's reliability diagrams, its accuracy over speed-up, and the expected gain of its middle members.

With --member also the members' representations by t-SNE. The numbers are written beside the pictures as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cascade_rt.cli.options import add_input, add_label_column, add_model_dir, examples, reading
from cascade_rt.cli.parser import CommandParser
from cascade_rt.errors import InputError
from cascade_rt.io.writers import output_folder, write_json
from cascade_rt.tuning.collect import open_whole
from cascade_rt.tuning.evaluation import label_ids
from cascade_rt.tuning.plot import pyplot
from cascade_train.cli.options import need_training

SUMMARY = "draw calibration, speed-up and representations (extra: analysis)"
_WRITTEN = [
    "expected-gain.json",
    *(f"{name}.{ending}" for name in ("reliability", "speedup", "representations") for ending in ("json", "png")),
]
EXAMPLE = "cascade-rt analyse --model-dir bundle/ --input labelled.tsv --output pictures"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add_model_dir(parser)
    add_input(parser, required=True, help="a labelled file")
    add_label_column(parser)
    add(
        "--threshold",
        dest="thresholds",
        type=float,
        metavar="TAU",
        help="one threshold for all members (default: the bundle's)",
    )
    add(
        "--member",
        action="append",
        default=[],
        metavar="DIR",
        help="Hugging Face folder to project; repeat for each member",
    )
    parser.reads("member")
    add("--points", type=int, default=500, help="texts to project")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the pictures")
    parser.writes("output", paths=lambda folder: [folder / name for name in _WRITTEN])


def run(options: argparse.Namespace) -> None:
    """Run every member on every text, draw, and print the expected gains."""
    need_training("analyse")
    pyplot()  # fails before the work, not after
    output_folder(options.output)
    from cascade_train.analysis import draw_projection, project, representations, write_analysis  # noqa: PLC0415

    runtime = open_whole(options.model_dir, thresholds=options.thresholds)
    bundle = runtime.bundle
    if not bundle.is_cascade:
        raise InputError("found a bundle of segments or with another exit rule, expected a cascade of complete members")
    if runtime.task.several:
        raise InputError("found a bundle of several labels per text, expected one label; evaluate takes both")
    how, rows = reading(options), list(examples(options, bundle.pair, labelled=True))
    if not rows:
        raise InputError(f"{options.input}: found no examples, expected at least one")
    labels = label_ids([(how.label_of(row), row.where) for row in rows], bundle.labels)
    texts = [row.text for row in rows]
    found = write_analysis(bundle.members, runtime.thresholds, runtime.member_logits(texts)[0], labels, options.output)
    if options.member:
        some = np.random.default_rng(0).permutation(len(texts))[: options.points]
        points = {
            Path(member).name: project(representations(member, [texts[row] for row in some], bundle.max_length))
            for member in options.member
        }
        draw_projection(points, labels[some], bundle.labels, options.output / "representations.png")
        written = {name: places.tolist() for name, places in points.items()}
        write_json(options.output / "representations.json", {"labels": labels[some].tolist(), "points": written})
    for row in found["expected_gain"]:
        print(
            f"{row['added']}: expected gain {100 * row['expected_gain']:.2f} points; accuracy {100 * row['with']:.2f} "
            f"with it at {row['layer_speedup_with']:.2f}x, {100 * row['without']:.2f} without it at "
            f"{row['layer_speedup_without']:.2f}x"
        )
    print(f"{options.output}: {', '.join(sorted(path.name for path in options.output.iterdir()))}")
