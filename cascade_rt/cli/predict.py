"""Classify texts: one JSON object per line, in input order, with label, score, exit, layers and truncated."""

from __future__ import annotations

import argparse
import sys
from itertools import islice

from ..errors import InputError
from ..io.readers import FORMATS, Example
from ..io.writers import json_line, open_output
from ..types import Text
from .options import (
    CHUNK,
    add_bundle,
    add_input,
    add_running,
    add_threshold,
    examples,
    located,
    open_runtime,
    progress_bar,
)
from .parser import CommandParser
from .rendering import exits_line

SUMMARY = "classify texts"
EXAMPLE = 'cascade-rt predict --model-dir bundle/ "a text" "another text"'

_FIELDS = ("label", "score", "exit", "layers", "truncated")


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts to classify; for pairs: TEXT TEXT ...")
    add_input(parser, required=False, help=f"read texts from a file ({', '.join(FORMATS)}); - for standard input")
    parser.add_argument("--output", metavar="FILE", default="-", help="file for the JSON lines; - for standard output")
    add_threshold(parser)
    add_running(parser)


def run(options: argparse.Namespace) -> None:
    """Classify and write."""
    if not options.text and not options.input:
        raise InputError("found no text; give texts or --input")
    if options.text and options.input:
        raise InputError("found texts and --input, expected one of them")
    runtime = open_runtime(options)
    pair = runtime.bundle.pair
    records = iter(_from_arguments(options.text, pair)) if options.text else examples(options, pair)
    with open_output(options.output) as out, progress_bar(shown=bool(options.input)) as progress:
        while chunk := list(islice(records, CHUNK)):
            with located(chunk):
                predictions = runtime.predict(example.text for example in chunk)
            for example, prediction in zip(chunk, predictions, strict=True):
                out.write(json_line(example.fields, {name: getattr(prediction, name) for name in _FIELDS}))
            progress.update(len(chunk))
    if options.input:
        print(exits_line(runtime.stats()), file=sys.stderr)


def _from_arguments(texts: list[str], pair: bool) -> list[Example]:
    if not pair:
        return [Example(text, {}, f"text {index}") for index, text in enumerate(texts)]
    if len(texts) % 2:
        raise InputError(f"found {len(texts)} text(s), expected pairs: this bundle's task is on pairs of texts")
    pairs: list[Text] = list(zip(texts[::2], texts[1::2], strict=True))
    return [Example(text, {}, f"pair {index}") for index, text in enumerate(pairs)]
