"""The cost of one ONNX file: the same texts through it and through `CascadeRuntime`, with a session a member.

    python benchmarks/single_file.py --model-dir BUNDLE --data dev.tsv

Both take turns on single texts and on batches, with the same threads and the same spinning. Needs the extra export.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
from cascade_export.single_file import pack
from common import RESULTS, run_command

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.benchmark.workload import spread, taus_for, texts_for
from cascade_rt.engine.tokenization import Encoded
from cascade_rt.io.writers import write_json

_BATCH = 32


def main() -> None:
    """Compare answers and times; print and write them."""
    options = _parser().parse_args()
    with CascadeRuntime(options.model_dir, threads=options.threads) as opened, TemporaryDirectory() as folder:
        pack(options.model_dir, Path(folder) / "cascade.onnx")
        session = _session(Path(folder) / "cascade.onnx", options.threads)
        texts = texts_for(opened.bundle, options.data, "16:8", options.texts)
        logits, _ = opened.member_logits(texts)
        (tau,) = taus_for(opened, logits, [options.speedup]).values()
        runtime = opened.with_thresholds(tau)
        timed = texts[: options.timed]
        encoded = runtime.plan.tokenizer.encode(texts)
        report: dict[str, Any] = {
            "machine": describe(),
            "bundle": str(options.model_dir),
            "members": [f"{entry.name} {entry.precision}" for entry in runtime.bundle.members],
            "threads": options.threads,
            "texts": len(texts),
            "tau": tau,
            "equality": _equality(runtime, session, texts, encoded),
            "one_file_over_runtime": {
                "single": spread(_ratios(runtime, session, timed, 1, options.rounds)),
                f"batches of {_BATCH}": spread(_ratios(runtime, session, timed, _BATCH, options.rounds)),
            },
        }
    write_json(options.output, report)
    print(report["equality"])
    for way, ratio in report["one_file_over_runtime"].items():
        print(f"{way}: time of one file / of the runtime {ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})")


def _session(file: Path, threads: int) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.spin_duration_us", "500")  # the runtime's
    return onnxruntime.InferenceSession(str(file), settings)


def _answers(runtime: CascadeRuntime, session: Any, encoded: Encoded, rows: Any) -> Any:
    feed = encoded.batch(rows)
    return session.run(None, {**feed, "thresholds": np.array(runtime.thresholds)})


def _equality(runtime: CascadeRuntime, session: Any, texts: list[Any], encoded: Encoded) -> dict[str, int]:
    """Compare the answers to single texts: probabilities in float32 to the last bit, and exits."""
    bits = exits = 0
    for row, text in enumerate(texts):
        probabilities, exit, layers = _answers(runtime, session, encoded, np.array([row]))
        (expected,) = runtime.predict([text])
        bits += np.array_equal(probabilities[0], np.array(expected.probabilities, dtype=np.float32))
        exits += (exit[0], layers[0]) == (expected.exit, expected.layers)
    return {"texts": len(texts), "equal_bits": int(bits), "equal_exits": int(exits)}


def _ratios(runtime: CascadeRuntime, session: Any, texts: list[Any], size: int, rounds: int) -> Any:
    """Time both on the same calls in turn, tokenization included; return the ratio of each round."""
    tokenizer = runtime.plan.tokenizer

    def one_file(some: list[Any]) -> Any:
        return _answers(runtime, session, tokenizer.encode(some), np.arange(len(some)))

    calls = [texts[start : start + size] for start in range(0, len(texts), size)]
    timed = in_turns({"file": one_file, "runtime": runtime.predict}, calls, rounds)
    return timed["file"].seconds.sum(axis=1) / timed["runtime"].seconds.sum(axis=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-dir", type=Path, required=True, metavar="BUNDLE", help="a cascade of complete members")
    add("--data", type=Path, metavar="FILE", help="texts; default: made up from the vocabulary")
    add("--texts", type=int, default=1000, help="to compare; default: 1000")
    add("--timed", type=int, default=128, help="of them, to time; default: 128")
    add("--speedup", type=float, default=2.0, help="layer speed-up that the threshold is set to; default: 2")
    add("--threads", type=int, default=1, help="default: 1")
    add("--rounds", type=int, default=9, help="after one that warms up; default: 9")
    add("--output", type=Path, default=RESULTS / "single-file.json", metavar="FILE", help="the JSON report")
    return parser


if __name__ == "__main__":
    run_command(main)
