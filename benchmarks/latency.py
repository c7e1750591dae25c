"""`cascade-rt benchmark`, with its report under results/ unless --output says otherwise.

    python benchmarks/latency.py --model-dir bundle/

Needs the runtime alone; the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cascade_rt.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument("--output")
    given, _ = parser.parse_known_args()
    arguments = sys.argv[1:]
    if given.model_dir and not given.output:
        results = Path(__file__).parent / "results"
        arguments += ["--output", str(results / f"latency-{given.model_dir.resolve().name}.json")]
    sys.exit(main(["benchmark", *arguments]))
