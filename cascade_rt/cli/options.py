"""Options that several commands share, and what they become: settings of a runtime, examples of a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from ..bundle.manifest import EXIT_RULES
from ..engine.adapted import followed
from ..engine.execution import Execution
from ..engine.prepared import FOLDER
from ..engine.task import AGGREGATES, MEAN
from ..errors import InferenceError, InputError, InvalidOption, TextError
from ..io.readers import FORMATS, LABEL, LABELS, Example, Reading, Reject, read_examples
from ..jobs.answering import CHUNK, answered, chunks
from ..runtime import CascadeRuntime
from .parser import CommandParser
from .rendering import too_little_memory

T = TypeVar("T")
LOCAL, RAY = "local", "ray"
"""Engines."""
_SPELLED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}  # characters that are not easily typed in a shell


def add_bundle(parser: CommandParser) -> None:
    """Add which bundle to open."""
    add_model_dir(parser)
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not check the sha256 of the bundle's files"
    )
    parser.add_argument(
        "--expect-sha256",
        dest="expected_sha256",
        metavar="SHA256",
        help="refuse another bundle than this one, as cascade-rt info prints it",
    )


def add_model_dir(parser: CommandParser) -> None:
    """Add the bundle."""
    parser.add_argument(
        "--model-dir", required=True, metavar="BUNDLE", help="the bundle's folder, or hf:org/name[@revision] on the hub"
    )
    parser.reads("model_dir")


def add_running(parser: CommandParser) -> None:
    """Add where and how members run."""
    parser.add_argument(
        "--provider", default=Execution.provider, help="cpu, cuda, openvino or the name of an ONNX Runtime provider"
    )
    add_provider_option(parser)
    parser.add_argument("--threads", type=int, help="threads per member (default: the CPUs that the process may use)")
    parser.add_argument(
        "--low-memory", action="store_true", help="hold less memory, where many texts take longer in exchange"
    )
    parser.add_argument(
        "--no-word-cache",
        dest="word_cache",
        action="store_false",
        help="let the tokenizers library read every text, also those of words that it has read before",
    )
    parser.add_argument(
        "--cache",
        metavar="CACHE",
        help="where members are kept as prepared for this CPU, for a faster start and less memory; off: nowhere "
        f"(default: {FOLDER}, else the user's cache folder)",
    )


def add_windows(parser: CommandParser) -> None:
    """Add how long texts are read."""
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="read a text of too many tokens in windows of which each shares N tokens with the one before it (default: "
        "cut it)",
    )
    parser.add_argument(
        "--aggregate",
        choices=AGGREGATES,
        help=f"with --stride, what becomes of the probabilities of the windows (default: {MEAN})",
    )


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


def refuse_without_ray(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Raise InvalidOption for an option of clusters that differs from its default on one machine."""
    for name, default in defaults.items():
        if (found := getattr(options, name)) != default:
            raise InvalidOption(name, found, "none without --engine ray")


def add_exit_rule(parser: CommandParser) -> None:
    """Add an option for the parameter of each kind of exit rule."""
    for rule in EXIT_RULES.values():
        if rule.parameter not in parser.option_names():
            parser.add_argument(rule.flag, dest=rule.parameter, **rule.option)


def add_input(parser: CommandParser, *, required: bool, help: str) -> None:
    """Add the input file, and how it is read."""
    parser.add_argument("--input", required=required, metavar="FILE", help=help)
    parser.reads("input")
    add_reading(parser, of="the input")


def add_reading(parser: CommandParser, *, of: str, group: Any = None, pair: bool = True) -> None:
    """Add how files of texts are read, which `of` names: the same options for all commands that read any."""
    add = (group or parser).add_argument
    add("--format", choices=FORMATS, help=f"format of {of} (default: by the file's extension; txt for standard input)")
    add("--text-column", metavar="NAME", help="column of the text (default: text, sentence, sentence1, premise, ...)")
    if pair:
        add("--pair-column", metavar="NAME", help="column of the second text of a pair")
    add(
        "--encoding",
        metavar="NAME",
        help="encoding of text files (default: utf-8, or utf-16 or utf-32 by their first bytes)",
    )
    add(
        "--delimiter",
        metavar="CHARACTER",
        help='between the fields of csv, for instance ";" or tab (default: the one of , ; tab | in the header)',
    )
    parser.aliases["columns"] = "--text-column" + (" (for pairs, with --pair-column)" if pair else "")


def add_label_column(parser: CommandParser, group: Any = None) -> None:
    """Add the column of the labels, and how several labels of a text are written."""
    add = (group or parser).add_argument
    add(
        "--label-column",
        metavar="NAME",
        help=f"column of the label, or of a text's several labels (default: {LABEL}, or {LABELS})",
    )
    add(
        "--label-separator",
        metavar="TEXT",
        help='what stands between several labels in that column, for instance ";" (default: a comma); lists need none',
    )
    add(
        "--label-columns",
        nargs="+",
        metavar="NAME",
        help="with several labels: a column for each, with 1 where a text has the label, else 0",
    )


def of_options(kind: Callable[..., T], options: argparse.Namespace, **others: Any) -> T:
    """Return a dataclass whose fields are options of the same names, but for `others`; those not given are left out."""
    given = {name: getattr(options, name, None) for name in signature(kind).parameters}
    return kind(**{name: value for name, value in given.items() if value is not None} | others)


def execution(options: argparse.Namespace) -> Execution:
    """Return where members run."""
    return of_options(Execution, options, provider_options=provider_options(options))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the runtime's settings from the options."""
    names = ("verify", "expected_sha256", "stride", "aggregate")
    chosen = followed(options.model_dir, execution(options))
    return chosen.arguments() | {name: getattr(options, name) for name in names}


def provider_options(options: argparse.Namespace) -> dict[str, str]:
    """Return the provider's options."""
    pairs = [option.partition("=") for option in options.provider_options]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise InputError(f"found --provider-option {wrong[0]!r}, expected KEY=VALUE")
    return {key: value for key, _, value in pairs}


def open_runtime(options: argparse.Namespace) -> CascadeRuntime:
    """Open the bundle with the settings of the options, and the exit rule's parameter if it is given."""
    asked = {rule.parameter: getattr(options, rule.parameter) for rule in EXIT_RULES.values()}
    thresholds = asked.pop("thresholds")
    runtime = CascadeRuntime(options.model_dir, thresholds=thresholds, **settings(options))
    if warning := too_little_memory(runtime.bundle):
        print(f"cascade-rt: {warning}", file=sys.stderr)
    for parameter, value in asked.items():
        if value is not None:
            runtime = runtime.changed(parameter, value)
    return runtime


def examples(options: argparse.Namespace, pair: bool, *, labelled: bool = False) -> Iterator[Example]:
    """Yield the examples of the input file; `labelled` says that txt, which has no labels, will not do."""
    if labelled and options.input == "-" and options.format is None:
        raise InputError("found labelled texts on standard input without --format, expected --format jsonl, csv or tsv")
    return read_examples(options.input, reading(options), pair=pair)


def reading(options: argparse.Namespace) -> Reading:
    """Return how to read files; with options of `add_reading`, and of `add_label_column` where labels are read."""
    pair_column = getattr(options, "pair_column", None)
    if pair_column and not options.text_column:
        raise InputError(f"--pair-column {pair_column} requires --text-column")
    columns = tuple(column for column in (options.text_column, pair_column) if column) or None
    return of_options(Reading, options, columns=columns, delimiter=_SPELLED.get(options.delimiter, options.delimiter))


@contextmanager
def located(rows: list[Example], runtime: CascadeRuntime) -> Iterator[None]:
    """Name the file and line of a text that cannot be used, or that a member cannot run."""
    try:
        yield
    except InferenceError as error:
        for chunk in chunks(rows, CHUNK):
            for records, _ in answered(chunk, runtime, runtime.member_logits):
                for record in records:
                    if isinstance(record, Reject):
                        raise record.error from error
        raise
    except TextError as error:
        raise TextError(error.index, error.reason, rows[error.index].where) from error


def progress_bar(shown: bool = True, total: int | None = None, unit: str = " texts") -> Any:
    """Return a progress bar on standard error, shown only on a terminal."""
    from tqdm import tqdm  # noqa: PLC0415 - not needed for single texts

    return tqdm(unit=unit, total=total, file=sys.stderr, disable=None if shown else True)


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
