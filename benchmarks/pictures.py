"""Pictures of the docs that show what happens inside: where a text's time goes, what leaves where, and memory.

    python benchmarks/pictures.py time --model-dir BUNDLE --input TEXTS --output benchmarks/results/time-banking77
    python benchmarks/pictures.py exits --model-dir examples/smart-home --output docs/assets/exits
    python benchmarks/pictures.py memory --output docs/assets/memory

`time` asks for texts one at a time, round by round, and takes the median of each part of a text's time. `exits` draws
the held-out texts of the built-in task by the confidence of the first member. `memory` draws what start.py measured.
`time` writes a JSON file beside its picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from cascade_train import smart_home
from common import INK, RESULTS, inked, run_command, seconds_by_part

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.errors import InputError
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.plot import pyplot
from cascade_rt.types import Text, Trace

_COLOURS = ("#2ca02c", "#1f77b4", "#d62728", "#9467bd")  # of members; seen on light and on dark pages
_TEXTS, _ROUNDS = 200, 5
_SHOWN = (0.02, 0.5, 0.98)  # which right answers of an exit are shown with their texts, by confidence
_MEMORY = {
    "2 + 12 layers of 384, fp32": ("2-12-384-fp32-weights-in-graph", "2-12-384-fp32"),
    "2 + 12 layers of 384, int8": ("2-12-384-int8-weights-in-graph", "2-12-384-int8"),
    "2 + 12 layers of 768, fp32": (None, "2-12-768-fp32"),
}


def main() -> None:
    """Measure, write, draw."""
    options = _parser().parse_args()
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    if options.picture == "time":
        if options.input is None:
            raise InputError("time requires --input")
        report = _time(options)
        write_json(output.with_suffix(".json"), report)
        _draw_time(report, output)
    elif options.picture == "exits":
        _draw_exits(_exits(options), output)
    else:
        _draw_memory(output)
    print(f"written: {output.with_suffix('.svg')}")


def _time(options: argparse.Namespace) -> dict[str, Any]:
    """Return the parts of the time of texts that leave at each member, in milliseconds."""
    traces: list[Trace] = []
    runtime = CascadeRuntime(options.model_dir, threads=options.threads, preload=True).with_trace(traces.append)
    names = [member.name for member in runtime.bundle.members]
    texts: list[Text] = [example.text for example in read_examples(options.input, pair=False)][:_TEXTS]

    def parts(text: Text) -> list[float]:
        started = perf_counter()
        runtime.predict([text])
        whole = perf_counter() - started
        trace = traces.pop()
        return [*seconds_by_part(trace, names), whole - trace.seconds]

    rounds = [[parts(text) for text in texts] for _ in range(1 + _ROUNDS)][1:]  # the first warms up
    seconds = np.median(rounds, axis=0)
    exits = np.array([prediction.exit for prediction in runtime.predict(texts)])
    columns = ["tokenization", *names, "everything else"]
    return {
        "machine": describe(),
        "texts": len(texts),
        "rounds": _ROUNDS,
        "thresholds": runtime.thresholds,
        "leaves at": {
            name: {
                "share": float(np.mean(exits == at)),
                "ms": dict(zip(columns, (1000 * seconds[exits == at].mean(axis=0)).tolist(), strict=True)),
            }
            for at, name in enumerate(names)
            if np.any(exits == at)
        },
    }


def _draw_time(report: dict[str, Any], path: Path) -> None:
    rows = report["leaves at"]
    plotting = _pyplot()
    figure, axis = plotting.subplots(figsize=(9, 0.7 * len(rows) + 1.2), layout="constrained")
    columns = list(next(iter(rows.values()))["ms"])
    colours = ["#ff7f0e", *_COLOURS[: len(columns) - 2], INK]
    for at, row in enumerate(rows.values()):
        left = 0.0
        for column, colour in zip(columns, colours, strict=True):
            axis.barh(at, row["ms"][column], left=left, color=colour, label=None if at else column)
            left += row["ms"][column]
        axis.annotate(f"{left:.2g} ms", (left, at), (6, 0), textcoords="offset points", va="center", color=INK)
    axis.set_yticks(range(len(rows)), [f"{100 * row['share']:.0f}% leave at {name}" for name, row in rows.items()])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("ms for one text, mean")
    inked(axis)
    axis.legend(fontsize=8, labelcolor=INK, frameon=False)
    figure.savefig(path.with_suffix(".svg"), transparent=True)


def _exits(options: argparse.Namespace) -> dict[str, Any]:
    """Return the held-out texts with the first member's confidence, and where they left."""
    rows = smart_home.load("heldout")
    runtime = CascadeRuntime(options.model_dir)
    texts = [text for text, _ in rows]
    first = runtime.with_members([runtime.bundle.members[0].name]).predict(texts)
    return {
        "members": [member.name for member in runtime.bundle.members],
        "threshold": runtime.thresholds[0],
        "texts": [
            {"text": text, "confidence": alone.score, "exit": found.exit, "right": found.label == label}
            for (text, label), alone, found in zip(rows, first, runtime.predict(texts), strict=True)
        ],
    }


def _draw_exits(report: dict[str, Any], path: Path) -> None:
    rows, names = report["texts"], report["members"]
    plotting = _pyplot()
    figure, axis = plotting.subplots(figsize=(9, 4), layout="constrained")
    generator = np.random.default_rng(0)
    for at, name in enumerate(names):
        for right in (True, False):
            some = [row for row in rows if row["exit"] == at and row["right"] == right]
            heights = at + generator.uniform(-0.25, 0.2, len(some))
            label = f"answered by {name}, " + ("right" if right else "wrong") + f": {len(some)}"
            marker, size = ("o", 10) if right else ("x", 30)
            axis.scatter(
                _odds([row["confidence"] for row in some]), heights, size, _COLOURS[at], marker=marker, label=label
            )
        left = sorted(
            (row for row in rows if row["exit"] == at and row["right"]), key=lambda row: float(row["confidence"])
        )
        for step, share in enumerate(_SHOWN):
            row = left[round(share * (len(left) - 1))]
            place = _odds([row["confidence"]])[0]
            axis.plot([place, place], [at + 0.2, at + 0.3 + 0.12 * step], color=_COLOURS[at], linewidth=0.7)
            axis.annotate(row["text"], (place, at + 0.31 + 0.12 * step), fontsize=8, color=INK, ha="center")
    axis.axvline(_odds([report["threshold"]])[0], color=INK, linestyle="--")
    ticks = [0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999]
    axis.set_xticks(_odds(ticks), map(str, ticks))
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.35, len(names) - 0.25)
    axis.margins(x=0.15)
    axis.set_xlabel(f"confidence of {names[0]}; dashed: its threshold")
    inked(axis)
    axis.legend(fontsize=8, labelcolor=INK, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    figure.savefig(path.with_suffix(".svg"), transparent=True)


def _odds(confidences: list[float]) -> np.ndarray:
    """Return logits, so that 0.99 and 0.999 are apart."""
    p = np.clip(confidences, 1e-4, 1 - 1e-4)
    logits: np.ndarray = np.log(p / (1 - p))
    return logits


def _draw_memory(path: Path) -> None:
    plotting = _pyplot()
    figure, axes = plotting.subplots(1, len(_MEMORY), figsize=(9, 2.6), layout="constrained")
    for axis, (title, (before, after)) in zip(axes, _MEMORY.items(), strict=True):
        bars = {"in the graph, before": _private(before, "not prepared")} if before else {}
        bars |= {"mapped": _private(after, "not prepared"), "mapped, prepared": _private(after, "prepared")}
        colours = _COLOURS[2::-1][-len(bars) :]
        drawn = axis.bar(list(bars), list(bars.values()), color=colours)
        axis.bar_label(drawn, fmt="%.0f", color=INK)
        axis.set_xticks(range(len(bars)), [name.replace(", ", ",\n") for name in bars], fontsize=8)
        axis.set_title(title, fontsize=9, color=INK)
        axis.margins(y=0.15)
        inked(axis)
    axes[0].set_ylabel("private memory, MB")
    figure.savefig(path.with_suffix(".svg"), transparent=True)


def _private(name: str, prepared: str) -> float:
    runs = json.loads((RESULTS / f"start-{name}.json").read_text("utf-8"))["runs"]
    return float(runs[f"all members, 1 text, {prepared}"]["anonymous_over_imports"])


def _pyplot() -> Any:
    plotting = pyplot()
    plotting.rcParams["svg.fonttype"] = "none"
    return plotting


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("picture", choices=("time", "exits", "memory"))
    add("--model-dir", type=Path, help="the bundle of `time` and `exits`")
    add("--input", type=Path, help="texts for `time`")
    add("--threads", type=int, help="of `time` (default: the CPUs that the process may use)")
    add("--output", type=Path, required=True, help="the picture, without extension")
    return parser


if __name__ == "__main__":
    run_command(main)
