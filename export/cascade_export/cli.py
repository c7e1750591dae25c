"""`cascade-rt export`: fine-tuned members -> ONNX -> bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from cascade_rt.cli import CommandParser
from cascade_rt.errors import MissingExtraError


def main(argv: list[str]) -> None:
    """Parse `argv` (what follows `cascade-rt export`), export, and say what was measured."""
    options = _parser().parse_args(argv)
    try:
        import transformers  # noqa: PLC0415 - slow to import

        from cascade_export.export import export_bundle  # noqa: PLC0415 - loads torch
        from cascade_export.random_weights import parse_shape, write_random_members  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("cascade-rt export", "export", error) from None
    transformers.logging.set_verbosity_error()  # its notes on new classifier weights are no news here
    with TemporaryDirectory(prefix="cascade-export-") as folder:
        members = options.member or write_random_members(
            [parse_shape(shape) for shape in options.random], Path(folder), tokenizer=options.tokenizer
        )
        bundle = export_bundle(
            members,
            options.output,
            threshold=options.threshold,
            pair=options.pair,
            max_length=options.max_length,
            overwrite=options.overwrite,
        )
    if options.json:
        print(json.dumps(bundle.to_json(), ensure_ascii=False))
        return
    for member in bundle.members:
        gate = "always emits" if member.threshold is None else f"threshold {member.threshold}"
        difference = member.other["max_probability_difference"]
        print(
            f"{member.name}: {member.layers} layers, {member.parameters / 1e6:.1f}M weights, {member.precision}, "
            f"{gate}, probabilities within {difference:.1e} of torch"
        )
    print(f"{options.output}: {len(bundle.members)} members, {len(bundle.labels)} labels")


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
        "--member", action="append", metavar="DIR", help="a Hugging Face folder or hub id; one per member"
    )
    members.add_argument(
        "--random",
        action="append",
        metavar="LAYERSxHIDDEN",
        help="instead: a member with random weights, to measure hardware before training, as 2x768; one per member",
    )
    add("--tokenizer", metavar="DIR", help="with --random: whose vocabulary to use; default: a made-up one")
    add("--output", required=True, type=Path, metavar="BUNDLE", help="the bundle's folder")
    add("--threshold", type=float, default=0.9, metavar="TAU", help="of every gate, until tuned; default: 0.9")
    add("--max-length", type=int, help="tokens; default: as trained, else what the model takes")
    add("--pair", action=argparse.BooleanOptionalAction, help="on pairs of texts; default: as trained, else single")
    add("--overwrite", action="store_true", help="replace an existing bundle")
    add("--json", action="store_true", help="print the manifest")
    return parser
