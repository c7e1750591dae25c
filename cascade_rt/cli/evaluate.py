"""Measure each member and the cascade on a labelled file.

Prints accuracy, F1, the difficulty inversion score (DIS), expected calibration error (ECE), exits and speed-up ratios.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import islice

import numpy as np

from ..benchmark.alone import time_alone
from ..errors import InputError
from ..jobs.answering import CHUNK
from ..tuning.evaluation import evaluate, quality_by_label, true_answers
from ..types import Text
from .options import (
    add_bundle,
    add_exit_rule,
    add_input,
    add_label_column,
    add_running,
    add_windows,
    examples,
    located,
    open_runtime,
    progress_bar,
    reading,
)
from .parser import CommandParser
from .rendering import evaluation_summary, printable

SUMMARY = "measure a bundle on a labelled file"
EXAMPLE = "cascade-rt evaluate --model-dir bundle/ --input labelled.tsv"

_TIMED = 100  # texts


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    add_input(parser, required=True, help="the labelled file; - for standard input")
    add_label_column(parser)
    parser.add_argument(
        "--timed", action="store_true", help="time each member alone and the cascade too, on up to 100 single texts"
    )
    parser.add_argument("--by-label", action="store_true", help="the quality of each label too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_exit_rule(parser)
    add_windows(parser)
    add_running(parser)


def run(options: argparse.Namespace) -> None:
    """Run every member on every text, and measure."""
    runtime = open_runtime(options)
    bundle = runtime.bundle
    parts, lengths, labels = [], [], []
    timed: list[Text] = []
    how = reading(options)
    records = examples(options, bundle.pair, labelled=True)
    with progress_bar() as progress:
        while chunk := list(islice(records, CHUNK)):
            labels.append(true_answers(runtime.task, chunk, how, bundle.labels))
            with located(chunk, runtime):
                logits, tokens = runtime.member_logits(example.text for example in chunk)
            timed += [example.text for example in chunk[: _TIMED - len(timed)]]
            parts.append(logits)
            lengths.append(tokens)
            progress.update(len(chunk))
    if not parts:
        raise InputError(f"{options.input}: found no examples, expected at least one")
    logits, truth = np.concatenate(parts, axis=1), np.concatenate(labels)
    report = evaluate(
        bundle.members,
        runtime.exit_rule,
        logits,
        truth,
        np.concatenate(lengths),
        runtime.original,
        task=runtime.task,
        window=runtime.plan.window,
    )
    if options.by_label:
        each = quality_by_label(runtime.exit_rule, logits, truth, bundle.labels, task=runtime.task)
        report = replace(report, by_label=each)
    seconds = time_alone(runtime, timed) if options.timed else None
    if options.json:
        print(json.dumps(report.to_json() | ({} if seconds is None else {"seconds_per_text": seconds})))
    else:
        print(printable(evaluation_summary(report, seconds)))
