"""Measure a bundle on this machine: the part of the layer speed-up that is realised on the clock.

For each layer speed-up that the bundle can reach, tau is chosen on the given texts; then the cascade and its biggest
member alone answer the same texts in turn, on the same engine, threads and micro-batches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..engine.cost import flops_speedup, layer_speedup
from ..engine.cpus import usable_threads
from ..engine.execution import Execution
from ..runtime import CascadeRuntime
from ..tuning.collect import check_thresholds, open_whole
from ..tuning.plot import pyplot
from ..types import Prediction, Text, Trace
from .alone import alone
from .machine import describe
from .turns import Timed, in_turns
from .workload import Workload, peak_memory_mb, predict_command, reachable, seconds_of, spread, taus_for, texts_for

BULK = "bulk"
BIG = "big"


def measure_latency(
    model_dir: str | Path,
    workload: Workload,
    execution: Execution,
    *,
    verify: bool = True,
    expected_sha256: str | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Return a report as plain values for JSON; keys of `batches` are texts per call, then layer speed-ups.

    All members of the bundle take part, whatever tuning chose; thresholds are those that reach the speed-ups.
    `progress` is called with the rounds done and their total. Raises InputError for a bundle without thresholds.
    """
    cascade = open_whole(
        model_dir, preload=True, verify=verify, expected_sha256=expected_sha256, **execution.arguments()
    )
    bundle = cascade.bundle
    check_thresholds(cascade.exit_rule)
    name = (bundle.folder or Path(model_dir)).resolve().name
    texts = texts_for(bundle, workload.data, workload.words, workload.count, reading=workload.reading)
    logits, lengths = cascade.member_logits(texts)
    taus = taus_for(cascade, logits, reachable(bundle, list(workload.speedups)))
    contestants = {BIG: alone(cascade, len(bundle.members) - 1)}
    contestants |= {str(speedup): cascade.with_thresholds(tau) for speedup, tau in taus.items()}
    report: dict[str, Any] = {
        "machine": describe(),
        "bundle": {
            "name": name,
            "members": [f"{member.layers}L-{member.hidden_size} {member.precision}" for member in bundle.members],
        },
        "threads": usable_threads(execution.threads),
        "provider": execution.provider,
        "texts": {
            "count": len(texts),
            "from": workload.data.name if workload.data else f"synthetic, words {workload.words}",
            "tokens": {f"p{q}": float(np.percentile(lengths, q)) for q in (5, 50, 95)},
        },
        "rounds": workload.rounds,
        "taus": {str(speedup): tau for speedup, tau in taus.items()},
        "batches": {},
    }
    sizes = [*workload.batch_sizes, len(texts)]
    total = len(sizes) * (workload.rounds + 1)
    done = itertools.count(1)
    for size in sizes:
        timed = in_turns(
            {name: runtime.predict for name, runtime in contestants.items()},
            [texts[start : start + size] for start in range(0, len(texts), size)],
            workload.rounds,
            progress=lambda: progress(next(done), total),
        )
        report["batches"][BULK if size == len(texts) else str(size)] = _compared(bundle, timed, lengths)
    report["overhead"], report["first_member"] = _first_member(cascade.with_thresholds(0.0), texts)
    options = ["--provider", execution.provider, "--threads", str(usable_threads(execution.threads))]
    for key, value in (execution.provider_options or {}).items():
        options += ["--provider-option", f"{key}={value}"]
    report["cold_start"] = _cold_start(model_dir, texts[0], options)
    return report


def _compared(bundle: Bundle, timed: Mapping[str, Timed[list[Prediction]]], lengths: np.ndarray) -> dict[str, Any]:
    """Return the times of every contestant, and its speed-ups over the biggest member alone."""
    outcome: dict[str, Any] = {}
    for name, own in timed.items():
        waits, total = 1e3 * own.seconds, own.seconds.sum(axis=1)
        outcome[name] = {
            "ms_per_call": {f"p{q}": float(np.percentile(waits, q)) for q in (50, 95, 99)},
            "texts_per_second": spread(len(lengths) / total),
        }
        if name == BIG:
            continue
        left = np.array([answer.exit for answers in own.answers for answer in answers], dtype=np.intp)
        ratios = timed[BIG].seconds.sum(axis=1) / total
        layers = layer_speedup(bundle.members, left)
        outcome[name] |= {
            "exits": np.bincount(left, minlength=len(bundle.members)).tolist(),
            "layer_speedup": layers,
            "flops_speedup": flops_speedup(bundle.members, left, lengths),
            "wall_speedup": spread(ratios),
            "realised": spread(ratios / layers) if layers else None,
        }
    return outcome


def _first_member(runtime: CascadeRuntime, texts: list[Text]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what texts cost that leave at the first member, by texts per call.

    First the time of `predict` over the sum of its calls of tokenizers and the engine; then its milliseconds per text
    in tokenization and beyond, and its time over that of tokenization.
    """
    traces: list[Trace] = []
    traced = runtime.with_trace(traces.append)
    overhead, parts = {}, {}
    for name, calls in (("1", [[text] for text in texts]), (BULK, [texts] * 5)):
        traced.predict(calls[0])  # warms up
        traces.clear()
        totals = []
        for call in calls:
            start = time.perf_counter()
            traced.predict(call)
            totals.append(time.perf_counter() - start)
        total, each = np.array(totals), 1e3 / len(calls[0])
        tokenization = np.array([trace.tokenization_seconds for trace in traces])
        overhead[name] = spread(total / [trace.seconds for trace in traces])
        parts[name] = {
            "tokenization_ms": spread(each * tokenization),
            "beyond_tokenization_ms": spread(each * (total - tokenization)),
            "over_tokenization": spread(total / tokenization),
        }
    return overhead, parts


def _cold_start(model_dir: str | Path, text: Text, options: Sequence[str], runs: int = 5) -> dict[str, Any]:
    """Return seconds from process start to the answer of `cascade-rt predict`, and peak memory: small member, all."""
    outcome = {}
    for name, tau in (("first member answers", 0), ("all members run", 1)):
        command = predict_command(model_dir, tau, text, options)
        seconds = [seconds_of(command) for _ in range(runs + 1)][1:]
        outcome[name] = {"seconds": spread(np.array(seconds)), "peak_memory_mb": peak_memory_mb(command)}
    return outcome


def draw_latency(report: dict[str, Any], path: Path) -> None:
    """Draw the speed-up on the clock over the speed-up by layers; raise MissingExtraError without matplotlib."""
    plotting = pyplot()
    figure, axes = plotting.subplots(figsize=(6.4, 5))
    furthest = 1.0
    for size, rows in report["batches"].items():
        points = [row for name, row in rows.items() if name != BIG and row["layer_speedup"]]
        layers = [row["layer_speedup"] for row in points]
        wall = [row["wall_speedup"] for row in points]
        middle = np.array([ratio["median"] for ratio in wall])
        around = [middle - [ratio["min"] for ratio in wall], [ratio["max"] for ratio in wall] - middle]
        axes.errorbar(layers, middle, yerr=around, marker="o", capsize=2, label=f"batch {size}")
        furthest = max([furthest, *layers, *middle])
    axes.plot([1, furthest], [1, furthest], color="grey", linestyle="--", label="wall = layers")
    for paper in (2, 3, 4):
        axes.axvline(paper, color="lightgrey", linewidth=1, zorder=0)
        axes.text(paper, 1, f"paper's {paper}x", rotation=90, va="bottom", ha="right", color="grey", fontsize=8)
    axes.set(xlabel="speed-up by layers", ylabel="speed-up on the clock", title=" + ".join(report["bundle"]["members"]))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plotting.close(figure)
