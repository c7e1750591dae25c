"""Train a multi-exit model: a classifier after each layer, as DeeBERT, PABEE or FastBERT do.

A killed run resumes when the same command is given again. `cascade-rt export` makes a bundle of segments out of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cascade_rt.cli.parser import CommandParser
from cascade_train.cli.options import add_data, add_recipe, announce, data_from, need_training, recipe_from, with_work
from cascade_train.cli.trial import add_export_check, check_export

SUMMARY = "train a model with a classifier after each layer (extra: export)"
EXAMPLE = "cascade-rt train-exits --kind pabee --train-file labelled.csv --base hf:bert-base-uncased --output pabee/"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add(
        "--kind",
        required=True,
        choices=("deebert", "pabee", "fastbert"),
        help="deebert: train the exits of a fine-tuned model; pabee: train model and exits together; fastbert: the "
        "exits of a fine-tuned model learn its answers",
    )
    add(
        "--base",
        required=True,
        metavar="DIR",
        help="encoder to start from: a Hugging Face folder or hf:NAME; for deebert and fastbert also a member that "
        "cascade-rt train made for this task",
    )
    parser.reads("base")
    add("--every", type=int, default=1, metavar="K", help="layers between two exits")
    add("--output", required=True, type=Path, metavar="DIR", help="the model's folder, in Hugging Face format")
    parser.writes("output", paths=with_work)
    add("--json", action="store_true", help="print the whole record as JSON")
    add_data(parser)
    add_recipe(parser)
    add_export_check(parser)


def run(options: argparse.Namespace) -> None:
    """Train, and print the accuracy of each exit."""
    need_training("train-exits")
    from cascade_train.exits import train_exits  # noqa: PLC0415 - loads torch

    data, recipe = data_from(options), recipe_from(options)
    with redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
        check_export(options, data.labels, pair=data.pair, exits=options.kind)
        announce(data)
        record = train_exits(options.base, data, options.output, kind=options.kind, every=options.every, recipe=recipe)
    if options.json:
        print(json.dumps(record))
        return
    best = max(record["validation"]["history"], key=lambda entry: float(entry["eval_accuracy"]))
    exits = ", ".join(f"{100 * each:.1f}" for each in best["eval_exits"])
    print(
        f"{options.output}: {data.name}, {len(data.train)} training and {len(data.validation)} validation examples; "
        f"validation accuracy of the exits after the layers {', '.join(map(str, record['exits']['after']))} and the "
        f"last, in %: {exits}"
    )
