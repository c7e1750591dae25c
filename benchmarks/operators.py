"""Where the time of a member goes: the share of each kind of operator, and the floor that the machine sets.

    python benchmarks/operators.py --model-dir BUNDLE [BUNDLE ...] --data DATA/sst2/dev.tsv

Each member of each bundle runs as the runtime runs it, with ONNX Runtime's profiler: texts one by one, and in the
runtime's micro-batches. The profiler slows small operators down, so the time without it is measured too. The floor is
the time of the matrix products at the speed that one big product reaches on this machine, in the same precision.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from common import RESULTS, run_command
from onnx import TensorProto, helper, numpy_helper

from cascade_rt import read_bundle
from cascade_rt.benchmark.machine import describe
from cascade_rt.bundle import MemberEntry
from cascade_rt.engine.batching import TOKEN_BUDGET, by_length, micro_batches
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.plot import pyplot

Run = Callable[[], Any]

KINDS = {
    "products": {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"},
    "attention": {"Attention", "MultiHeadAttention"},
    "GELU": {"BiasGelu", "FastGelu", "Gelu"},
    "normalization": {"Add", "EmbedLayerNormalization", "LayerNormalization", "SkipLayerNormalization"},
    "quantization": {"Abs", "Cast", "Max", "Mul", "QuantizeLinear", "ReduceMax", "Reshape", "Expand", "Shape"},
}
OTHER = "other"


def main() -> None:
    """Profile all members, print and write the report, and draw the shares."""
    options = _parser().parse_args()
    peaks = _peaks(options.threads)
    report: dict[str, Any] = {"machine": describe(), "threads": options.threads, "peaks": peaks, "members": []}
    print("  ".join(f"{name} {value:.1f}" for name, value in peaks.items()), flush=True)
    for folder in options.model_dir:
        bundle = read_bundle(folder)
        tokenizer = TextTokenizer(folder / bundle.tokenizer_file, bundle.max_length, bundle.pair)
        texts = [example.text for example in read_examples(options.data, pair=bundle.pair)][: options.texts]
        encoded = tokenizer.encode(texts)
        bulk = list(micro_batches(by_length(encoded.lengths), encoded.lengths, TOKEN_BUDGET))
        single = [np.array([row]) for row in range(min(options.single, len(texts)))]
        for entry in bundle.members:
            if options.member and entry.name not in options.member:
                continue
            for way, batches in (("single", single), ("bulk", bulk)):
                row = _profiled(folder, entry, len(bundle.labels), encoded, batches, options)
                tokens = sum(len(rows) * int(encoded.lengths[rows].max()) for rows in batches)
                row |= {"member": entry.name, "layers": entry.layers, "precision": entry.precision, "way": way}
                row["floor_ms"] = _floor_ms(folder / entry.file, tokens, peaks, entry.precision) / row["texts"]
                report["members"].append(row)
                print(_line(row), flush=True)
                write_json(options.output, report)
    _draw(report["members"], options.output.with_suffix(".svg"))
    print(f"written: {options.output}")


def _line(row: dict[str, Any]) -> str:
    shares = "  ".join(f"{kind} {100 * share:.0f}%" for kind, share in row["shares"].items())
    return (
        f"{row['member']:8} {row['precision']:5} {row['way']:6} {row['ms']:6.2f} ms a text "
        f"(floor of products {row['floor_ms']:.2f})  {shares}"
    )


def _profiled(
    folder: Path,
    entry: MemberEntry,
    labels: int,
    encoded: Encoded,
    batches: Sequence[Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    made = onnxruntime.SessionOptions

    def stage() -> Stage:
        return Stage(entry, folder / entry.file, labels, Execution("CPUExecutionProvider", options.threads))

    def run(member: Stage) -> Run:
        return lambda: [member.run(encoded.batch(rows)) for rows in batches]

    texts = sum(map(len, batches))
    seconds = min(_seconds(run(stage()), options.rounds))
    with TemporaryDirectory(prefix="cascade-operators-") as work:

        def profiling() -> Any:
            found = made()
            found.enable_profiling = True
            found.profile_file_prefix = str(Path(work) / "profile")
            return found

        with mock.patch("onnxruntime.SessionOptions", profiling):
            member = stage()
            _seconds(run(member), options.rounds)
            events = json.loads(Path(member.load().session.end_profiling()).read_text("utf-8"))
    spent, counts, runs = _by_operator(events, skip=len(batches))
    total = sum(spent.values())
    kinds = {kind: sum(spent[name] for name in names) / total for kind, names in KINDS.items()}
    return {
        "texts": texts,
        "ms": 1000 * seconds / texts,
        "shares": kinds | {OTHER: 1 - sum(kinds.values())},
        "operators": {name: count / runs for name, count in counts.most_common()},
        "microseconds_by_operator": {name: value / runs for name, value in spent.most_common()},
    }


def _seconds(run: Run, rounds: int) -> list[float]:
    """Return the seconds of each round, after one of warm-up."""
    found = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found[1:]


def _by_operator(events: Sequence[dict[str, Any]], skip: int) -> tuple[Counter[str], Counter[str], int]:
    """Return the microseconds and the number of operators after the first `skip` runs, and the number of other runs."""
    runs = [event for event in events if event["name"] == "model_run"]
    start = runs[skip - 1]["ts"] + runs[skip - 1]["dur"]
    spent, counts = Counter[str](), Counter[str]()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= start:
            operator = event["args"]["op_name"]
            spent[operator] += event["dur"]
            counts[operator] += 1
    return spent, counts, len(runs) - skip


def _peaks(threads: int) -> dict[str, float]:
    """Return billions of operations a second of one big product in fp32 and int8, and the GB a second of a copy."""
    rows, width = 512, 2048
    weights = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    operations = 2 * rows * width * width
    floats = np.ones((rows, width), dtype=np.float32)
    product = helper.make_node("MatMul", ["a", "w"], ["c"])
    fp32 = _session([product], TensorProto.FLOAT, {"w": weights}, threads)
    integer = helper.make_node("MatMulIntegerToFloat", ["a", "w", "one", "one", "zero"], ["c"], domain="com.microsoft")
    constants = {"w": np.clip(20 * weights, -127, 127).astype(np.int8), "one": np.float32(1), "zero": np.uint8(128)}
    int8 = _session([integer], TensorProto.UINT8, constants, threads)
    source, target = np.ones(2**25), np.empty(2**25)
    return {
        "fp32": operations / min(_seconds(lambda: fp32.run(None, {"a": floats}), 20)) / 1e9,
        "int8": operations / min(_seconds(lambda: int8.run(None, {"a": floats.astype(np.uint8)}), 20)) / 1e9,
        "copy": 2 * source.nbytes / min(_seconds(lambda: np.copyto(target, source), 5)) / 1e9,
    }


def _session(nodes: Sequence[Any], kind: int, constants: dict[str, Any], threads: int) -> Any:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("a", kind, [None, None])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _floor_ms(file: Path, tokens: int, peaks: dict[str, float], precision: str) -> float:
    """Return the milliseconds of a member's products with constant weights, for so many tokens, at the peak."""
    graph = onnx.load(file).graph
    matrices = {weight.name: int(np.prod(weight.dims)) for weight in graph.initializer if len(weight.dims) == 2}
    products = KINDS["products"] | KINDS["attention"]
    weights = sum(matrices.get(node.input[1], 0) for node in graph.node if node.op_type in products)
    peak = peaks["int8" if precision.startswith("int8") else "fp32"]
    return 2 * weights * tokens / peak / 1e6


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axis = pyplot().subplots(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    names = [f"{row['member']} {row['precision']}, {row['way']}" for row in rows]
    left = np.zeros(len(rows))
    for kind in [*KINDS, OTHER]:
        widths = np.array([row["shares"][kind] for row in rows])
        axis.barh(names, widths, left=left, label=kind)
        left += widths
    axis.invert_yaxis()
    axis.set(xlabel="share of the operators' time", xlim=(0, 1))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=6, frameon=False)
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model-dir", type=Path, nargs="+", required=True, metavar="BUNDLE")
    add("--member", nargs="*", help="only these (default: all)")
    add("--data", type=Path, required=True, metavar="FILE", help="texts")
    add("--texts", type=int, default=256, help="of the file, in micro-batches")
    add("--single", type=int, default=64, help="of the file, one by one")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=5)
    add("--output", type=Path, default=RESULTS / "operators.json")
    return parser


if __name__ == "__main__":
    run_command(main)
