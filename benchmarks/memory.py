"""Does resident memory reach a plateau? Stream many short texts of alternating lengths through `predict_iter`.

python benchmarks/memory.py --model-dir bundle/
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, run_command
from tqdm import tqdm

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.workload import texts_for
from cascade_rt.io.writers import write_json
from cascade_rt.types import Text


def main() -> None:
    """Stream, watch, write the JSON."""
    options = _parser().parse_args()
    runtime = CascadeRuntime(options.model_dir, threads=options.threads)
    pool = texts_for(runtime.bundle, options.data, options.words, 5000)
    rows: list[dict[str, float]] = []
    exits = [0] * len(runtime.bundle.members)
    start = time.perf_counter()
    with tqdm(total=options.count, unit=" texts", file=sys.stderr) as progress:
        for number, answer in enumerate(runtime.predict_iter(_endless(pool, options.count)), 1):
            exits[answer.exit] += 1
            if number % options.every == 0 or number == options.count:
                rows.append({"texts": number, "resident_mb": _resident_mb()})
                progress.update(number - progress.n)
    later = [row["resident_mb"] for row in rows if row["texts"] >= min(options.settle, options.count)]
    report: dict[str, Any] = {
        "machine": describe(),
        "bundle": options.model_dir.resolve().name,
        "texts": options.count,
        "words": options.words,
        "exits": exits,
        "seconds": round(time.perf_counter() - start, 1),
        "settled_after": options.settle,
        "growth_after_settling": max(later) / later[0] - 1,
        "resident": rows,
    }
    output = options.output or RESULTS / f"memory-{options.model_dir.resolve().name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    print(
        f"{options.count} texts, exits {exits}: {later[0]:.0f} MB after {options.settle}, then at most "
        f"{100 * report['growth_after_settling']:+.1f} %; written: {output}"
    )


def _endless(pool: list[Text], count: int) -> Iterator[Text]:
    draw = random.Random(0)
    for _ in range(count):
        yield draw.choice(pool)


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, metavar="BUNDLE")
    add("--data", type=Path, metavar="FILE", help="texts to draw from; default: made up from the vocabulary")
    add("--words", default="4:3", metavar="MEAN:SD", help="words per made-up text; default: 4:3")
    add("--count", type=int, default=1_000_000, help="texts; default: a million")
    add("--settle", type=int, default=50_000, help="texts until memory should stay; default: 50000")
    add("--every", type=int, default=10_000, help="texts between two looks; default: 10000")
    add("--threads", type=int, help="default: all usable CPUs")
    add("--output", type=Path, help="default: results/memory-BUNDLE.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
