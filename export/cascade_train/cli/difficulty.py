"""Label the training instances of a task as easy or difficult for a member (paper, section 3.3).

The member is trained on all folds but one and predicts that one, for several seeds; instances that all seeds got right
are easy. A killed run resumes when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from cascade_rt.cli.options import of_options
from cascade_rt.cli.parser import CommandParser
from cascade_rt.cli.rendering import printable
from cascade_train.cli.options import add_training, data_from, need_training, recipe_from

SUMMARY = "label difficult training instances, for DAR (extra: export)"
EXAMPLE = "cascade-rt difficulty --train-file labelled.csv --base members/base --layers 2 --output difficulty"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_training(
        parser,
        output="the folder of the labels, for cascade-rt train --difficulty",
        writes=lambda output: [output, f"{output}.labelling"],
    )
    parser.add_argument("--folds", type=int, default=8, help="parts of the training set")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions")
    parser.add_argument("--jobs", type=int, default=1, help="folds trained in parallel, sharing the CPUs")


def run(options: argparse.Namespace) -> None:
    """Label, and print the share of difficult instances."""
    need_training("difficulty")
    from cascade_train.difficulty import Splits, label_difficulty  # noqa: PLC0415 - loads torch

    data = data_from(options)
    with redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
        summary = label_difficulty(
            options.base,
            data,
            options.output,
            layers=options.layers,
            tokenizer=options.tokenizer,
            recipe=recipe_from(options),
            splits=of_options(Splits, options),
            jobs=options.jobs,
        )
    if options.json:
        print(json.dumps(summary))
        return
    shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in summary["difficult_by_class"].items())
    shares = printable(shares)
    print(f"{options.output}: {len(data.train)} instances, {100 * summary['difficult']:.1f}% difficult ({shares})")
