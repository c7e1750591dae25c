"""The libraries that an engineer would pick instead: the same texts and biggest model, all in one run.

    python benchmarks/peers.py --random 2x768 --random 12x768
    python benchmarks/peers.py --member members/2L --member members/6L --data dev.tsv
    python benchmarks/peers.py --member members/12L --tuned bundle/ --data reported.jsonl

Contestants: the transformers pipeline (PyTorch), Optimum's ONNX Runtime pipeline, OpenVINO (fp32, bf16, int8 by
NNCF), every member alone, and the cascade at 2x, 3x and 4x: on ONNX Runtime in fp32 and int8, and on OpenVINO in bf16
and int8. With --tuned, a bundle of these members: its members alone and its cascade, with the thresholds that it has.
They take turns block by block. Needs the extra bench.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
import transformers
from cascade_export.check import Check
from cascade_export.export import export_bundle
from cascade_export.random_weights import parse_shape, write_random_members
from common import INK, RESULTS, inked, run_command
from tqdm import tqdm

from cascade_rt import CascadeRuntime
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.benchmark.workload import (
    peak_memory_mb,
    predict_command,
    reachable,
    seconds_of,
    spread,
    taus_for,
    texts_for,
)
from cascade_rt.engine.batching import TOKEN_BUDGET, by_length, micro_batches
from cascade_rt.engine.cpus import usable_threads
from cascade_rt.engine.openvino import load_openvino
from cascade_rt.engine.task import Task
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import InputError
from cascade_rt.io.readers import Reading, read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.collect import open_whole
from cascade_rt.tuning.evaluation import true_answers
from cascade_rt.tuning.metrics import f1_of_sets
from cascade_rt.tuning.plot import pyplot
from cascade_rt.types import Text

BLOCK = 16  # single calls in a row by the same contestant
BULK_BATCH = 32

Labels = tuple[str, ...]
"""The labels of a text: one, or any number."""
Answer = Callable[[list[Text]], list[Labels]]
"""Labels of texts: one text is a single call, many are bulk work."""


def main() -> None:
    """Set everyone up, let them take turns, print and write what was measured."""
    options = _parser().parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(usable_threads(options.threads))
    sources = options.member or write_random_members(
        [parse_shape(shape) for shape in options.random], options.work / "members", tokenizer=options.tokenizer
    )
    bundle = options.tuned[0] if options.tuned else options.work / "bundle"
    if not options.tuned:
        _export(sources, bundle, "fp32", options)
    cascade = open_whole(bundle, threads=options.threads, preload=True)
    members = cascade.bundle.members
    texts = texts_for(cascade.bundle, options.data, options.words, options.texts)
    biggest = next((source for source in sources if Path(source).name == members[-1].name), None)
    if biggest is None:
        raise InputError(f"found no --member {members[-1].name}, the folder of the biggest member of {bundle}")
    contestants = dict(_peers(Path(biggest), cascade, options.work, texts, options.threads))
    if options.tuned:
        taus: dict[str, Any] = {}
        contestants |= _members_alone("cascade-rt", cascade)
        for folder in options.tuned:
            tuned = CascadeRuntime(folder, threads=options.threads, preload=True)
            chain = " + ".join(member.name for member in tuned.bundle.members)
            taus[folder.name] = {chain: tuned.thresholds}
            contestants[f"cascade-rt, cascade {folder.name}: {chain}"] = _ours(tuned)
    else:
        taus = _at_speedups(contestants, sources, texts, options)
    report: dict[str, Any] = {
        "machine": describe(),
        "members": [f"{member.layers}L-{member.hidden_size} {member.precision}" for member in members],
        "threads": usable_threads(options.threads),
        "texts": {"count": len(texts), "from": options.data.name if options.data else f"made up, {options.words}"},
        "rounds": options.rounds,
        "taus": taus,
        "contestants": _measured(contestants, texts, options.rounds),
    }
    report["cold_start"] = _cold_starts(str(biggest), bundle, texts[0], options.starts)
    if options.data:
        _add_accuracy(report["contestants"], contestants, options, cascade)
    output = (
        options.output
        or RESULTS / f"peers-{'-'.join(f'{member.layers}' for member in members)}{'-tuned' * bool(options.tuned)}.json"
    )
    write_json(output, report)
    if options.data:
        _draw(report["contestants"], output.with_suffix(".svg"))
    _show(report)
    print(f"written: {output}")


def _export(sources: list[str], folder: Path, precision: str, options: argparse.Namespace) -> None:
    check = Check(max_accuracy_drop=100)
    length, overwrite = options.max_length, folder.exists()
    export_bundle(sources, folder, max_length=length, precision=precision, check=check, overwrite=overwrite)


def _at_speedups(
    contestants: dict[str, Answer], sources: list[str], texts: list[Text], options: argparse.Namespace
) -> dict[str, Any]:
    """Add members alone and cascades at --speedup, in fp32 and int8, on both engines; return the thresholds of each."""
    bundle: Path = options.work / "bundle"
    by_token, static = options.work / "bundle-int8", options.work / "bundle-int8-static"
    _export(sources, by_token, "int8", options)
    _export(sources, static, "int8-static", options)
    taus = {}
    for name, folder, provider, properties in (
        ("cascade-rt", bundle, "cpu", {}),
        ("cascade-rt int8", by_token, "cpu", {}),
        ("cascade-rt OpenVINO bf16", bundle, "openvino", {"INFERENCE_PRECISION_HINT": "bf16"}),
        ("cascade-rt OpenVINO int8", static, "openvino", {}),
    ):
        runtime = CascadeRuntime(
            folder, provider=provider, provider_options=properties, threads=options.threads, preload=True
        )
        contestants |= _members_alone(name, runtime)
        logits, _ = runtime.member_logits(texts)
        chosen = taus_for(runtime, logits, reachable(runtime.bundle, options.speedup))
        taus[name] = {str(speedup): tau for speedup, tau in chosen.items()}
        for speedup, tau in chosen.items():
            contestants[f"{name}, cascade {speedup:g}x"] = _ours(runtime.with_thresholds(tau))
    return taus


def _members_alone(name: str, runtime: CascadeRuntime) -> dict[str, Answer]:
    return {
        f"{name}, {member.name} alone": _ours(runtime.with_members([member.name])) for member in runtime.bundle.members
    }


def _ours(runtime: CascadeRuntime) -> Answer:
    def answer(texts: list[Text]) -> list[Labels]:
        return [prediction.labels for prediction in runtime.predict(texts)]

    return answer


@dataclass(frozen=True)
class Decision:
    """A bundle's way from a text's logits or scores to its labels, which the other libraries get too."""

    names: Labels
    task: Task

    def from_logits(self, logits: np.ndarray) -> Labels:
        """Return the labels of one text, from logits (labels,)."""
        if not self.task.several:
            return (self.names[int(logits.argmax())],)
        probabilities, winner = self.task.probabilities_of_one(logits)
        return self.task.labels(self.names, probabilities, winner)

    def from_scores(self, scores: list[dict[str, Any]]) -> Labels:
        """Return the labels of one text, from what a pipeline answers."""
        if not self.task.several:
            return (scores[0]["label"],)
        found = {row["label"]: row["score"] for row in scores}
        return self.task.labels(self.names, [found[name] for name in self.names], 0)


def _peers(
    checkpoint: Path, cascade: CascadeRuntime, work: Path, texts: list[Text], threads: int | None
) -> Iterator[tuple[str, Answer]]:
    decision = Decision(tuple(cascade.bundle.labels), cascade.task)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    yield (
        "transformers pipeline, PyTorch fp32",
        _pipeline(
            transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu"), decision
        ),
    )
    yield (
        "Optimum pipeline, ONNX Runtime fp32 (O2)",
        _pipeline(_optimum_pipeline(checkpoint, work / "optimum", tokenizer), decision),
    )
    bundle = cascade.bundle
    assert bundle.folder is not None, "read from a folder"
    reader = TextTokenizer(bundle.folder / "tokenizer.json", bundle.max_length, isinstance(texts[0], tuple))
    graph = load_openvino().Core().read_model(work / "optimum" / "plain" / "model.onnx")
    for name, precision in (("fp32", "f32"), ("bf16", "bf16")):
        yield f"OpenVINO {name}", _openvino(graph, precision, reader, decision, threads)
    try:
        import nncf  # noqa: PLC0415 - optional

        names = {node.get_any_name() for node in graph.inputs}
        batches = [reader.encode([text]).batch(np.zeros(1, dtype=np.intp)) for text in texts[:128]]
        calibration = [{name: batch[name] for name in names} for batch in batches]
        with redirect_stdout(sys.stderr):
            small = nncf.quantize(graph, nncf.Dataset(calibration), model_type=nncf.ModelType.TRANSFORMER)
        yield "OpenVINO int8 (NNCF)", _openvino(small, "f32", reader, decision, threads)
    except Exception as error:  # whatever stops it, the others still compare
        print(f"OpenVINO int8 left out: {type(error).__name__}: {error}", file=sys.stderr)


def _pipeline(pipe: Any, decision: Decision) -> Answer:
    """Single calls as they come; bulk in batches of texts of like length, the pipeline's documented way to speed."""
    options: dict[str, Any] = {"truncation": True}
    if decision.task.several:
        options |= {"top_k": None, "function_to_apply": "sigmoid"}

    def answer(texts: list[Text]) -> list[Labels]:
        inputs = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
        with torch.inference_mode():
            if len(texts) == 1:
                got = pipe(inputs[0], **options)
                return [decision.from_scores(got if isinstance(got, list) else [got])]
            order = sorted(range(len(inputs)), key=lambda row: len(str(inputs[row])))
            outcome: list[Labels] = [()] * len(inputs)
            answers = pipe([inputs[row] for row in order], batch_size=BULK_BATCH, **options)
            for row, got in zip(order, answers, strict=True):
                outcome[row] = decision.from_scores(got if isinstance(got, list) else [got])
        return outcome

    return answer


def _optimum_pipeline(checkpoint: Path, work: Path, tokenizer: Any) -> Any:
    from optimum.onnxruntime import (  # noqa: PLC0415
        AutoOptimizationConfig,
        ORTModelForSequenceClassification,
        ORTOptimizer,
    )
    from optimum.pipelines import pipeline  # noqa: PLC0415

    plain = ORTModelForSequenceClassification.from_pretrained(checkpoint, export=True, trust_remote_code=False)
    plain.save_pretrained(work / "plain")
    ORTOptimizer.from_pretrained(plain).optimize(AutoOptimizationConfig.O2(), save_dir=work / "o2")
    model = ORTModelForSequenceClassification.from_pretrained(work / "o2", trust_remote_code=False)
    return pipeline("text-classification", model=model, tokenizer=tokenizer, accelerator="ort")


def _openvino(graph: Any, precision: str, reader: TextTokenizer, decision: Decision, threads: int | None) -> Answer:
    """OpenVINO with the hints of its documentation: latency for single calls, throughput and a queue for bulk.

    It gets cascade-rt's tokenization and micro-batches, the strongest form in which one would use it.
    """
    openvino = load_openvino()
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": usable_threads(threads)}
    single = core.compile_model(graph, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    queue = openvino.AsyncInferQueue(core.compile_model(graph, "CPU", settings | {"PERFORMANCE_HINT": "THROUGHPUT"}))
    names = [node.get_any_name() for node in single.inputs]
    found: dict[int, Labels] = {}

    def collect(request: Any, rows: np.ndarray) -> None:
        found.update(zip(rows.tolist(), map(decision.from_logits, request.get_output_tensor(0).data), strict=True))

    queue.set_callback(collect)

    def answer(texts: list[Text]) -> list[Labels]:
        encoded = reader.encode(texts)
        if len(texts) == 1:
            batch = encoded.batch(np.zeros(1, dtype=np.intp))
            return [decision.from_logits(single({name: batch[name] for name in names})[0][0])]
        for rows in micro_batches(by_length(encoded.lengths), encoded.lengths, TOKEN_BUDGET):
            batch = encoded.batch(rows)
            queue.start_async({name: batch[name] for name in names}, rows)
        queue.wait_all()
        return [found[row] for row in range(len(texts))]

    return answer


def _measured(contestants: dict[str, Answer], texts: list[Text], rounds: int) -> dict[str, Any]:
    """Time all in turn, block by block; a smaller call before each wakes the contestant's threads."""

    def one_by_one(answer: Answer) -> Callable[[list[Text]], list[float]]:
        def seconds(block: list[Text]) -> list[float]:
            return [timeit(partial(answer, [text]), number=1) for text in block]

        return seconds

    blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
    with tqdm(total=2 * (rounds + 1), unit=" rounds", file=sys.stderr) as progress:
        single = in_turns(
            {name: one_by_one(answer) for name, answer in contestants.items()},
            blocks,
            rounds,
            wake=lambda block: block[:1],
            progress=progress.update,
        )
        bulk = in_turns(contestants, [texts], rounds, wake=lambda call: call[:BULK_BATCH], progress=progress.update)
    fastest, *_ = contestants
    seconds = {
        kind: {name: own.seconds.sum(axis=1) for name, own in timed.items()}
        for kind, timed in (("single", single), ("bulk", bulk))
    }
    rows: dict[str, Any] = {
        name: {
            kind: {
                "ms_per_text": spread(1e3 * own[name] / len(texts)),
                "times_faster_than_transformers": spread(own[fastest] / own[name]),
            }
            for kind, own in seconds.items()
        }
        for name in contestants
    }
    for name, row in rows.items():  # of the last round
        row["single"]["p50_ms"], row["single"]["p95_ms"] = np.percentile(
            1e3 * np.hstack(single[name].answers), (50, 95)
        )
    return rows


def _add_accuracy(
    rows: dict[str, Any], contestants: dict[str, Answer], options: argparse.Namespace, cascade: CascadeRuntime
) -> None:
    """Add the share of texts whose labels are all right, and with several labels per text F1, the mean over labels."""
    task, labels = cascade.task, cascade.bundle.labels
    how = Reading(label_column=options.label_column)
    examples = list(read_examples(options.data, how, pair=cascade.bundle.pair))
    truth = task.indicators(true_answers(task, examples, how, labels), len(labels))
    for name, answer in contestants.items():
        predicted = np.zeros_like(truth)
        for row, found in enumerate(answer([row.text for row in examples])):
            predicted[row, [labels.index(label) for label in found]] = True
        rows[name]["accuracy"] = float(np.mean((truth == predicted).all(axis=1)))
        if task.several:
            rows[name]["f1"] = f1_of_sets(truth, predicted)


def _cold_starts(checkpoint: str, bundle: Path, text: Text, runs: int) -> dict[str, Any]:
    """Seconds from process start to the answer for one text that needs the first member only, in turn."""
    asked = text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
    script = (
        f"from transformers import pipeline; print(pipeline('text-classification', model={checkpoint!r})({asked!r}))"
    )
    commands = {
        "transformers pipeline": [sys.executable, "-c", script],
        "cascade-rt predict": predict_command(bundle, 0, text),
    }
    turns = [{name: seconds_of(command) for name, command in commands.items()} for _ in range(runs + 1)][1:]
    seconds = {name: np.array([turn[name] for turn in turns]) for name in commands}
    theirs, ours = seconds.values()
    return {
        name: {"seconds": spread(seconds[name]), "peak_memory_mb": peak_memory_mb(command)}
        for name, command in commands.items()
    } | {"times_faster": spread(theirs / ours)}


_OURS, _CHOSEN = "#1f77b4", "#d62728"  # seen on light and on dark pages


def _draw(rows: dict[str, Any], path: Path) -> None:
    """Draw accuracy over the time of single texts and of bulk work, all contestants."""
    plotting = pyplot()
    plotting.rcParams["svg.fonttype"] = "none"
    figure, axes = plotting.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, kind, title in zip(axes, ("single", "bulk"), ("one text at a time", "in bulk"), strict=True):
        for at, (name, row) in enumerate(sorted(rows.items(), key=lambda pair: float(_quality(pair[1])))):
            colour = _CHOSEN if ", cascade " in name else _OURS if name.startswith("cascade-rt") else INK
            place = row[kind]["ms_per_text"]["median"], 100 * _quality(row)
            axis.plot(
                *place, "*" if colour == _CHOSEN else "o", color=colour, markersize=14 if colour == _CHOSEN else 6
            )
            text = name.removeprefix("cascade-rt, ")
            axis.annotate(text, place, (6, (-10, 4)[at % 2]), textcoords="offset points", fontsize=7, color=colour)
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set_title(title, color=INK)
        axis.set_xlabel("ms per text (logarithmic)")
        inked(axis)
    axes[0].set_ylabel("F1, mean over labels, %" if "f1" in next(iter(rows.values())) else "accuracy, %")
    figure.savefig(path, transparent=True)
    plotting.close(figure)


def _quality(row: dict[str, Any]) -> float:
    quality: float = row["f1" if "f1" in row else "accuracy"]
    return quality


def _show(report: dict[str, Any]) -> None:
    print(f"{report['members']}, {report['threads']} threads, {report['texts']['count']} texts; ms per text, median")
    print(f"{'':42} {'single':>8} {'':>8} {'p50':>8} {'bulk':>8} {'':>8}  accuracy")
    for name, row in report["contestants"].items():
        single, bulk = (
            f"{row[kind]['ms_per_text']['median']:8.3f} {row[kind]['times_faster_than_transformers']['median']:7.1f}x"
            for kind in ("single", "bulk")
        )
        accuracy = f"{100 * row['accuracy']:.2f} %" if "accuracy" in row else ""
        accuracy += f", F1 {100 * row['f1']:.2f} %" if "f1" in row else ""
        print(f"{name:42} {single} {row['single']['p50_ms']:8.3f} {bulk}  {accuracy}")
    cold = report["cold_start"]
    seconds = {name: cold[name]["seconds"]["median"] for name in ("transformers pipeline", "cascade-rt predict")}
    print(f"process start to answer, s: {seconds}, {cold['times_faster']['median']:.1f}x faster")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--member", action="append", metavar="DIR", help="a fine-tuned member's folder; one per member")
    models.add_argument("--random", action="append", metavar="LAYERSxHIDDEN", help="random members instead")
    add = parser.add_argument
    add(
        "--tuned",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="time this bundle as it is, with its --max-length; --member: its biggest; repeat for other thresholds",
    )
    add("--tokenizer", help="with --random: whose vocabulary to use; default: a made-up one")
    add("--data", type=Path, metavar="FILE", help="labelled texts; default: made up from the vocabulary")
    add("--label-column", help="default: label, or labels")
    add("--words", default="16:8", metavar="MEAN:SD", help="words per made-up text; default: 16:8")
    add("--texts", type=int, default=128, help="how many; default: 128")
    add("--max-length", type=int, default=128, help="tokens; default: 128")
    add("--speedup", type=float, nargs="+", default=[2, 3, 4], help="of the cascade; default: 2 3 4")
    add("--rounds", type=int, default=5, help="after one that warms up; default: 5")
    add("--starts", type=int, default=5, help="of a new process, after one that warms up; default: 5")
    add("--threads", type=int, help="default: all usable CPUs")
    add("--work", type=Path, default=Path("runs/peers"), help="models and bundle; default: runs/peers")
    add("--output", type=Path, help="default: results/peers-LAYERS.json beside this script")
    return parser


if __name__ == "__main__":
    run_command(main)
