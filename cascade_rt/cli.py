"""The command `cascade-rt`: predict, info, evaluate, tune and push here; the others in the offline stage.

Answers go to standard output, progress and errors to standard error. Exit status: 0 done, 2 something that the
user can mend (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import __version__
from .bundle import BATCH_TOLERANCE, MANIFEST, TUNING, Bundle, MemberEntry, read_bundle
from .card import model_card
from .drift import SIGNIFICANT, Stats
from .errors import CascadeError, InputError, TextError
from .evaluation import evaluate, label_ids
from .hub import push
from .records import FORMATS, Example, Text, open_output, read_examples, write_json
from .runtime import CascadeRuntime
from .tuning import (
    COSTS,
    Question,
    cache_folder,
    collect,
    draw_front,
    local_folder,
    open_whole,
    plotting,
    tune,
    write_tuning,
)

_OFFLINE = {
    "difficulty": ("cascade_train.cli", "label", "which training instances are difficult, for DAR (extra: export)"),
    "train": ("cascade_train.cli", "main", "fine-tune one member (extra: export)"),
    "analyse": ("cascade_train.cli", "analyse", "pictures of a cascade: calibration, speed-up (extra: analysis)"),
    "export": ("cascade_export.cli", "main", "fine-tuned members -> ONNX -> bundle (extra: export)"),
}
_FRONT_ROWS = 12  # of the table; the whole front is in the JSON
_CHUNK = 1024  # texts in memory at a time
_TUNED = ("accuracy", "drop", "layers_speedup", "latency_speedup")
_PREDICTED = ("label", "score", "exit", "layers", "truncated")


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as all others of this command."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError in place of printing the usage."""
        raise InputError(f"{message} (see: {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # labels and texts are Unicode, whatever the terminal says it takes
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        if argv and argv[0] in _OFFLINE:
            module, function, _ = _OFFLINE[argv[0]]
            getattr(importlib.import_module(module), function)(argv[1:])
        else:
            options = _parser().parse_args(argv)
            options.command(options)
    except CascadeError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _complain(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
    return 0


def _complain(message: str) -> int:
    print("cascade-rt: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _predict(options: argparse.Namespace) -> None:
    if bool(options.text) == bool(options.input):
        raise InputError(
            "found no text; name texts or --input" if not options.text else "name texts or --input, not both"
        )
    runtime = _runtime(options)
    examples = (
        iter(_from_arguments(options.text, runtime.bundle.pair))
        if options.text
        else _examples(options, runtime.bundle.pair)
    )
    with open_output(options.output) as out, _progress(shown=bool(options.input)) as progress:
        while chunk := list(islice(examples, _CHUNK)):
            with _placed(chunk):
                predictions = runtime.predict(example.text for example in chunk)
            for example, prediction in zip(chunk, predictions, strict=True):
                out.write(_json_line(example.fields, {name: getattr(prediction, name) for name in _PREDICTED}))
            progress.update(len(chunk))
    if options.input:
        print(_closing(runtime.stats()), file=sys.stderr)


def _closing(stats: Stats) -> str:
    """Return the line that closes a run: exits, layers, and whether the texts are still of tuning's kind."""
    if not stats.texts:
        return "0 texts"
    exits = _rates([count / stats.texts for count in stats.exits])
    line = f"{stats.texts} text{'s' * (stats.texts != 1)}, exits {exits}, {stats.mean_layers:.2f} layers a text"
    if stats.tuned_rates is None or stats.p_value is None or stats.distance is None:
        return line
    line += f"; when tuned {_rates(stats.tuned_rates)}: distance {stats.distance:.3f}, p = {stats.p_value:.4f}"
    return line + (", the texts have changed: tune again" if stats.p_value < SIGNIFICANT else "")


def _rates(rates: Sequence[float]) -> str:
    return " / ".join(f"{100 * rate:.1f}%" for rate in rates)


@contextmanager
def _placed(chunk: list[Example]) -> Iterator[None]:
    """Name the file and line of a text that cannot be used."""
    try:
        yield
    except TextError as error:
        raise TextError(error.index, error.reason, chunk[error.index].where) from None


def _json_line(fields: dict[str, Any], answer: dict[str, Any]) -> str:
    """Join the input's fields and the answer, losing none: a field that is called like an answer's is renamed."""
    line = {name: field for name, field in fields.items() if name not in answer}
    for name in fields.keys() & answer.keys():
        free = f"input_{name}"
        while free in fields:
            free = f"input_{free}"
        line[free] = fields[name]
    line |= answer
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    except ValueError:  # the input held NaN or infinity, which JSON has no word for
        return json.dumps(json.loads(json.dumps(line, default=str), parse_constant=lambda _: None)) + "\n"


def _info(options: argparse.Namespace) -> None:
    bundle = read_bundle(options.model_dir, verify=options.verify)
    if options.json:
        print(json.dumps(bundle.to_json(), ensure_ascii=False))
        return
    shown = ", ".join(bundle.labels[:12]) + (", ..." if len(bundle.labels) > 12 else "")
    print(f"labels      {len(bundle.labels)}: {shown}")
    print(f"texts       {'pairs' if bundle.pair else 'single'}, up to {bundle.max_length} tokens")
    _table(
        ["member", "layers", "hidden", "parameters", "precision", "batch-invariant", "size", "threshold"],
        [
            [
                member.name,
                str(member.layers),
                str(member.hidden_size),
                f"{member.parameters / 1e6:.1f}M",
                member.precision,
                _batch_invariant(member),
                f"{_size(bundle, member) / 1e6:.1f} MB",
                "-" if member.threshold is None else f"{member.threshold:.4f}",
            ]
            for member in bundle.members
        ],
    )
    for member in bundle.members:
        if _batch_invariant(member) == "no":
            difference = _share(member.other.get("batch_difference"))
            print(
                f"{member.name}: a text's score, and so its exit, depends on its batch-mates"
                + ("" if difference is None else f" (by up to {difference:.1e} where it was measured)")
                + "; in --precision int8 it would not"
            )
    if bundle.tuning is not None:
        _show_tuning(bundle.other[TUNING])
    print("all files are as their sha256 says" if options.verify else "sha256 not checked")


def _show_tuning(tuning: dict[str, Any]) -> None:
    """Print what `tune` wrote; keys that another writer left out are left out."""
    numbers = [f"{name} {tuning[name]:.4g}" for name in _TUNED if isinstance(tuning.get(name), int | float)]
    exits = [count / sum(tuning["exits"]) for count in tuning["exits"]]
    print("tuned       " + ", ".join([" + ".join(tuning["members"]), f"exits {_rates(exits)}", *numbers]))
    guarantee = tuning.get("guarantee")
    if isinstance(guarantee, dict) and guarantee.get("certified"):
        print(f"guarantee   {_held(guarantee)}")


def _push(options: argparse.Namespace) -> None:
    bundle = read_bundle(options.model_dir)
    card = model_card(bundle, options.repository)
    if options.dry_run:
        print(card)
        return
    files = [MANIFEST, bundle.tokenizer_file]
    for member in bundle.members:
        files += [member.file, *(data.file for data in member.data)]
    print(push(bundle.folder or Path(options.model_dir), files, card, options.repository, private=options.private))


def _batch_invariant(member: MemberEntry) -> str:
    """Say what the export measured: yes, no, or ? where it did not."""
    difference = _share(member.other.get("batch_difference"))
    if member.precision == "int8-tensor" or (difference is not None and difference > BATCH_TOLERANCE):
        return "no"
    return "?" if difference is None else "yes"


def _share(value: object) -> float | None:
    """Return a number from 0 to 1 that a manifest tells, None for anything else that may stand there."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _size(bundle: Bundle, member: MemberEntry) -> int:
    folder = bundle.folder or Path()
    return sum((folder / file).stat().st_size for file in (member.file, *(data.file for data in member.data)))


def _evaluate(options: argparse.Namespace) -> None:
    runtime = _runtime(options)
    members = runtime.bundle.members
    parts, lengths, labels = [], [], []
    examples = _examples(options, runtime.bundle.pair)
    with _progress() as progress:
        while chunk := list(islice(examples, _CHUNK)):
            written = [(example.field(options.label_column), example.where) for example in chunk]
            labels.append(label_ids(written, runtime.bundle.labels))
            with _placed(chunk):
                logits, tokens = runtime.member_logits(example.text for example in chunk)
            parts.append(logits)
            lengths.append(tokens)
            progress.update(len(chunk))
    if not parts:
        raise InputError(f"{options.input}: found no examples, expected at least one")
    report = evaluate(
        members,
        runtime.thresholds,
        np.concatenate(parts, axis=1),
        np.concatenate(labels),
        np.concatenate(lengths),
        runtime.original,
    )
    if options.json:
        print(json.dumps(report))
        return
    cascade = report["cascade"]
    rows = [("cascade", f"{cascade['mean_layers']:.2f}", sum(cascade["exits"]), cascade)]
    rows[:0] = [
        (member["name"], str(member["layers"]), count, member)
        for member, count in zip(report["members"], cascade["exits"], strict=True)
    ]
    _table(
        ["", "layers", "exits", "accuracy", "F1", "DIS", "ECE"],
        [
            [name, layers, str(count), *(_percent(quality[key]) for key in ("accuracy", "f1", "dis", "ece"))]
            for name, layers, count, quality in rows
        ],
    )
    taus = ", ".join(f"{tau:.4f}" for tau in cascade["thresholds"]) or "none"
    print(
        f"{report['texts']} texts, thresholds {taus}; layer speed-up {cascade['layer_speedup']:.2f}x, "
        f"FLOPs speed-up {cascade['flops_speedup']:.2f}x; figures in %, F1 {report['f1']}"
    )


def _tune(options: argparse.Namespace) -> None:
    question = Question(
        max_drop=options.max_drop,
        speedup=options.speedup,
        budget_ms=options.budget_ms,
        p95=options.p95,
        confidence=options.confidence,
        cost=options.cost,
        shared=options.shared_threshold,
        subsets=not options.all_members,
        seed=options.seed,
    )
    if options.fall_back and question.confidence is None:
        raise InputError("found --fall-back alone, expected --confidence with it")
    writes = not options.dry_run and (question.max_drop, question.speedup, question.budget_ms) != (None, None, None)
    folder = local_folder(options.model_dir) if writes else None
    if options.output:
        plotting()  # says what to install before the work, not after
    runtime = open_whole(options.model_dir, **_settings(options))
    bundle = runtime.bundle
    examples = list(_examples(options, bundle.pair))
    labels = None
    if not options.agreement:
        labels = label_ids([(row.field(options.label_column), row.where) for row in examples], bundle.labels)
    cache = None if options.no_cache else cache_folder()
    with _progress() as progress, _placed(examples):
        data = collect(runtime, [row.text for row in examples], labels, cache=cache, progress=progress.update)
    report = tune(bundle, data, question)
    if report["guarantee"] and report["chosen"] is None and options.fall_back:
        report["chosen"] = report["alone"][-1]
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "tuning.json", report)
        draw_front(report, options.output / "front.png")
    if options.json:
        print(json.dumps(report))
    else:
        _show_tuned(report)
    if folder is not None and report["chosen"]:
        write_tuning(folder, bundle, report)
        print(f"{folder}: thresholds written", file=sys.stderr)
    elif folder is not None:
        raise InputError(
            "nothing can be guaranteed on these texts; nothing was written (--fall-back writes the last member alone)"
        )


def _show_tuned(report: dict[str, Any]) -> None:
    front = report["front"]
    step = max(1, -(-len(front) // _FRONT_ROWS))
    rows = [("", point) for point in front[::step]] + [("alone", point) for point in report["alone"]]
    rows += [("chosen", report["chosen"])] if report["chosen"] else []
    _table(
        ["", "members", "thresholds", "accuracy", "drop", "risk", "layers", "FLOPs", "latency", "mean ms", "p95 ms"],
        [
            [
                name,
                "+".join(point["members"]),
                " ".join(f"{tau:.4f}" for tau in point["thresholds"]) or "-",
                *(_percent(point[key]) for key in ("accuracy", "drop", "risk")),
                *(f"{point[f'{kind}_speedup']:.2f}x" for kind in COSTS),
                f"{point['latency_ms']:.2f}",
                f"{point['latency_p95_ms']:.2f}",
            ]
            for name, point in rows
        ],
    )
    print(f"{report['data']['texts']} texts, compared with {report['compared_with']}; accuracy, drop and risk in %")
    if guarantee := report["guarantee"]:
        print(_promise(guarantee))
    print(f"verdict: {report['verdict']}")


def _held(found: dict[str, Any]) -> str:
    return (
        f"with confidence {found.get('confidence')} at most a share of {found.get('max_risk')} of such texts is "
        "answered wrongly here and rightly by the last member, so accuracy drops by no more"
    )


def _promise(found: dict[str, Any]) -> str:
    """Say what Learn then Test promises, and what it could with more texts."""
    tested = (
        f"{found['losses']} of {found['texts']} texts lost, p = {found['p_value']:.3g}, upper bound "
        f"{100 * found['bound']:.2f}%"
    )
    if found["certified"]:
        line = f"guarantee: {_held(found)} ({tested})"
    elif found["tested"]:
        line = f"no guarantee of {100 * found['max_risk']:g} points: the most careful cascade tried has {tested}"
    else:
        line = "no guarantee: nothing is faster than the last member alone"
    for row in found["with_more_texts"]:
        line += (
            f"\n  {row['speedup']:.2f}x could be certified with a file of about {row['texts']} texts, if its risk "
            f"stays {100 * row['risk']:.2f}%"
        )
    return line


def _runtime(options: argparse.Namespace) -> CascadeRuntime:
    return CascadeRuntime(options.model_dir, thresholds=options.threshold, **_settings(options))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    given = [option.partition("=") for option in options.provider_option]
    if wrong := [key for key, equals, _ in given if not (key and equals)]:
        raise InputError(f"found --provider-option {wrong[0]!r}, expected KEY=VALUE")
    return {
        "provider": options.provider,
        "threads": options.threads,
        "provider_options": {key: value for key, _, value in given},
        "verify": options.verify,
    }


def _examples(options: argparse.Namespace, pair: bool) -> Iterator[Example]:
    if options.pair_column and not options.text_column:
        raise InputError(f"found --pair-column {options.pair_column} alone, expected --text-column with it")
    columns = tuple(column for column in (options.text_column, options.pair_column) if column) or None
    return read_examples(options.input, pair=pair, format=options.format, columns=columns)


def _from_arguments(texts: list[str], pair: bool) -> list[Example]:
    if not pair:
        return [Example(text, {}, f"text {index}") for index, text in enumerate(texts)]
    if len(texts) % 2:
        raise InputError(f"found {len(texts)} text(s), expected pairs: this bundle's task is on pairs of texts")
    pairs: list[Text] = list(zip(texts[::2], texts[1::2], strict=True))
    return [Example(text, {}, f"pair {index}") for index, text in enumerate(pairs)]


def _progress(shown: bool = True) -> Any:
    from tqdm import tqdm  # noqa: PLC0415 - comes with tokenizers (through huggingface_hub)

    return tqdm(unit=" texts", file=sys.stderr, disable=None if shown else True)  # None: shown on a terminal only


def _table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        first, *others = row
        print(
            "  ".join(
                [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
            )
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="cascade-rt", description="Text classification with a cascade of BERTs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"cascade-rt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    bundle = CommandParser(add_help=False)
    bundle.add_argument(
        "--model-dir", required=True, metavar="BUNDLE", help="the bundle's folder, or org/name[@revision] on the hub"
    )
    bundle.add_argument(
        "--no-verify", dest="verify", action="store_false", help="trust the files: leave out their sha256"
    )
    running = CommandParser(add_help=False)
    running.add_argument("--provider", default="cpu", help="cpu, cuda or an ONNX Runtime provider; default: cpu")
    running.add_argument(
        "--provider-option", action="append", default=[], metavar="KEY=VALUE", help="handed to it, as device_id=1"
    )
    running.add_argument("--threads", type=int, help="default: the CPUs that this process may use")
    running.add_argument("--format", choices=FORMATS, help="default: by the file's ending; txt for standard input")
    running.add_argument("--text-column", metavar="NAME", help="default: text, sentence, sentence1, premise, ...")
    running.add_argument("--pair-column", metavar="NAME", help="the second text of a pair")

    gating = CommandParser(add_help=False)
    gating.add_argument("--threshold", type=float, metavar="TAU", help="one tau for all members; default: the bundle's")

    predict = commands.add_parser(
        "predict", parents=[bundle, gating, running], help="classify texts", allow_abbrev=False
    )
    predict.add_argument("text", nargs="*", metavar="TEXT", help="for pairs: TEXT TEXT")
    predict.add_argument("--input", metavar="FILE", help=f"{', '.join(FORMATS)}; - for standard input")
    predict.add_argument("--output", metavar="FILE", default="-", help="JSON lines; default: standard output")
    predict.set_defaults(command=_predict)

    info = commands.add_parser("info", parents=[bundle], help="show and verify a bundle", allow_abbrev=False)
    info.add_argument("--json", action="store_true", help="the manifest as JSON")
    info.set_defaults(command=_info)

    sharing = commands.add_parser("push", help="upload a bundle to the Hugging Face hub", allow_abbrev=False)
    sharing.add_argument("--model-dir", required=True, metavar="BUNDLE", help="the bundle's folder")
    sharing.add_argument("--private", action="store_true", help="make the repository private, if it is new")
    sharing.add_argument("--dry-run", action="store_true", help="print the model card, upload nothing")
    sharing.add_argument("repository", metavar="ORG/NAME", help="made if there is none")
    sharing.set_defaults(command=_push)

    evaluation = commands.add_parser(
        "evaluate", parents=[bundle, gating, running], help="measure on a labelled file", allow_abbrev=False
    )
    evaluation.add_argument("--input", required=True, metavar="FILE", help="the labelled file; - for standard input")
    evaluation.add_argument("--label-column", metavar="NAME", default="label", help="default: label")
    evaluation.add_argument("--json", action="store_true", help="the whole report as JSON")
    evaluation.set_defaults(command=_evaluate)

    _add_tune(commands, [bundle, running])

    for name, (_, _, summary) in _OFFLINE.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _add_tune(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    tuning = commands.add_parser("tune", parents=parents, help="choose members and thresholds", allow_abbrev=False)
    tuning.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="labelled texts as they will come, that no training saw or chose by",
    )
    tuning.add_argument("--label-column", metavar="NAME", default="label", help="default: label")
    tuning.add_argument("--agreement", action="store_true", help="no labels: agree with the last member instead")
    asked = tuning.add_argument_group("the question; without one, the best trades are shown and nothing is written")
    asked.add_argument("--max-drop", type=float, metavar="SHARE", help="fastest, losing at most this accuracy (0.005)")
    asked.add_argument("--speedup", type=float, metavar="X", help="most accurate, at least X times as fast")
    asked.add_argument("--budget-ms", type=float, metavar="MS", help="most accurate, at most so long a text, alone")
    asked.add_argument("--p95", action="store_true", help="the budget is for 95 texts of 100, not for the mean")
    asked.add_argument("--confidence", type=float, metavar="P", help="guarantee --max-drop with this confidence (0.95)")
    asked.add_argument("--fall-back", action="store_true", help="nothing guaranteed: write the last member alone")
    asked.add_argument("--cost", choices=COSTS, default="layers", help="what is fast; latency is measured here")
    asked.add_argument("--shared-threshold", action="store_true", help="one tau for all members, as in the paper")
    asked.add_argument("--all-members", action="store_true", help="leave no member out")
    asked.add_argument("--seed", type=int, default=0, help="of the halves that propose and certify")
    tuning.add_argument("--output", type=Path, metavar="FOLDER", help="for tuning.json and front.png (extra: plot)")
    tuning.add_argument("--dry-run", action="store_true", help="write nothing into the bundle")
    tuning.add_argument("--no-cache", action="store_true", help="run the members anew, keep nothing")
    tuning.add_argument("--json", action="store_true", help="the whole report as JSON")
    tuning.set_defaults(command=_tune)
