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
    bundle = parser.parse_known_args()[0].model_dir
    results = Path(__file__).parent / "results"
    default = ["--output", str(results / f"latency-{bundle.resolve().name}.json")] if bundle else []
    sys.exit(main(["benchmark", *default, *sys.argv[1:]]))
