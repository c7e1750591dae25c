"""Write a bundle as one ONNX file that decides about exits itself, for other languages and browsers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cascade_rt.bundle import Bundle
from cascade_rt.cli.options import add_model_dir
from cascade_rt.cli.parser import CommandParser
from cascade_rt.errors import MissingExtraError

SUMMARY = "write a bundle as one ONNX file, for other languages and browsers (extra: export)"
EXAMPLE = "cascade-rt pack --model-dir bundle/ --output cascade.onnx"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add_model_dir(parser)
    add("--output", required=True, type=Path, metavar="FILE", help="the ONNX file")
    parser.writes("output")
    add("--overwrite", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> None:
    """Write the file, and print what it holds."""
    print(packed(options.model_dir, options.output, overwrite=options.overwrite))


def packed(model_dir: str | Path, output: Path, *, overwrite: bool) -> str:
    """Write a bundle as one file; return a line that says what it holds."""
    try:
        from cascade_export.single_file import pack  # noqa: PLC0415 - loads onnx
    except ImportError as error:
        raise MissingExtraError("writing one ONNX file", "export", error) from error
    bundle = pack(model_dir, output, overwrite=overwrite)
    members = ", ".join(f"{entry.name} ({entry.layers}L {entry.precision})" for entry in bundle.members)
    line = f"{output}: {members}; {len(bundle.labels)} labels, {output.stat().st_size / 1e6:.1f} MB"
    kind = _tokenizer_kind(bundle)
    if kind == "WordPiece":
        return line
    return f"{line}\nits tokenizer is {kind}: the npm package refuses it; libraries that read tokenizer.json take it"


def _tokenizer_kind(bundle: Bundle) -> str:
    """Return the kind of model in a bundle's tokenizer.json, for instance BPE."""
    if bundle.folder is None:
        raise ValueError("found a bundle that was not read from a folder")
    file = bundle.folder / bundle.tokenizer_file
    return str(json.loads(file.read_text("utf-8"))["model"]["type"])
