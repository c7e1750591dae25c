"""Read long texts in windows, and measure what that brings over cutting them, and what it takes.

    python benchmarks/long_texts.py --model-dir BUNDLE --opinions FOLDER/dev.tsv --filler commands.txt

There are no long texts in the data of these benchmarks, so they are made of short ones: `mixed`, sentences of which 65%
have the label of the text; and `late`, a text that says nothing about the label but for its last sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from common import run_command

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.alone import alone
from cascade_rt.benchmark.machine import describe
from cascade_rt.io.readers import Reading, read_examples
from cascade_rt.io.writers import output_path, write_json
from cascade_rt.tuning.evaluation import label_ids

SHARE = 0.65  # of the sentences of a mixed text that have its label
MIXED, LATE = "mixed", "late"


def main() -> None:
    """Make the texts, answer them in all ways, time some of them, and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, help="a bundle on single texts")
    add("--opinions", type=Path, required=True, help="labelled sentences")
    add("--filler", type=Path, required=True, help="sentences that say nothing about the labels, one a line")
    add("--stride", type=int, default=32, help="tokens that two windows share")
    add("--tokens", type=int, default=2000, help="length of the texts")
    add("--kinds", nargs="+", choices=(MIXED, LATE), default=(MIXED, LATE), help="kinds of texts")
    add("--texts", type=int, default=80, help="texts of each kind")
    add("--timed", type=int, default=10, help="texts of each kind that are timed too, one at a time")
    add("--seed", type=int, default=0, help="random seed of the texts")
    add("--output", type=Path, default=Path("long-texts.json"), help="the report")
    options = parser.parse_args()
    output = output_path(options.output)
    cut = CascadeRuntime(options.model_dir, threads=1, preload=True)
    last = alone(cut, len(cut.bundle.members) - 1)
    ways = {"cascade, cut": cut, f"{last.bundle.members[-1].name} alone, cut": last}
    ways |= {f"cascade, {how}": cut.with_stride(options.stride, how) for how in ("mean", "max")}
    report: dict[str, Any] = {"machine": describe(), "stride": options.stride, "tokens": options.tokens}
    report["max_length"], report["kinds"] = cut.bundle.max_length, {}
    draw = np.random.default_rng(options.seed)
    for kind in options.kinds:
        rows = list(made(cut, kind, options, draw))
        report["kinds"][kind] = measured(ways, [text for text, _ in rows], [label for _, label in rows], options)
        write_json(output, report)
    print(f"written: {output}")


def made(
    runtime: CascadeRuntime, kind: str, options: argparse.Namespace, draw: np.random.Generator
) -> Iterator[tuple[str, int]]:
    """Yield texts of a kind, each with its label as a class id; both labels equally often."""
    opinions = list(read_examples(options.opinions, Reading(), pair=False))
    labels = label_ids([(Reading().label_of(row), row.where) for row in opinions], runtime.bundle.labels)
    filler = [row.text for row in read_examples(options.filler, Reading(), pair=False)]
    lengths = runtime.plan.tokenizer.encode([row.text for row in opinions]).lengths - 2
    filler_lengths = runtime.plan.tokenizer.encode(filler).lengths - 2
    for number in range(options.texts):
        label = number % len(runtime.bundle.labels)
        same, others = np.flatnonzero(labels == label), np.flatnonzero(labels != label)
        parts: list[Any] = []
        tokens = 0
        if kind == LATE:
            for at in draw.permutation(len(filler)).tolist():
                if (tokens := tokens + int(filler_lengths[at])) > options.tokens:
                    break
                parts.append(filler[at])
            yield " ".join([*parts, str(opinions[int(draw.choice(same))].text)]), label
            continue
        while not parts or sum(labels[at] == label for at in parts) * 2 <= len(parts):
            pools = [draw.permutation(pool).tolist() for pool in (same, others)]
            parts, tokens = [], 0
            while tokens < options.tokens:
                parts.append(pools[int(draw.random() >= SHARE)].pop())
                tokens += int(lengths[parts[-1]])
        yield " ".join(str(opinions[at].text) for at in parts), label


def measured(
    ways: dict[str, CascadeRuntime], texts: Sequence[str], labels: Sequence[int], options: argparse.Namespace
) -> dict[str, Any]:
    """Return accuracy, exits, layers and milliseconds of CPU time per text of each way, which take turns."""
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for text in texts[: options.timed]:
        for name, runtime in ways.items():
            started = process_time()  # one thread computes: on an idle machine, the time that passes
            runtime.predict([text])
            seconds[name].append(process_time() - started)
    for name, counted in ways.items():
        runtime = counted.with_trace(None)  # counts from zero
        answers, names = runtime.predict(texts), runtime.bundle.labels
        right = [answer.label == names[label] for answer, label in zip(answers, labels, strict=True)]
        found[name] = {
            "texts": len(texts),
            "accuracy": float(np.mean(right)),
            "exits": runtime.stats().exits,
            "mean_layers": runtime.stats().mean_layers,
            "truncated": sum(answer.truncated for answer in answers),
            "cpu_ms_per_text": {"median": 1000 * float(np.median(seconds[name])), "timed": len(seconds[name])},
        }
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    run_command(main)
