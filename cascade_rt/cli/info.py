"""Show a bundle's labels, members and tuning, and verify its files."""

from __future__ import annotations

import argparse
import json

from ..bundle import read_bundle
from ..engine.providers import on_exact_kernels
from .options import add_bundle
from .parser import CommandParser
from .rendering import bundle_summary, memory_line, printable, too_little_memory

SUMMARY = "show and verify a bundle"
EXAMPLE = "cascade-rt info --model-dir bundle/"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_bundle(parser)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(options: argparse.Namespace) -> None:
    """Read, verify and print."""
    bundle = read_bundle(options.model_dir, verify=options.verify, expected_sha256=options.expected_sha256)
    if options.json:
        print(json.dumps(bundle.to_json(), ensure_ascii=False))
        return
    print(printable(bundle_summary(bundle)))
    if exact := on_exact_kernels(bundle):
        print(
            f"{', '.join(exact)}: run on exact int8 kernels here (no VNNI), which are slower; members exported "
            "again in int8 need none"
        )
    print(printable(memory_line(bundle)))
    if warning := too_little_memory(bundle):
        print(warning)
    print(f"sha256 {bundle.sha256}")
    print("the sha256 of every file matches" if options.verify else "the sha256 of the files was not checked")
