"""Export fine-tuned classifiers as one bundle: converted to ONNX, fused by ONNX Runtime, compared with torch.

The bundle appears only when every member has passed its checks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cascade_export.check import MAX_ACCURACY_DROP, Check
from cascade_export.checkpoint import EXPORTERS, TRACE, training_record
from cascade_export.export import DEFAULT_THRESHOLD, export_bundle
from cascade_export.member import AUTO, FP32_ON_OPENVINO
from cascade_export.pack import packed
from cascade_rt.bundle import Bundle, MemberEntry
from cascade_rt.bundle.manifest import EXIT_RULES
from cascade_rt.cli.options import add_label_column, add_provider_option, add_reading, execution, of_options, reading
from cascade_rt.cli.parser import CommandParser
from cascade_rt.cli.rendering import table
from cascade_rt.errors import InputError, InvalidOption, MissingExtraError
from cascade_rt.io.readers import LABEL
from cascade_rt.io.writers import new_path

SUMMARY = "export fine-tuned members as a bundle (extra: export)"
EXAMPLE = "cascade-rt export --member members/2L --member members/12L --output bundle/"

_QUALITIES = {"accuracy": "accuracy", "dis": "DIS", "ece": "ECE"}


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    members = parser.add_mutually_exclusive_group(required=True)
    members.add_argument(
        "--member",
        action="append",
        metavar="DIR",
        help="a Hugging Face folder or hf:NAME, or an ONNX file or folder; repeat for each member",
    )
    parser.reads("member")
    members.add_argument(
        "--random",
        action="append",
        metavar="LAYERSxHIDDEN",
        help="instead: a member with random weights, for instance 2x768, to measure hardware; repeat for each member",
    )
    add("--tokenizer", metavar="DIR", help="with --random: the folder of the vocabulary (default: a synthetic one)")
    parser.reads("tokenizer")
    add("--output", required=True, type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.writes("output")
    add(
        "--threshold",
        type=float,
        default=DEFAULT_THRESHOLD,
        metavar="TAU",
        help="initial threshold of every member but the last",
    )
    add("--max-length", type=int, help="tokens (default: as trained, else what the model takes)")
    add("--pair", action=argparse.BooleanOptionalAction, help="pairs of texts (default: as trained, else single texts)")
    add(
        "--precision",
        action="append",
        default=[],
        metavar="[MEMBER=]PRECISION",
        help="fp32, fp16, int8, auto (the fastest that passes the check) or a special one (docs/guide/precision.md), "
        "for all members or for one (default: fp32)",
    )
    add(
        "--check-data",
        type=Path,
        metavar="FILE",
        help="compare finished members with their originals on these texts, labelled or not (default: what training "
        "held out)",
    )
    parser.reads("check_data")
    check = parser.add_argument_group("how --check-data is read")
    add_reading(parser, of="--check-data", group=check)
    add_label_column(parser, check)
    add(
        "--max-accuracy-drop",
        type=float,
        default=MAX_ACCURACY_DROP,
        metavar="POINTS",
        help="percentage points that a member may lose in the check",
    )
    add(
        "--choose-cuts",
        action="store_true",
        help="with several labels: the cuts with the best F1 of the biggest member on the check data, which need "
        "labels (default: those that training chose, else 0.5)",
    )
    add(
        "--calibrate",
        action="store_true",
        help="divide each member's logits by the temperature that fits the labels of the check data best",
    )
    add(
        "--trim-vocabulary",
        dest="vocabulary",
        type=Path,
        metavar="FILE",
        help="keep only the tokens that these texts of your domain need, and those with which every text still gets "
        "tokens: smaller files, above all of small members (default: all tokens)",
    )
    parser.reads("vocabulary")
    add(
        "--most-cut-differently",
        type=float,
        default=Check.most_cut_differently,
        metavar="SHARE",
        help="of these texts, each tenth is held out; common tokens are kept until at most this share of those would "
        "get other tokens. More is smaller: rare words are then cut into pieces, whose price the check shows",
    )
    add(
        "--exporter",
        choices=EXPORTERS,
        help="what converts torch weights: trace, torch's tracing exporter (the default), or optimum (extra: optimum, "
        "transformers 4)",
    )
    add(
        "--exit-rule",
        choices=EXIT_RULES,
        help="of a multi-exit model that cascade-rt train-exits made (default: that of its paper)",
    )
    add("--provider", default="cpu", help="where finished members are checked and timed")
    add_provider_option(parser)
    add(
        "--single-file",
        type=Path,
        metavar="FILE",
        help="also write the bundle as one ONNX file, as cascade-rt pack does",
    )
    parser.writes("single_file")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    add("--json", action="store_true", help="print the manifest as JSON")


def run(options: argparse.Namespace) -> None:
    """Export, and print a table: the members, and how they compare with their originals on the check data."""
    if options.single_file:
        new_path(options.single_file, ".onnx", overwrite=options.overwrite)
    check = of_options(Check, options, data=options.check_data, reading=reading(options), execution=execution(options))
    with TemporaryDirectory(prefix="cascade-export-") as folder:
        members = options.member or _random_members(options, Path(folder))
        if any("exits" in training_record(member) for member in members):
            bundle = _segments(members, options, check)
        else:
            if options.exit_rule:
                raise InputError(f"--exit-rule {options.exit_rule} requires a multi-exit model (see train-exits)")
            bundle = export_bundle(
                members,
                options.output,
                threshold=options.threshold,
                pair=options.pair,
                max_length=options.max_length,
                precision=_precisions(options.precision),
                check=check,
                overwrite=options.overwrite,
            )
    line = packed(options.output, options.single_file, overwrite=options.overwrite) if options.single_file else None
    if options.json:
        print(json.dumps(bundle.to_json(), ensure_ascii=False))
        return
    print(_table([_facts(member) for member in bundle.members]))
    aligned = [_alignment(member) for member in bundle.members if "alignment" in member.other]
    if aligned:
        print("", *aligned, sep="\n")
    if "vocabulary" in bundle.provenance:
        print("", _vocabulary(bundle.provenance["vocabulary"]), sep="\n")
    for member in bundle.members:
        if hint := _faster_elsewhere(member):
            print(f"\n{hint}")
    checks = [_check(member) for member in bundle.members if "check" in member.other]
    if checks:
        print("\nchecked against the originals (diff: of a class probability; original -> exported, in %):")
        print(_table(checks))
        if options.check_data and not any(check["accuracy"] for check in checks):
            print(f"without labels: {options.check_data} has no column {LABEL!r}; --label-column names another")
    print(f"\n{options.output}: {len(bundle.members)} members, {len(bundle.labels)} labels")
    if line:
        print(line)


def _segments(members: Sequence[str], options: argparse.Namespace, check: Check) -> Bundle:
    """Export one multi-exit model as a bundle of segments."""
    unused = {
        "--pair": options.pair,
        "--max-length": options.max_length,
        "--calibrate": options.calibrate or None,
        "--trim-vocabulary": options.vocabulary,
        "--choose-cuts": options.choose_cuts or None,
        "--exporter": None if options.exporter == TRACE else options.exporter,
        "--provider": None if options.provider == "cpu" else options.provider,
        "--provider-option": options.provider_options or None,
    }
    given = [option for option, value in unused.items() if value is not None]
    if len(members) > 1 or given:
        found = f"{len(members)} members" if len(members) > 1 else ", ".join(given)
        raise InputError(f"found {found} with a multi-exit model, expected that one alone, as it was trained")
    from cascade_export.exits import export_exits  # noqa: PLC0415 - loads torch

    precisions = _precisions(options.precision)
    return export_exits(
        members[0],
        options.output,
        rule=options.exit_rule,
        threshold=options.threshold,
        precision=precisions.get("", "fp32"),
        check=check,
        overwrite=options.overwrite,
    )


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return table(columns, [[row[column] or "-" for column in columns] for row in rows])


def _facts(member: MemberEntry) -> dict[str, str]:
    """Return what a member is, and how its probabilities differ from torch's and between batchings."""
    found = member.other
    return {
        "member": member.name,
        "layers": str(member.layers),
        "parameters": f"{member.parameters / 1e6:.1f}M",
        "precision": member.precision,
        "threshold": "" if member.threshold is None else f"{member.threshold:g}",
        "temperature": _number(found.get("temperature", {}).get("value"), ".3f"),
        "diff to torch": _number(found.get("max_probability_difference"), ".1e"),
        "diff by batching": _number(found.get("batch_difference"), ".1e"),
    }


def _alignment(member: MemberEntry) -> str:
    """Return how a member compares with its original under its own tokenizer."""
    found: Mapping[str, Any] = member.other["alignment"]
    return (
        f"{member.name}: aligned to the tokenizer of {found['tokenizer_of']} ({found['moved']} of {found['tokens']} "
        f"ids changed); {found['same_tokens']} of {found['texts']} texts have the same tokens, logits differ by up to "
        f"{found['max_logit_difference']:.1e}"
    )


def _vocabulary(found: Mapping[str, int]) -> str:
    """Return how many tokens are kept, and what that changes for texts that had no part in it."""
    return (
        f"vocabulary: {found['tokens']:,} of {found['of']:,} tokens; {found['cut_differently']} of {found['held_out']} "
        "held-out texts are cut differently"
    )


def _faster_elsewhere(member: MemberEntry) -> str | None:
    """Return whether fp32 was faster with OpenVINO than what `auto` chose."""
    speeds: Mapping[str, Mapping[str, float]] = member.other.get(AUTO, {}).get("seconds_per_text", {})
    if FP32_ON_OPENVINO not in speeds:
        return None
    chosen, other = speeds[member.precision], speeds[FP32_ON_OPENVINO]
    alone, in_bulk = (chosen[which] / other[which] for which in ("alone", "in_bulk"))
    if alone * in_bulk <= 1:
        return None
    return (
        f"{member.name}: fp32 was faster with OpenVINO, {alone:.2f} times for single texts and {in_bulk:.2f} times in "
        "bulk; to check it: --provider openvino --precision fp32"
    )


def _check(member: MemberEntry) -> dict[str, str]:
    """Return how a finished member compares with its original on the check data."""
    check: Mapping[str, Any] = member.other["check"]
    return {
        "member": member.name,
        "texts": _number(check.get("texts"), "d"),
        "labels equal": _number(check.get("labels_agree"), ".2f", 100),
        "max diff": _number(check.get("max_probability_difference"), ".4f"),
        "mean diff": _number(check.get("mean_probability_difference"), ".5f"),
        **{name: _change(check.get(key)) for key, name in _QUALITIES.items()},
    }


def _change(value: Mapping[str, float | None] | None) -> str:
    """Return a figure in percent, before and after the export where there is an original."""
    before, after = (value or {}).get("original"), (value or {}).get("exported")
    if after is None:
        return ""
    return ("" if before is None else f"{100 * before:.2f} -> ") + f"{100 * after:.2f}"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else format(value if factor == 1 else factor * value, form)


def _random_members(options: argparse.Namespace, folder: Path) -> list[str]:
    try:
        import transformers  # noqa: PLC0415 - slow to import

        from cascade_export.random_weights import parse_shape, write_random_members  # noqa: PLC0415 - loads torch
    except ImportError as error:
        raise MissingExtraError("making members with random weights", "export", error) from error
    transformers.logging.set_verbosity_error()  # no notes on new classifier weights
    return write_random_members([parse_shape(shape) for shape in options.random], folder, tokenizer=options.tokenizer)


def _precisions(written: Sequence[str]) -> dict[str, str]:
    """Return the precision of each member, from PRECISION or MEMBER=PRECISION."""
    pairs = [(member, precision) for member, _, precision in (item.rpartition("=") for item in written)]
    if len({member for member, _ in pairs}) < len(pairs):
        raise InvalidOption("precision", list(written), "one for each member, and one for the others")
    return dict(pairs)
