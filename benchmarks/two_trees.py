"""Did a change of the runtime cost speed? Two checkouts answer the same texts in one process, call by call in turn.

git worktree add ../before COMMIT
python benchmarks/two_trees.py --before ../before --model-dir bundle/ another/
"""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import RESULTS, run_command

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.benchmark.workload import spread, taus_for, texts_for
from cascade_rt.io.writers import write_json

SIZES = (1, 8, 32, 128)
SPEEDUP = 2.0  # by layers
_BEFORE, _AFTER, _AGAIN = "before", "after", "after, opened again"
_FIELDS = ("label", "score", "probabilities", "exit", "layers", "truncated")


def main() -> None:
    """Measure, print and write the JSON."""
    options = _parser().parse_args()
    with TemporaryDirectory() as folder:
        (Path(folder) / "cascade_before").symlink_to(options.before.absolute() / "cascade_rt")
        sys.path.insert(0, folder)
        before = importlib.import_module("cascade_before").CascadeRuntime
        found = {Path(bundle).name: _ratios(before, bundle, options) for bundle in options.model_dir}
    report = {"machine": describe(), "threads": options.threads, "rounds": options.rounds, "ratios": found}
    write_json(options.output, report)
    print(f"written: {options.output}")


def _ratios(before: Any, bundle: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return time over time before, by texts per call; raise ValueError where an answer differs in a bit."""
    after = partial(CascadeRuntime, bundle, threads=options.threads)
    runtimes = {_BEFORE: before(bundle, threads=options.threads), _AFTER: after(), _AGAIN: after()}
    texts = texts_for(runtimes[_AFTER].bundle, None, "16:8", max(SIZES))
    tau = taus_for(runtimes[_AFTER], runtimes[_AFTER].member_logits(texts)[0], [SPEEDUP])[SPEEDUP]
    contestants = {name: runtime.with_thresholds(tau).predict for name, runtime in runtimes.items()}
    report: dict[str, Any] = {}
    for size in SIZES:
        calls = [texts[start : start + size] for start in range(0, len(texts), size)]
        timed = in_turns(contestants, calls, options.rounds)
        answers = [
            [[getattr(one, field) for field in _FIELDS] for answer in own.answers for one in answer]
            for own in timed.values()
        ]
        if any(other != answers[0] for other in answers):
            raise ValueError(f"{bundle}: answers differ")
        seconds = {name: own.seconds.sum(axis=1) for name, own in timed.items()}
        report[str(size)] = {name: spread(seconds[name] / seconds[_BEFORE]) for name in (_AFTER, _AGAIN)}
        report[str(size)]["same code"] = spread(seconds[_AGAIN] / seconds[_AFTER])
        shown = ", ".join(
            "{} {median:.3f} ({min:.3f}-{max:.3f})".format(name, **row) for name, row in report[str(size)].items()
        )
        print(f"{Path(bundle).name}, {size} texts a call: {shown}", flush=True)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--model-dir", nargs="+", required=True, help="bundles that both can read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="after one that warms up")
    parser.add_argument("--output", type=Path, default=RESULTS / "two-trees.json")
    return parser


if __name__ == "__main__":
    run_command(main)
