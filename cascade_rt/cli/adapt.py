"""Measure a bundle under all settings of execution that this machine has, and keep the fastest beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..benchmark.adapt import adapt
from ..bundle import read_bundle
from ..engine.adapted import keep
from ..engine.execution import Execution
from .options import add_model_dir
from .parser import CommandParser
from .rendering import table

SUMMARY = "find a bundle's fastest settings on this machine"
EXAMPLE = "cascade-rt adapt --model-dir bundle/"


def add_arguments(parser: CommandParser) -> None:
    """Add the options."""
    add_model_dir(parser)
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="texts to measure on (default: synthetic, from the vocabulary)")
    parser.reads("data")
    add("--words", default="10:5", metavar="MEAN:SD", help="words per synthetic text")
    add("--dry-run", action="store_true", help="measure, and write nothing")
    add("--json", action="store_true", help="print the measurements as JSON")


def run(options: argparse.Namespace) -> None:
    """Measure, keep the fastest, print all."""
    found = adapt(options.model_dir, data=options.data, words=options.words)
    best = found[0].execution
    measured = [{**_settings(one.execution), "alone_ms": one.alone_ms, "bulk_ms": one.bulk_ms} for one in found]
    file = None if options.dry_run else keep(read_bundle(options.model_dir, verify=False), best, measured)
    if options.json:
        print(json.dumps({**_settings(best), "measured": measured}))
        return
    rows = [
        [
            one.execution.provider,
            str(one.execution.threads),
            "no" if one.execution.spin_us == 0 else "yes",
            f"{one.alone_ms:.3f}",
            f"{one.bulk_ms:.3f}",
        ]
        for one in found
    ]
    print(table(["provider", "threads", "spinning", "ms, one text", "ms a text, in bulk"], rows))
    if file is not None:
        spinning = " that do not spin" if best.spin_us == 0 else ""
        print(f"predict, evaluate and serve now take {best.provider} with {best.threads} threads{spinning}: {file}")


def _settings(execution: Execution) -> dict[str, Any]:
    return {"provider": execution.provider, "threads": execution.threads, "spin_us": execution.spin_us}
