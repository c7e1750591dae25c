"""The price of torch's newer exporter today: graphs of one model by tracing and by dynamo, with the same fusions.

    python benchmarks/exporters.py

A BERT with random weights is exported both ways, with eager attention. ONNX Runtime's transformer optimizer fuses both
graphs; their operators are counted, and both run in turn on texts of several lengths, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from cascade_export import convert
from cascade_export.random_weights import parse_shape, write_random_members
from cascade_export.torch_checkpoint import open_torch
from common import RESULTS, run_command
from torch import Tensor, nn

from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.benchmark.workload import spread
from cascade_rt.io.writers import write_json

TRACE, DYNAMO = "trace", "dynamo"
BATCHES = ((1, 16), (1, 128), (16, 32))  # texts, tokens


def main() -> None:
    """Export, count, time in turns, and write the report."""
    options = _parser().parse_args()
    report: dict[str, Any] = {"machine": describe(), "shape": options.random}
    with TemporaryDirectory(prefix="cascade-exporters-") as work:
        (folder,) = write_random_members([parse_shape(options.random)], Path(work))
        checkpoint = open_torch(folder)
        files = {TRACE: Path(work) / "trace.onnx", DYNAMO: Path(work) / "dynamo.onnx"}
        fused = {TRACE: convert.convert(checkpoint, files[TRACE])}
        with mock.patch.object(convert, "_trace", _by_dynamo):
            fused[DYNAMO] = convert.convert(checkpoint, files[DYNAMO])
        for name, file in files.items():
            operators = Counter(node.op_type for node in onnx.load(file).graph.node)
            report[name] = {"operators": operators.total(), "fused": fused[name], "by_kind": dict(operators)}
            print(f"{name}: {operators.total()} operators, fused {fused[name]}", flush=True)
        report["times"] = [_times(files, *batch, options.rounds) for batch in BATCHES]
    write_json(options.output, report)
    print(f"written: {options.output}")


def _by_dynamo(module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], folder: Path) -> None:
    """Write the graph that dynamo makes of a module, as `convert` asks the tracing exporter to."""
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        module.eval(),
        tuple(example.values()),
        str(folder / "model.onnx"),
        input_names=list(example),
        output_names=list(outputs),
        dynamic_shapes=tuple({0: free, 1: free} for _ in example),
        opset_version=18,
        external_data=False,
        dynamo=True,
    )


def _times(files: Mapping[str, Path], rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of one thread that both graphs take for a batch, in turn, and how they compare."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = {name: onnxruntime.InferenceSession(str(file), settings) for name, file in files.items()}
    ids = np.random.default_rng(0).integers(1000, 30_000, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    def timed(session: onnxruntime.InferenceSession, call: Mapping[str, Any]) -> tuple[float, Any]:
        started = time.thread_time()  # what other programs take does not count
        (logits,) = session.run(["logits"], call)
        return time.thread_time() - started, logits

    found = in_turns({name: partial(timed, session) for name, session in sessions.items()}, [batch] * rounds, 1)
    ms = {name: 1000 * np.array([seconds for seconds, _ in found[name].answers]) for name in files}
    difference = float(np.abs(found[TRACE].answers[0][1] - found[DYNAMO].answers[0][1]).max())
    row = {
        "texts": rows,
        "tokens": tokens,
        "ms": {name: spread(ms[name]) for name in files},
        "ratio_of_medians": float(np.median(ms[DYNAMO]) / np.median(ms[TRACE])),
        "max_logit_difference": difference,
    }
    print(
        f"{rows} texts of {tokens} tokens: trace {np.median(ms[TRACE]):.2f} ms, dynamo {np.median(ms[DYNAMO]):.2f} ms, "
        f"{row['ratio_of_medians']:.2f} times as long; logits differ by {difference:.1e}",
        flush=True,
    )
    return row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", default="6x384", metavar="LAYERSxHIDDEN", help="shape of the model")
    parser.add_argument("--rounds", type=int, default=100, help="of each batch")
    parser.add_argument("--output", type=Path, default=RESULTS / "exporters.json")
    return parser


if __name__ == "__main__":
    run_command(main)
