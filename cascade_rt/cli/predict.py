"""Classify texts: one JSON object per line, in input order, with label, score, exit, layers and truncated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from ..errors import InputError
from ..io.readers import FORMATS, Example, Rejected, read_records
from ..io.writers import open_output
from ..jobs.answering import ON_ERROR, SKIP, STOP, Counts, answer
from ..types import Text
from .options import add_bundle, add_input, add_running, add_threshold, open_runtime, progress_bar, reading
from .parser import CommandParser
from .rendering import exits_line, printable

SUMMARY = "classify texts"
EXAMPLE = 'cascade-rt predict --model-dir bundle/ "a text" "another text"'


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts to classify; for pairs: TEXT TEXT ...")
    add_input(parser, required=False, help=f"read texts from a file ({', '.join(FORMATS)}); - for standard input")
    parser.add_argument("--output", metavar="FILE", default="-", help="file for the JSON lines; - for standard output")
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default=STOP,
        help="a row that cannot be used: stop after the rows before it, skip it, or write null for its answer",
    )
    parser.add_argument("--rejects", metavar="FILE", help="file for such rows, one JSON object a line, with the reason")
    add_threshold(parser)
    add_running(parser)


def run(options: argparse.Namespace) -> None:
    """Classify and write."""
    if not options.text and not options.input:
        raise InputError("found no text; give texts or --input")
    if options.text and options.input:
        raise InputError("found texts and --input, expected one of them")
    if options.rejects and options.on_error == STOP:
        raise InputError("found --rejects alone, expected --on-error skip or null with it")
    runtime = open_runtime(options)
    pair = runtime.bundle.pair
    records: Iterator[Example | Rejected] = iter(
        _from_arguments(options.text, pair)
        if options.text
        else read_records(options.input, pair=pair, **reading(options))
    )
    counts = Counts()
    rejects = open_output(options.rejects) if options.rejects else nullcontext()
    try:
        with (
            rejects as rejected,
            open_output(options.output, keep_partial=True) as out,
            progress_bar(shown=bool(options.input)) as progress,
        ):
            for _ in answer(runtime, records, out, counts, on_error=options.on_error, rejects=rejected):
                progress.update(counts.answered + counts.rejected - progress.n)
    except InputError as error:
        if options.output != "-" and counts.answered:
            kept = f"the {counts.answered:,} answers before it are in {options.output}.partial"
            raise InputError(f"{error}; {kept}") from error
        raise
    if options.input:
        print(printable(exits_line(runtime.stats())), file=sys.stderr)
    if counts.rejected:
        found = f"{counts.rejected:,} of {counts.answered + counts.rejected:,} rows were rejected" + (
            f", see {options.rejects}" if options.rejects else ""
        )
        if options.on_error != SKIP:
            raise InputError(found)
        print(found, file=sys.stderr)


def _from_arguments(texts: list[str], pair: bool) -> list[Example]:
    if not pair:
        return [Example(text, {}, f"text {index}") for index, text in enumerate(texts)]
    if len(texts) % 2:
        raise InputError(f"found {len(texts)} text(s), expected pairs: this bundle's task is on pairs of texts")
    pairs: list[Text] = list(zip(texts[::2], texts[1::2], strict=True))
    return [Example(text, {}, f"pair {index}") for index, text in enumerate(pairs)]
