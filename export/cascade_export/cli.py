"""`cascade-rt export`: fine-tuned members -> ONNX -> bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cascade_export.check import MAX_ACCURACY_DROP
from cascade_export.export import DEFAULT_THRESHOLD, export_bundle
from cascade_rt.cli import CommandParser
from cascade_rt.errors import InputError, MissingExtraError


def main(argv: list[str]) -> None:
    """Parse `argv` (what follows `cascade-rt export`), export, and say what was measured."""
    options = _parser().parse_args(argv)
    with TemporaryDirectory(prefix="cascade-export-") as folder:
        members = options.member or _random_members(options, Path(folder))
        bundle = export_bundle(
            members,
            options.output,
            threshold=options.threshold,
            pair=options.pair,
            max_length=options.max_length,
            precision=_precisions(options.precision),
            check_data=options.check_data,
            max_accuracy_drop=options.max_accuracy_drop,
            provider=options.provider,
            calibrate=options.calibrate,
            overwrite=options.overwrite,
        )
    if options.json:
        print(json.dumps(bundle.to_json(), ensure_ascii=False))
        return
    for member in bundle.members:
        gate = "always emits" if member.threshold is None else f"threshold {member.threshold}"
        print(
            f"{member.name}: {member.layers} layers, {member.parameters / 1e6:.1f}M weights, {member.precision}, {gate}"
            + _compared(member.other)
        )
    print(f"{options.output}: {len(bundle.members)} members, {len(bundle.labels)} labels")


def _compared(found: Mapping[str, Any]) -> str:
    text = ""
    if "max_probability_difference" in found:
        text += f"; as a graph in fp32, probabilities within {found['max_probability_difference']:.1e} of torch"
    if "temperature" in found:
        scaled = found["temperature"]
        text += (
            f"; temperature {scaled['value']:.3f} (ECE {100 * scaled['ece']['before']:.2f} -> "
            f"{100 * scaled['ece']['after']:.2f} on the {scaled['texts']} texts that it was fitted to)"
        )
    if "check" in found:
        check = found["check"]
        text += f"; on {check['texts']} texts "
        if "labels_agree" in check:
            text += (
                f"{100 * check['labels_agree']:.2f}% of labels as the original, probabilities differ by up to "
                f"{check['max_probability_difference']:.4f}, in the mean {check['mean_probability_difference']:.5f}"
            )
        else:
            text += "no original to compare with"
        for name in ("accuracy", "dis", "ece"):
            before, after = check.get(name, {}).get("original"), check.get(name, {}).get("exported")
            if after is not None:
                text += f", {name} " + ("" if before is None else f"{100 * before:.2f} -> ") + f"{100 * after:.2f}"
    if "batch_difference" in found:
        text += f"; batch-mates change a probability by up to {found['batch_difference']:.1e}"
    return text


def _random_members(options: argparse.Namespace, folder: Path) -> list[str]:
    try:
        import transformers  # noqa: PLC0415 - slow to import

        from cascade_export.random_weights import parse_shape, write_random_members  # noqa: PLC0415 - loads torch
    except ImportError as error:
        raise MissingExtraError("cascade-rt export --random", "export", error) from None
    transformers.logging.set_verbosity_error()  # its notes on new classifier weights are no news here
    return write_random_members([parse_shape(shape) for shape in options.random], folder, tokenizer=options.tokenizer)


def _precisions(written: Sequence[str]) -> dict[str, str]:
    """Read PRECISION or MEMBER=PRECISION, as often as given."""
    pairs = [(member, precision) for member, _, precision in (item.rpartition("=") for item in written)]
    if len({member for member, _ in pairs}) < len(pairs):
        raise InputError(
            f"found --precision {', '.join(written)}; expected one for each member, and one for the others"
        )
    return dict(pairs)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="cascade-rt export",
        description="Export fine-tuned classifiers as one bundle: to ONNX by Optimum, fused by ONNX Runtime, compared "
        "with torch. The bundle appears only when every member passed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    members = parser.add_mutually_exclusive_group(required=True)
    members.add_argument(
        "--member",
        action="append",
        metavar="DIR",
        help="a Hugging Face folder or hub id, or an ONNX file or folder; one per member",
    )
    members.add_argument(
        "--random",
        action="append",
        metavar="LAYERSxHIDDEN",
        help="instead: a member with random weights, to measure hardware before training, as 2x768; one per member",
    )
    add("--tokenizer", metavar="DIR", help="with --random: whose vocabulary to use; default: a made-up one")
    add("--output", required=True, type=Path, metavar="BUNDLE", help="the bundle's folder")
    add(
        "--threshold",
        type=float,
        default=DEFAULT_THRESHOLD,
        metavar="TAU",
        help=f"of every gate, until tuned; default: {DEFAULT_THRESHOLD}",
    )
    add("--max-length", type=int, help="tokens; default: as trained, else what the model takes")
    add("--pair", action=argparse.BooleanOptionalAction, help="on pairs of texts; default: as trained, else single")
    add(
        "--precision",
        action="append",
        default=[],
        metavar="[MEMBER=]PRECISION",
        help="fp32 (default), fp16, int8, auto (the fastest that passes the check), or another of the README's table; "
        "for all members, or for the one of that name",
    )
    add(
        "--check-data",
        type=Path,
        metavar="FILE",
        help="compare finished members with their originals on these texts, labelled or not; default: what training "
        "kept for validation",
    )
    add(
        "--max-accuracy-drop",
        type=float,
        default=MAX_ACCURACY_DROP,
        metavar="POINTS",
        help=f"percentage points that a member may lose in the check; default: {MAX_ACCURACY_DROP}",
    )
    add(
        "--calibrate",
        action="store_true",
        help="scale each member's logits by the temperature that fits the check data's labels best",
    )
    add("--provider", default="cpu", help="where finished members are checked and timed; default: cpu")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    add("--json", action="store_true", help="print the manifest")
    return parser
