"""Measure a bundle on this machine: how much of the layer speed-up is realised on the clock?

For each layer speed-up that the bundle can reach, tau is chosen on the given texts; then the cascade and its biggest
member alone answer the same texts in turn, on the same engine, threads and micro-batches.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.cost import flops_speedup, layer_speedup
from ..engine.cpus import usable_threads
from ..errors import InvalidOption
from ..io.readers import AS_USUAL, Reading
from ..runtime import CascadeRuntime
from ..tuning.collect import check_thresholds, open_whole
from ..tuning.plot import pyplot
from ..types import Text, Trace
from .alone import alone
from .machine import describe
from .workload import peak_memory_mb, predict_command, reachable, seconds_of, spread, taus_for, texts_for

BULK = "bulk"
BIG = "big"


def measure_latency(
    model_dir: str | Path,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    provider_options: Mapping[str, str] | None = None,
    verify: bool = True,
    expected_sha256: str | None = None,
    data: Path | None = None,
    reading: Reading = AS_USUAL,
    words: str = "16:8",
    count: int = 256,
    speedups: Sequence[float] = (1.5, 2, 3, 4, 5),
    batch_sizes: Sequence[int] = (1, 8, 32),
    rounds: int = 5,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Return a report as plain values for JSON; keys of `batches` are texts per call, then layer speed-ups.

    All members of the bundle take part, whatever tuning chose; thresholds are those that reach the speed-ups. `data`:
    file of texts, read as `reading` says, None for synthetic ones with `words` words ("MEAN:SD"); `count`: how many
    texts; `rounds`: after one that warms up; `progress` is called with the rounds done and their total. Raises
    InvalidOption for a value out of range, and InputError for a bundle without thresholds.
    """
    for field, least in (("rounds", rounds), ("batch_sizes", min(batch_sizes, default=1))):
        if least < 1:
            raise InvalidOption(field, least, "at least 1")
    settings: dict[str, Any] = {"provider": provider, "threads": threads, "provider_options": provider_options}
    cascade = open_whole(model_dir, preload=True, verify=verify, expected_sha256=expected_sha256, **settings)
    bundle = cascade.bundle
    check_thresholds(cascade.exit_rule)
    name = (bundle.folder or Path(model_dir)).resolve().name
    texts = texts_for(bundle, data, words, count, reading=reading)
    logits, lengths = cascade.member_logits(texts)
    taus = taus_for(cascade, logits, reachable(bundle, list(speedups)))
    contestants = {BIG: alone(cascade, len(bundle.members) - 1)}
    contestants |= {str(speedup): cascade.with_thresholds(tau) for speedup, tau in taus.items()}
    report: dict[str, Any] = {
        "machine": describe(),
        "bundle": {
            "name": name,
            "members": [f"{member.layers}L-{member.hidden_size} {member.precision}" for member in bundle.members],
        },
        "threads": usable_threads(threads),
        "provider": provider,
        "texts": {
            "count": len(texts),
            "from": data.name if data else f"synthetic, words {words}",
            "tokens": {f"p{q}": float(np.percentile(lengths, q)) for q in (5, 50, 95)},
        },
        "rounds": rounds,
        "taus": {str(speedup): tau for speedup, tau in taus.items()},
        "batches": {},
    }
    sizes = [*batch_sizes, len(texts)]
    steps = iter(range(1, 1 + len(sizes) * (rounds + 1)))
    for size in sizes:
        report["batches"][BULK if size == len(texts) else str(size)] = _compared(
            contestants, texts, lengths, size, rounds, lambda: progress(next(steps), len(sizes) * (rounds + 1))
        )
    report["overhead"] = _overhead(cascade.with_thresholds(0.0), texts)
    options = ["--provider", provider, "--threads", str(usable_threads(threads))]
    for key, value in (provider_options or {}).items():
        options += ["--provider-option", f"{key}={value}"]
    report["cold_start"] = _cold_start(model_dir, texts[0], options)
    return report


def _compared(
    contestants: dict[str, CascadeRuntime],
    texts: list[Text],
    lengths: np.ndarray,
    size: int,
    rounds: int,
    progress: Callable[[], object],
) -> dict[str, Any]:
    """Time every contestant on the same calls of `size` texts, in turn; the first round warms up."""
    names = list(contestants)
    calls = [texts[start : start + size] for start in range(0, len(texts), size)]
    seconds: dict[str, list[list[float]]] = defaultdict(list)
    exits: dict[str, list[int]] = {}
    for round_ in range(rounds + 1):
        measured: dict[str, list[float]] = defaultdict(list)
        exits = defaultdict(list)
        for number, call in enumerate(calls):
            turn = (number + round_) % len(names)  # so that none always runs after the same other
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                answers = contestants[name].predict(call)
                measured[name].append(time.perf_counter() - start)
                exits[name] += [answer.exit for answer in answers]
        if round_:
            for name, durations in measured.items():
                seconds[name].append(durations)
        progress()
    total = {name: np.sum(durations, axis=1) for name, durations in seconds.items()}  # per round
    outcome: dict[str, Any] = {BIG: _latency(seconds[BIG], total[BIG], len(texts))}
    for name in names[1:]:
        members = contestants[name].bundle.members
        left = np.array(exits[name], dtype=np.intp)
        ratios = total[BIG] / total[name]
        layers = layer_speedup(members, left)
        outcome[name] = _latency(seconds[name], total[name], len(texts)) | {
            "exits": np.bincount(left, minlength=len(members)).tolist(),
            "layer_speedup": layers,
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


def _overhead(runtime: CascadeRuntime, texts: list[Text]) -> dict[str, Any]:
    """Time of `predict` over the sum of its calls of the tokenizers library and ONNX Runtime; first member only."""
    traces: list[Trace] = []
    traced = runtime.with_trace(traces.append)
    traced.predict(texts)  # warms up
    outcome = {}
    for name, calls in (("1", [[text] for text in texts]), (BULK, [texts] * 5)):
        ratios = []
        for call in calls:
            start = time.perf_counter()
            traced.predict(call)
            total = time.perf_counter() - start
            trace = traces.pop()
            ratios.append(total / (trace.tokenization_seconds + sum(run.seconds for run in trace.runs)))
        outcome[name] = spread(np.array(ratios))
    return outcome


def _cold_start(model_dir: str | Path, text: Text, options: Sequence[str], runs: int = 5) -> dict[str, Any]:
    """Seconds from process start to the answer of `cascade-rt predict`, and peak memory: small member, and all."""
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
        points = [row for name, row in rows.items() if name != BIG]
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
