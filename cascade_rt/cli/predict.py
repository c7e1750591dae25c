"""Classify texts: one JSON object per line, in input order, with label, score, exit, layers and truncated."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ..errors import CascadeError, InputError
from ..io.readers import FORMATS, Example, Reject, read_records
from ..io.tables import open_rows, output_format
from ..io.writers import is_stream, open_output
from ..jobs.answering import ON_ERROR, SKIP, STOP, Counts, Lines, Progress, answer, described
from ..jobs.files import JobFiles
from ..jobs.shards import ENDINGS, SHARD_ROWS
from ..runtime import CascadeRuntime
from ..types import Text
from .options import (
    RAY,
    add_bundle,
    add_engine,
    add_exit_rule,
    add_input,
    add_running,
    add_windows,
    open_runtime,
    progress_bar,
    provider_options,
    reading,
    refuse_without_ray,
    rows_of,
)
from .parser import CommandParser, expanded
from .rendering import exits_line, printable
from .signals import Termination

_FEW = 4  # texts for which weights are not worth packing

SUMMARY = "classify texts"
_FOR_RAY = {"address": None, "actors": None, "pools": list[str](), "shard_rows": SHARD_ROWS, "shard_format": ENDINGS[0]}
"""Options for clusters alone, and their defaults."""
EXAMPLE = 'cascade-rt predict --model-dir bundle/ "a text" "another text"'


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    parser.add_argument("text", nargs="*", metavar="TEXT", help="texts to classify; for pairs: TEXT TEXT ...")
    add_input(
        parser,
        required=False,
        help=f"read texts from a file ({', '.join(FORMATS)}), a folder or a pattern, also behind a URI such as s3://; "
        "- for standard input",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="-",
        help="file for the answers: jsonl, json, csv, tsv or parquet by its ending, also .gz, .zst; - for standard "
        "output; with --engine ray a folder, or a URI of one",
    )
    parser.writes("output", paths=lambda path: [path, f"{path}.partial", f"{path}.checkpoint"])
    parser.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default=STOP,
        help="a row that cannot be used: stop after the rows before it, skip it, or write null for its answer",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on after the rows that a killed run of this command has answered"
    )
    parser.add_argument(
        "--rejects", metavar="FILE", help="file for such rows, with the reason; formats as for --output"
    )
    parser.writes("rejects", paths=lambda path: [path, f"{path}.partial"])
    add_exit_rule(parser)
    add_windows(parser)
    add_running(parser)
    _add_cluster(parser)


def _add_cluster(parser: CommandParser) -> None:
    cluster = add_engine(parser)
    cluster.add_argument(
        "--actors", type=int, metavar="N", help="processes that answer texts (default: as many as there is room for)"
    )
    cluster.add_argument(
        "--pool",
        dest="pools",
        action="append",
        metavar="MEMBER=ACTORS[:PROVIDER]",
        help="give a member processes of its own; once for each member, instead of --actors",
    )
    cluster.add_argument("--shard-rows", type=int, metavar="N", help="rows in each file of the output")
    cluster.add_argument("--shard-format", choices=ENDINGS, help="format of the files of the output")
    parser.set_defaults(**_FOR_RAY)


def run(options: argparse.Namespace) -> None:
    """Classify and write."""
    if not options.text and not options.input:
        raise InputError("found no text; give texts or --input")
    if options.text and options.input:
        raise InputError(expanded(options.text) or "found texts and --input, expected one of them")
    if (file := next(filter(os.path.isfile, options.text), None)) is not None:  # the text may be no possible path
        raise InputError(
            f"found the name of a file, {file}, as a text; expected --input {file}, or a pattern in quotes as --input "
            "(a text that is a file's name can be read by --input -)"
        )
    if options.rejects and options.on_error == STOP:
        raise InputError("--rejects requires --on-error skip or null")
    if options.engine == RAY:
        _on_cluster(options)
        return
    refuse_without_ray(options, _FOR_RAY)
    to_file = not is_stream(options.output)
    if options.resume and not (to_file and options.input):
        raise InputError("--resume requires --input and --output FILE")
    if to_file:
        output_format(options.output)  # before the bundle is opened
    options.packed = bool(options.input) or len(options.text) > _FEW
    runtime = open_runtime(options)
    _report(runtime, options, (_to_file if to_file else _to_stream)(runtime, options))


def _to_stream(runtime: CascadeRuntime, options: argparse.Namespace) -> Counts:
    """Write the answers to standard output, a device or a pipe."""
    with _rejects(options) as rejects, open_output(options.output) as output, _progress(options, runtime) as progress:
        lines = Lines(output, rejects, options.on_error)
        answer(runtime, _records(runtime, options), lines, progress)
    return lines.counts


def _rejects(options: argparse.Namespace) -> AbstractContextManager[TextIO | None]:
    return open_rows(options.rejects) if options.rejects else nullcontext()


def _report(runtime: CascadeRuntime, options: argparse.Namespace, counts: Counts) -> None:
    """Say which exits the texts took, and how many rows were rejected; raise InputError where that is an error."""
    if options.input:
        print(printable(exits_line(runtime.stats())), file=sys.stderr)
    if counts.rejected:
        found = f"{counts.rejected:,} of {counts.records:,} rows were rejected" + (
            f", see {options.rejects}" if options.rejects and not is_stream(options.rejects) else ""
        )
        if options.on_error != SKIP:
            raise InputError(found)
        print(found, file=sys.stderr)


def _on_cluster(options: argparse.Namespace) -> None:
    """Write the answers to a folder, by a Ray cluster."""
    if options.input in (None, "-") or options.output == "-":
        raise InputError("--engine ray requires --input with files and --output with a folder")
    if options.pools and options.actors is not None:
        raise InputError("found --actors and --pool, expected one of them")
    from ..jobs.ray_job import JobSettings, predict_on_cluster  # noqa: PLC0415 - not needed elsewhere

    settings = JobSettings(
        pools=_pools(options),
        shard_rows=options.shard_rows,
        shard_format=options.shard_format,
        on_error=options.on_error,
        resume=options.resume,
        verify=options.verify,
        reading=reading(options),
    )
    options.provider, options.provider_options, options.threads = "cpu", [], None  # no member runs in this process
    runtime = open_runtime(options)
    counts = Counts()
    with (
        _resumable(options.output, counts, lambda: counts.records),
        _rejects(options) as rejects,
        _progress(options, runtime) as progress,
    ):
        predict_on_cluster(
            runtime,
            options.input,
            options.output,
            counts,
            settings,
            address=options.address,
            rejects=rejects,
            progress=progress,
        )
    _report(runtime, options, counts)


def _pools(options: argparse.Namespace) -> Any:
    """Return the pools of actors that the options ask for."""
    from ..jobs.ray_job import Pool  # noqa: PLC0415 - not needed elsewhere

    threads = 1 if options.threads is None else options.threads
    given = provider_options(options)
    if not options.pools:
        return Pool(options.actors, options.provider, threads, given)
    pools = {}
    for entry in options.pools:
        name, _, asked = entry.rpartition("=")
        actors, _, provider = asked.partition(":")
        if not name or not actors.isdecimal() or name in pools:
            raise InputError(f"found --pool {entry}, expected MEMBER=ACTORS[:PROVIDER], each member once")
        provider = provider or options.provider
        pools[name] = Pool(int(actors), provider, threads, given if provider == options.provider else None)
    return pools


def _to_file(runtime: CascadeRuntime, options: argparse.Namespace) -> Counts:
    """Write the answers to a file that a killed run leaves resumable."""
    streams = options.rejects and is_stream(options.rejects)
    rejects = Path(options.rejects) if options.rejects and not streams else None
    job = described(runtime, options.on_error) | {"rejects": rejects and str(rejects)}
    files = JobFiles(Path(options.output), rejects, job, resume=options.resume)
    counts = replace(files.done)
    with closing(files), _resumable(f"{options.output}.partial", counts, lambda: files.done.records):
        rejected = open_output(options.rejects) if streams else nullcontext(files.rejects)
        with rejected as stream, _progress(options, runtime) as progress, files.disk_errors():

            def commit(counts: Counts) -> None:
                files.commit(counts)
                progress(counts)

            lines = Lines(files.lines, stream, options.on_error, counts)
            answer(runtime, files.remaining(_records(runtime, options)), lines, commit)
        files.finish()
    return counts


@contextmanager
def _resumable(place: str, counts: Counts, done: Callable[[], int]) -> Iterator[None]:
    """Say where the answers are, and after how many rows `--resume` goes on, where the block ends before the input."""
    try:
        yield
    except CascadeError as error:
        if counts.answered:
            goes_on = f", and --resume goes on after {done():,} rows" if done() else ""
            error.__notes__ = [f"the answers before it are in {place}{goes_on}"]
        raise
    except (KeyboardInterrupt, Termination):
        goes_on = f"; --resume goes on after {done():,} rows" if done() else ""
        print(f"cascade-rt: stopped{goes_on}", file=sys.stderr)
        raise


def _records(runtime: CascadeRuntime, options: argparse.Namespace) -> Iterator[Example | Reject]:
    pair = runtime.bundle.pair
    if options.text:
        return iter(_from_arguments(options.text, pair))
    return read_records(options.input, reading(options), pair=pair)


@contextmanager
def _progress(options: argparse.Namespace, runtime: CascadeRuntime) -> Iterator[Progress]:
    """Yield what shows the progress: rows, rate, time left and exits so far; on a terminal alone."""
    with progress_bar(shown=bool(options.input), total=rows_of(options.input)) as bar:

        def show(counts: Counts) -> None:
            bar.set_postfix_str("exits " + " ".join(map(str, runtime.stats().exits)), refresh=False)
            bar.update(counts.records - bar.n)

        yield show


def _from_arguments(texts: list[str], pair: bool) -> list[Example]:
    if not pair:
        return [Example(text, {}, f"text {index}") for index, text in enumerate(texts)]
    if len(texts) % 2:
        raise InputError(f"found {len(texts)} text(s), expected pairs: this bundle's task is on pairs of texts")
    pairs: list[Text] = list(zip(texts[::2], texts[1::2], strict=True))
    return [Example(text, {}, f"pair {index}") for index, text in enumerate(pairs)]
