"""The option of commands that try the export before they train."""

from __future__ import annotations

import argparse

from cascade_rt.cli.parser import CommandParser
from cascade_rt.errors import MissingExtraError


def add_export_check(parser: CommandParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--no-export-check",
        dest="export_check",
        action="store_false",
        help="train also what cannot be exported; else the export is tried first, on an untrained copy of 2 layers",
    )


def check_export(
    options: argparse.Namespace,
    labels: tuple[str, ...] = ("a", "b"),
    *,
    layers: int | None = None,
    tokenizer: str | None = None,
    pair: bool = False,
    exits: str | None = None,
) -> None:
    """Try the export of a member of these settings, unless the options say not to or the output exists already.

    Raises CascadeError where it fails. Where the output exists, training ends with an error at once.
    """
    if not options.export_check or options.output.exists():
        return
    try:
        from cascade_build.trial import Start, try_export  # noqa: PLC0415 - loads torch
    except ImportError as error:
        raise MissingExtraError("trying the export", "export", error) from error
    try_export(
        [Start(options.base, layers, tokenizer)],
        labels,
        pair=pair,
        max_length=options.max_length,
        exits=exits,
        remedy="; or train it without this check (--no-export-check)",
    )
