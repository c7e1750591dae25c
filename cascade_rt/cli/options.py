"""Options that several commands share, and what they become: settings of a runtime, examples of a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, TextError
from ..io.readers import FORMATS, Example, read_examples
from ..runtime import CascadeRuntime
from .parser import CommandParser

LOCAL, RAY = "local", "ray"
"""Engines."""


def add_bundle(parser: CommandParser) -> None:
    """Add which bundle to open."""
    parser.add_argument(
        "--model-dir", required=True, metavar="BUNDLE", help="the bundle's folder, or hf:org/name[@revision] on the hub"
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not check the sha256 of the bundle's files"
    )
    parser.add_argument(
        "--expect-sha256",
        dest="expected_sha256",
        metavar="SHA256",
        help="refuse another bundle than this one, as cascade-rt info prints it",
    )


def add_running(parser: CommandParser) -> None:
    """Add where and how members run."""
    parser.add_argument("--provider", default="cpu", help="cpu, cuda, openvino or the name of an ONNX Runtime provider")
    add_provider_option(parser)
    parser.add_argument("--threads", type=int, help="threads per member (default: the CPUs that the process may use)")


def add_provider_option(parser: CommandParser) -> None:
    """Add options for the provider."""
    parser.add_argument(
        "--provider-option",
        dest="provider_options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option for the provider, for instance device_id=1; may be repeated",
    )


def add_engine(parser: CommandParser) -> Any:
    """Add where texts are answered, and which cluster; return the group, for more options of clusters."""
    group = parser.add_argument_group("on a Ray cluster")
    group.add_argument(
        "--engine",
        choices=(LOCAL, RAY),
        default=LOCAL,
        help="local: this machine; ray: a Ray cluster, where --threads is 1 unless given",
    )
    group.add_argument("--address", help="of the cluster (default: RAY_ADDRESS, else one on this machine, else new)")
    return group


def add_threshold(parser: CommandParser) -> None:
    """Add one threshold for all members, or another patience."""
    parser.add_argument(
        "--threshold",
        dest="thresholds",
        type=float,
        metavar="TAU",
        help="one threshold for all members, also those that tuning left out (default: the bundle's)",
    )
    parser.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="for bundles with this exit rule: how many members in a row must agree (default: the bundle's)",
    )


def add_input(parser: CommandParser, *, required: bool, help: str) -> None:
    """Add the input file, its format and its columns."""
    parser.add_argument("--input", required=required, metavar="FILE", help=help)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="format of the input (default: by the file's extension; txt for standard input)",
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="column of the text (default: text, sentence, sentence1, premise, ...)"
    )
    parser.add_argument(
        "--encoding", metavar="NAME", help="encoding of a text file (default: utf-8, or utf-16 by its byte order mark)"
    )
    parser.add_argument("--pair-column", metavar="NAME", help="column of the second text of a pair")
    parser.aliases["columns"] = "--text-column and --pair-column"


def add_label_column(parser: CommandParser) -> None:
    """Add the column of the labels."""
    parser.add_argument("--label-column", metavar="NAME", default="label", help="column of the label")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the runtime's settings from the options."""
    return {
        "provider": options.provider,
        "threads": options.threads,
        "provider_options": provider_options(options),
        "verify": options.verify,
        "expected_sha256": options.expected_sha256,
    }


def provider_options(options: argparse.Namespace) -> dict[str, str]:
    """Return the provider's options."""
    pairs = [option.partition("=") for option in options.provider_options]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise InputError(f"found --provider-option {wrong[0]!r}, expected KEY=VALUE")
    return {key: value for key, _, value in pairs}


def open_runtime(options: argparse.Namespace) -> CascadeRuntime:
    """Open the bundle with the settings and the threshold or patience of the options."""
    runtime = CascadeRuntime(options.model_dir, thresholds=options.thresholds, **settings(options))
    return runtime if options.patience is None else runtime.with_patience(options.patience)


def examples(options: argparse.Namespace, pair: bool, *, labelled: bool = False) -> Iterator[Example]:
    """Yield the examples of the input file; `labelled` says that txt, which has no labels, will not do."""
    if labelled and options.input == "-" and options.format is None:
        raise InputError("found labelled texts on standard input without --format, expected --format jsonl, csv or tsv")
    return read_examples(options.input, pair=pair, **reading(options))


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Return how to read the input."""
    return {"format": options.format, "columns": columns_from(options), "encoding": options.encoding}


def columns_from(options: argparse.Namespace) -> tuple[str, ...] | None:
    """Return the columns of the text, or of the pair; None for the usual names."""
    if options.pair_column and not options.text_column:
        raise InputError(f"found --pair-column {options.pair_column} alone, expected --text-column with it")
    return tuple(column for column in (options.text_column, options.pair_column) if column) or None


@contextmanager
def located(chunk: list[Example]) -> Iterator[None]:
    """Name the file and line of a text that cannot be used."""
    try:
        yield
    except TextError as error:
        raise TextError(error.index, error.reason, chunk[error.index].where) from error


def progress_bar(shown: bool = True, total: int | None = None) -> Any:
    """Return a progress bar on standard error, shown only on a terminal."""
    from tqdm import tqdm  # noqa: PLC0415 - not needed for single texts

    return tqdm(unit=" texts", total=total, file=sys.stderr, disable=None if shown else True)


def rows_of(source: str | None) -> int | None:
    """Return about how many rows an input has, for the time left; None off a terminal, and if not known.

    Its lines, estimated from the first megabyte.
    """
    if source is None or not sys.stderr.isatty() or Path(source).suffix not in (".txt", ".jsonl", ".csv", ".tsv"):
        return None
    try:
        with Path(source).open("rb") as stream:
            beginning = stream.read(2**20)
        return beginning.count(b"\n") * Path(source).stat().st_size // max(1, len(beginning))
    except OSError:
        return None
