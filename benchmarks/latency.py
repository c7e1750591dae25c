"""Does the layer speed-up arrive on the clock? Measure a bundle on this machine.

    python benchmarks/latency.py --model-dir bundle/

For each layer speed-up that the bundle can reach, tau is chosen on the given texts; then the cascade and its
biggest member alone answer the same texts in turn, on the same engine, threads and batching. Needs the runtime
alone; with matplotlib installed it draws a picture too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from tqdm import tqdm
from workload import peak_memory_mb, predict_command, reachable, run_command, seconds_of, spread, taus_for, texts_for

from cascade_rt import CascadeRuntime
from cascade_rt.cost import flops_speedup
from cascade_rt.cpus import usable_threads
from cascade_rt.records import Text, write_json

RESULTS = Path(__file__).parent / "results"
BULK = "bulk"
BIG = "big"


def main() -> None:
    """Measure, print a table, write the JSON and the picture."""
    options = _parser().parse_args()
    folder: Path = options.model_dir
    cascade = CascadeRuntime(folder, threads=options.threads, provider=options.provider, preload=True)
    members = cascade.bundle.members
    alone = CascadeRuntime(
        folder, threads=options.threads, provider=options.provider, members=[members[-1].name], preload=True
    )
    texts = texts_for(folder, cascade.bundle, options.data, options.words, options.texts)
    logits, lengths = cascade.member_logits(texts)
    taus = taus_for(cascade.bundle, logits, reachable(cascade.bundle, options.speedup))
    report: dict[str, Any] = {
        "machine": describe(),
        "bundle": {
            "name": folder.resolve().name,
            "members": [f"{member.layers}L-{member.hidden_size} {member.precision}" for member in members],
        },
        "threads": usable_threads(options.threads),
        "provider": options.provider,
        "texts": {
            "count": len(texts),
            "from": options.data.name if options.data else f"made up, words {options.words}",
            "tokens": {f"p{q}": float(np.percentile(lengths, q)) for q in (5, 50, 95)},
        },
        "rounds": options.rounds,
        "taus": {str(speedup): tau for speedup, tau in taus.items()},
    }
    sizes = [*options.batch_size, len(texts)]
    with tqdm(total=len(sizes) * (options.rounds + 1), unit=" rounds", file=sys.stderr) as progress:
        report["batches"] = {
            BULK if size == len(texts) else str(size): _compared(
                cascade, alone, texts, lengths, taus, size, options.rounds, progress
            )
            for size in sizes
        }
    report["overhead"] = _overhead(CascadeRuntime(folder, threads=options.threads, thresholds=0.0), texts)
    report["cold_start"] = _cold_start(folder, texts[0])
    output = options.output or RESULTS / f"latency-{folder.resolve().name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, report)
    _show(report)
    drawn = _draw(report, output.with_suffix(".png"))
    print(f"written: {output}" + (f", {output.with_suffix('.png')}" if drawn else " (no picture: no matplotlib)"))


def _compared(
    cascade: CascadeRuntime,
    alone: CascadeRuntime,
    texts: list[Text],
    lengths: np.ndarray,
    taus: dict[float, float],
    size: int,
    rounds: int,
    progress: Any,
) -> dict[str, Any]:
    """Time every contestant on the same calls of `size` texts, in turn; the first round warms up."""
    gates = len(cascade.thresholds)
    contestants: list[tuple[str, CascadeRuntime, list[float]]] = [(BIG, alone, [])]
    contestants += [(str(speedup), cascade, [tau] * gates) for speedup, tau in taus.items()]
    calls = [texts[start : start + size] for start in range(0, len(texts), size)]
    seconds: dict[str, list[list[float]]] = defaultdict(list)
    exits: dict[str, list[int]] = {}
    for round_ in range(rounds + 1):
        measured: dict[str, list[float]] = defaultdict(list)
        exits = defaultdict(list)
        for number, call in enumerate(calls):
            turn = (number + round_) % len(contestants)  # nobody always runs after the same other
            for name, runtime, thresholds in contestants[turn:] + contestants[:turn]:
                runtime.thresholds = thresholds
                start = time.perf_counter()
                answers = runtime.predict(call)
                measured[name].append(time.perf_counter() - start)
                exits[name] += [answer.exit for answer in answers]
        if round_:
            for name, durations in measured.items():
                seconds[name].append(durations)
        progress.update()
    total = {name: np.sum(durations, axis=1) for name, durations in seconds.items()}  # per round
    outcome: dict[str, Any] = {BIG: _latency(seconds[BIG], total[BIG], len(texts))}
    members = cascade.bundle.members
    path = np.cumsum([member.layers for member in members])
    for name in map(str, taus):
        left = np.array(exits[name], dtype=np.intp)
        ratios = total[BIG] / total[name]
        layers = len(texts) * members[-1].layers / path[left].sum()
        outcome[name] = _latency(seconds[name], total[name], len(texts)) | {
            "exits": np.bincount(left, minlength=len(members)).tolist(),
            "layer_speedup": float(layers),
            "flops_speedup": flops_speedup(members, left, lengths),
            "wall_speedup": spread(ratios),
            "realised": spread(ratios / layers),
        }
    return outcome


def _latency(rounds: list[list[float]], totals: np.ndarray, texts: int) -> dict[str, Any]:
    """Milliseconds that a text waits for its call, and texts per second."""
    waits = 1e3 * np.array(rounds).ravel()
    return {
        "ms_per_call": {f"p{q}": float(np.percentile(waits, q)) for q in (50, 95, 99)},
        "texts_per_second": spread(texts / totals),
    }


class _Clock:
    """Stands before an object and adds up the time that calls of its methods take."""

    def __init__(self, inner: Any, spent: list[float]) -> None:
        self._inner, self._spent = inner, spent

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._inner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            answer = method(*arguments)
            self._spent[0] += time.perf_counter() - start
            return answer

        return timed


def _overhead(runtime: CascadeRuntime, texts: list[Text]) -> dict[str, Any]:
    """Time of `predict` over the sum of the tokenizer call and the `session.run`s that it made; first member only."""
    spent = [0.0]
    runtime.predict(texts)  # loads, warms up
    runtime._members[0].session = _Clock(runtime._members[0].session, spent)
    runtime._tokenizer._tokenizer = _Clock(runtime._tokenizer._tokenizer, spent)
    outcome = {}
    for name, calls in (("1", [[text] for text in texts]), (BULK, [texts] * 5)):
        ratios = []
        for call in calls:
            spent[0] = 0.0
            start = time.perf_counter()
            runtime.predict(call)
            ratios.append((time.perf_counter() - start) / spent[0])
        outcome[name] = spread(np.array(ratios))
    return outcome


def _cold_start(folder: Path, text: Text, runs: int = 5) -> dict[str, Any]:
    """Seconds from process start to the answer of `cascade-rt predict`, and peak memory: small member, and all."""
    outcome = {}
    for name, tau in (("first member answers", 0), ("all members run", 1)):
        command = predict_command(folder, tau, text)
        seconds = [seconds_of(command) for _ in range(runs + 1)][1:]
        outcome[name] = {"seconds": spread(np.array(seconds)), "peak_memory_mb": peak_memory_mb(command)}
    return outcome


def _show(report: dict[str, Any]) -> None:
    print(f"{report['bundle']['members']} on {report['machine']['processor']}, {report['threads']} threads")
    headers = f"{'batch':>5} {'':>6} {'layers':>7} {'FLOPs':>6} {'wall':>6} {'realised':>18}"
    print(f"{headers} {'p50':>8} {'p95':>8} {'p99':>8} ms {'texts/s':>9}")
    for size, rows in report["batches"].items():
        for name, row in rows.items():
            waits = " ".join(f"{row['ms_per_call'][q]:8.2f}" for q in ("p50", "p95", "p99"))
            speed = f"{row['texts_per_second']['median']:9.1f}"
            if name == BIG:
                print(f"{size:>5} {'big':>6} {'1.00x':>7} {'1.00x':>6} {'1.00x':>6} {'':>18} {waits}    {speed}")
                continue
            realised = "{median:.2f} ({min:.2f}-{max:.2f})".format(**row["realised"])
            print(
                f"{size:>5} {name:>5}x {row['layer_speedup']:6.2f}x {row['flops_speedup']:5.2f}x "
                f"{row['wall_speedup']['median']:5.2f}x {realised:>18} {waits}    {speed}"
            )
    for size, ratio in report["overhead"].items():
        print(f"predict over its tokenizer call and session.runs, batch {size}: {ratio['median']:.3f}")
    for name, row in report["cold_start"].items():
        print(f"cold start, {name}: {row['seconds']['median']:.2f} s, peak {row['peak_memory_mb']} MB")


def _draw(report: dict[str, Any], path: Path) -> bool:
    try:
        import matplotlib as mpl  # noqa: PLC0415 - optional

        mpl.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError:
        return False
    figure, axes = pyplot.subplots(figsize=(6.4, 5))
    furthest = 1.0
    for size, rows in report["batches"].items():
        points = [row for name, row in rows.items() if name != BIG]
        layers = [row["layer_speedup"] for row in points]
        wall = [row["wall_speedup"] for row in points]
        middle = np.array([ratio["median"] for ratio in wall])
        spread = [middle - [ratio["min"] for ratio in wall], [ratio["max"] for ratio in wall] - middle]
        axes.errorbar(layers, middle, yerr=spread, marker="o", capsize=2, label=f"batch {size}")
        furthest = max([furthest, *layers, *middle])
    axes.plot([1, furthest], [1, furthest], color="grey", linestyle="--", label="wall = layers")
    for paper in (2, 3, 4):
        axes.axvline(paper, color="lightgrey", linewidth=1, zorder=0)
        axes.text(paper, 1, f"paper's {paper}x", rotation=90, va="bottom", ha="right", color="grey", fontsize=8)
    axes.set(xlabel="speed-up by layers", ylabel="speed-up on the clock", title=" + ".join(report["bundle"]["members"]))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, metavar="BUNDLE")
    add("--data", type=Path, metavar="FILE", help="texts to measure on; default: made up from the vocabulary")
    add("--words", default="16:8", metavar="MEAN:SD", help="words per made-up text; default: 16:8")
    add("--texts", type=int, default=256, help="how many; default: 256")
    add("--speedup", type=float, nargs="+", default=[1.5, 2, 3, 4, 5], help="layer speed-ups; default: 1.5 2 3 4 5")
    add("--batch-size", type=int, nargs="+", default=[1, 8, 32], help="besides bulk; default: 1 8 32")
    add("--rounds", type=int, default=5, help="after one that warms up; default: 5")
    add("--threads", type=int, help="default: all usable CPUs")
    add("--provider", default="cpu")
    add("--output", type=Path, help="default: results/latency-BUNDLE.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
