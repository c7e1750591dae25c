"""Texts per second and core through `predict_iter`, and where their time goes.

    python benchmarks/stream.py --model-dir BUNDLE --input TEXTS

Two ways take turns on one thread: the first member alone, and the cascade at its thresholds. The texts of the file are
repeated up to --texts. Writes a JSON file with the microseconds of tokenization, of each member and of everything else.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, run_command, seconds_by_part

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.benchmark.workload import spread
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.types import Text, Trace

_ROUNDS = 5


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", required=True, metavar="BUNDLE", help="a tuned bundle")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="texts")
    parser.add_argument("--texts", type=int, default=20_000, help="so many, repeated where the file has fewer")
    parser.add_argument("--output", type=Path, default=RESULTS / "stream.json", metavar="FILE")
    options = parser.parse_args()
    known: list[Text] = [example.text for example in read_examples(options.input, pair=False)]
    texts = [known[at % len(known)] for at in range(options.texts)]
    cascade = CascadeRuntime(options.model_dir, threads=1, preload=True)
    first = cascade.bundle.members[0].name
    traces: dict[str, list[Trace]] = {f"{first} alone": [], "cascade": []}
    ways = {
        name: runtime.with_trace(traces[name].append)
        for name, runtime in zip(traces, (cascade.with_members([first]), cascade), strict=True)
    }

    def reading(runtime: CascadeRuntime) -> Callable[[list[Text]], Any]:
        return lambda some: deque(runtime.predict_iter(iter(some)), maxlen=0)

    timed = in_turns({name: reading(runtime) for name, runtime in ways.items()}, [texts], _ROUNDS)
    report: dict[str, Any] = {"machine": describe(), "texts": len(texts), "different": len(known), "ways": {}}
    for name, runtime in ways.items():
        seconds = timed[name].seconds[:, 0]
        counted = traces[name][len(traces[name]) // (1 + _ROUNDS) :]  # not those of the round that warmed up
        report["ways"][name] = {
            "texts_per_second": spread(len(texts) / seconds),
            "us_per_text": _parts(runtime, counted, float(seconds.mean()), len(texts)),
            "exits": runtime.stats().exits,
        }
        print(f"{name}: {np.median(len(texts) / seconds):.0f} texts per second; {report['ways'][name]['us_per_text']}")
    write_json(options.output, report)
    print(f"written: {options.output}")


def _parts(runtime: CascadeRuntime, traces: list[Trace], seconds: float, texts: int) -> dict[str, float]:
    """Return microseconds per text, means over all rounds; the rest is the difference from the time of a round."""
    names = [member.name for member in runtime.bundle.members]
    parts = np.sum([seconds_by_part(trace, names) for trace in traces], axis=0)
    answered = sum(trace.texts for trace in traces)
    each = {
        name: round(1e6 * part / answered, 2)
        for name, part in zip(["tokenization", *names], parts.tolist(), strict=True)
    }
    return each | {"everything else": round(1e6 * seconds / texts - sum(each.values()), 2)}


if __name__ == "__main__":
    run_command(main)
