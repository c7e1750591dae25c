"""Every precision of a member: speed against fp32, size, accuracy on labelled data, and batch invariance.

All precisions of a member take turns on the same batches in one process. Members are exported with the texts that their
training held out; accuracy, and what differs from fp32, is measured on `--data`. `int8, nearest` is int8 without texts:
weights become the nearest integers. `--openvino` adds what that provider runs, fp32 also computed in bf16. For batch
invariance, each text is answered in random batchings of the whole data, and labels, exits and scores are compared.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cascade_export.check import Check, compare, probabilities
from cascade_export.export import export_bundle
from cascade_export.random_weights import parse_shape, write_random_members
from cascade_train import VALIDATION
from common import run_command
from numpy.typing import NDArray

from cascade_rt import read_bundle
from cascade_rt.benchmark.machine import describe
from cascade_rt.benchmark.turns import in_turns
from cascade_rt.bundle.precisions import PRECISIONS
from cascade_rt.engine.batching import TOKEN_BUDGET, by_length, micro_batches
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.providers import CPU, OPENVINO
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.task import SingleLabel
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.io.readers import read_examples
from cascade_rt.io.writers import write_json
from cascade_rt.tuning.evaluation import label_ids

_TASK = SingleLabel()

SHAPES = ((1, 8), (1, 32), (32, 32))  # (texts, tokens) of the timed batches
NEAREST = "int8, nearest"
ON_OPENVINO = {"fp32": {"fp32": "f32", "bf16": "bf16"}, "int8-static": {"int8-static": "f32"}}
"""For each exported precision, how it is called and OpenVINO's property for the precision that it computes in."""
TAUS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Candidate:
    """A member in one precision, and what runs it."""

    folder: Path
    provider: str = CPU
    properties: Mapping[str, str] = field(default_factory=dict)

    def stage(self, threads: int) -> Stage:
        """Return the member, ready to run."""
        bundle = read_bundle(self.folder)
        (entry,) = bundle.members
        file, labels = self.folder / entry.file, len(bundle.labels)
        return Stage(entry, file, labels, Execution(self.provider, threads, self.properties))


def main() -> None:
    """Export, measure, print and write the report."""
    options = _parser().parse_args()
    report: dict[str, Any] = {"machine": describe(), "threads": options.threads, "members": {}}
    with TemporaryDirectory(prefix="cascade-precision-") as work:
        sources = [*options.member, *_random(options, Path(work))]
        exported = {Path(source).name: _exported(Path(source), Path(work), options) for source in sources}
        found = report["members"] = {name: _timings(rows, options) for name, rows in exported.items()}
        for source in options.member:
            name = Path(source).name
            _add_answers(found[name], exported[name], options)
        for name, row in found.items():
            _show(name, row)
    write_json(options.output, report)


def _random(options: argparse.Namespace, work: Path) -> list[str]:
    return write_random_members([parse_shape(shape) for shape in options.random], work, tokenizer=options.tokenizer)


def _exported(source: Path, work: Path, options: argparse.Namespace) -> dict[str, Candidate]:
    """Export a member in fp32 and the wanted precisions, and in int8 without texts if it has any."""
    rows = {name: Candidate(work / f"{source.name}-{name}") for name in dict.fromkeys(["fp32", *options.precision])}
    for precision, row in rows.items():
        export_bundle([str(source)], row.folder, precision=precision, check=Check(max_accuracy_drop=100))
    if (source / VALIDATION).is_file():
        bare = shutil.copytree(source, work / "bare" / source.name, ignore=shutil.ignore_patterns(VALIDATION))
        rows[NEAREST] = Candidate(work / f"{source.name}-nearest")
        export_bundle([str(bare)], rows[NEAREST].folder, precision="int8")
    for precision in (name for name in ON_OPENVINO if options.openvino and name in rows):
        for name, computed in ON_OPENVINO[precision].items():
            properties = {"INFERENCE_PRECISION_HINT": computed}
            rows[f"{name}, OpenVINO"] = Candidate(rows[precision].folder, OPENVINO, properties)
    return rows


def _timings(rows: dict[str, Candidate], options: argparse.Namespace) -> dict[str, Any]:
    members = {name: row.stage(options.threads) for name, row in rows.items()}
    found: dict[str, Any] = {
        name: {"bytes": member.entry.size(rows[name].folder / member.entry.file)} for name, member in members.items()
    }
    for texts, tokens in SHAPES:
        for precision, times in _timed(members, texts, tokens, options.rounds).items():
            found[precision][f"seconds_{texts}x{tokens}"] = times
    return found


def _add_answers(found: dict[str, Any], rows: dict[str, Candidate], options: argparse.Namespace) -> None:
    """Add what each precision answers to the data, against fp32, and how batches change it."""
    folder = rows["fp32"].folder
    bundle = read_bundle(folder)
    examples = list(read_examples(options.data, pair=bundle.pair))
    labels = label_ids([(example.field("label"), example.where) for example in examples], bundle.labels)
    tokenizer = TextTokenizer(folder / bundle.tokenizer_file, bundle.max_length, bundle.pair)
    encoded = tokenizer.encode([example.text for example in examples])
    original = probabilities(rows["fp32"].stage(options.threads), encoded)
    for precision, row in rows.items():
        member = row.stage(options.threads)
        found[precision]["check"] = compare(original, probabilities(member, encoded), labels)
        found[precision]["batch_composition"] = _batch_composition(member, encoded, options.batchings)


def _timed(members: dict[str, Stage], texts: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    ids = np.random.default_rng(0).integers(1000, 30_000, (texts, tokens))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    timed = in_turns({precision: member.run for precision, member in members.items()}, [batch], rounds)
    return {precision: own.seconds[:, 0].tolist() for precision, own in timed.items()}


def _batch_composition(member: Stage, encoded: Encoded, batchings: int) -> dict[str, Any]:
    """Answer all texts in the runtime's micro-batches, then in random batches; count what changes."""
    usual = _answers(member, encoded, list(micro_batches(by_length(encoded.lengths), encoded.lengths, TOKEN_BUDGET)))
    draw = np.random.default_rng(0)
    largest, labels, exits = 0.0, 0, 0
    for _ in range(batchings):
        rows = draw.permutation(len(usual))
        cuts = np.sort(draw.choice(len(rows) - 1, size=len(rows) // 12, replace=False)) + 1
        other = _answers(member, encoded, np.split(rows, cuts))
        largest = max(largest, float(np.abs(other - usual).max()))
        labels += int(np.sum(other.argmax(axis=1) != usual.argmax(axis=1)))
        for tau in TAUS:
            exits += int(np.sum((_TASK.confidence(other) > tau) != (_TASK.confidence(usual) > tau)))
    return {
        "batchings": batchings,
        "texts": len(usual),
        "max_probability_difference": largest,
        "changed_labels": labels,
        "changed_exits": exits,
        "exits_at": TAUS,
    }


def _answers(member: Stage, encoded: Encoded, batches: list[NDArray[np.intp]]) -> NDArray[np.float64]:
    answers = _TASK.probabilities(np.concatenate([member.run(encoded.batch(rows)).logits for rows in batches]))
    return answers[np.argsort(np.concatenate(batches))]


def _show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: speed against fp32 at (texts x tokens), medians")
    base = found["fp32"]
    for precision, row in found.items():
        cells = []
        for texts, tokens in SHAPES:
            key = f"seconds_{texts}x{tokens}"
            ratios = np.array(base[key]) / np.array(row[key])
            cells.append(f"{texts}x{tokens} {np.median(ratios):.2f}x ({ratios.min():.2f}-{ratios.max():.2f})")
        cells.append(f"size {row['bytes'] / base['bytes']:.3f}")
        if "check" in row:
            check, batching = row["check"], row["batch_composition"]
            accuracy = check["accuracy"]
            cells += [
                f"accuracy {100 * accuracy['exported']:.2f} (fp32 {100 * accuracy['original']:.2f})",
                f"labels agree {100 * check['labels_agree']:.2f}",
                f"mean difference {check['mean_probability_difference']:.4f}",
                f"batching: {batching['max_probability_difference']:.1e}, {batching['changed_labels']} labels, "
                f"{batching['changed_exits']} exits",
            ]
        print(f"  {precision:21} " + ", ".join(cells))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--member", action="append", default=[], metavar="DIR", help="a fine-tuned member; give it per member")
    add(
        "--random",
        action="append",
        default=[],
        metavar="LAYERSxHIDDEN",
        help="a member with random weights: speed only",
    )
    add("--tokenizer", help="whose vocabulary the random members use")
    add("--precision", nargs="*", default=list(PRECISIONS), choices=list(PRECISIONS), help="besides fp32")
    add("--openvino", action="store_true", help="OpenVINO too")
    add("--data", type=Path, help="labelled file for the members' accuracy")
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=15)
    add("--batchings", type=int, default=20)
    add("--output", type=Path, default=Path(__file__).parent / "results" / "precision.json")
    return parser


if __name__ == "__main__":
    run_command(main)
