"""A multi-exit model -> one bundle of segments, checked before it appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cascade_train.exits import PABEE, MultiExitClassifier, open_exits
from cascade_train.inference import collator, features
from cascade_train.settings import guarded
from cascade_train.tasks import Examples
from numpy.typing import NDArray

from cascade_export.check import USUAL_CHECK, Check, check_drop, compare, load_check_data
from cascade_export.checkpoint import TRACE
from cascade_export.convert import convert_segment
from cascade_export.export import DEFAULT_THRESHOLD, TOKENIZER_FILE, bundle_of
from cascade_export.precision import WRITERS, write_precision
from cascade_export.segments import Segment
from cascade_export.torch_checkpoint import TorchCheckpoint, open_torch
from cascade_export.verify import TOLERANCE, check_texts
from cascade_export.weights import move_weights
from cascade_rt import CascadeRuntime
from cascade_rt.bundle import Bundle, MemberEntry, WeightFile, sha256_of, write_bundle, write_manifest
from cascade_rt.bundle.manifest import ENTROPY, EXIT_RULES, HIDDEN_STATES, PATIENCE, TOKENS
from cascade_rt.bundle.precisions import PRECISIONS
from cascade_rt.engine.prepared import OFF
from cascade_rt.engine.task import SingleLabel
from cascade_rt.errors import CascadeError, InvalidOption
from cascade_rt.types import Text

_TASK = SingleLabel()

PRECISIONS_OF_SEGMENTS = tuple(name for name, writer in WRITERS.items() if not writer.needs_texts)
"""All but those that need texts: a segment alone does not see any."""
_TRACED = 16  # tokens
_PATIENCE = 2  # until tuning finds a better one


def export_exits(
    source: str,
    output: Path,
    *,
    rule: str | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    precision: str = "fp32",
    check: Check = USUAL_CHECK,
    overwrite: bool = False,
) -> Bundle:
    """Export a multi-exit model as a bundle of segments, one for each exit.

    `source`: a folder that `train_exits` wrote. `rule`: the exit rule, one of EXIT_RULES; None for that of its paper:
    patience for PABEE, else entropy. `threshold`: of each exit, until tuning finds better ones. `precision`: of all
    segments. Every exit is compared with torch in one piece, with itself in other batches, and with torch on the texts
    of `check`, which calibrates no segments. Raises CascadeError where a check fails; nothing is written then.
    """
    if check.calibrate:
        raise InvalidOption("calibrate", check.calibrate, "False for segments, which share their layers")
    if check.exporter != TRACE:
        raise InvalidOption("exporter", check.exporter, f"{TRACE} for segments, which no other exporter knows")
    checkpoint = open_torch(source)
    whole = open_exits(source)
    rule = rule or (PATIENCE if whole.kind == PABEE else ENTROPY)
    if rule not in EXIT_RULES:
        raise InvalidOption("exit_rule", rule, f"one of {', '.join(EXIT_RULES)}")
    if precision not in PRECISIONS_OF_SEGMENTS:
        raise InvalidOption("precision", precision, f"one of {', '.join(PRECISIONS_OF_SEGMENTS)}, for all segments")
    segments = [Segment(whole, index) for index in range(1 + len(whole.after))]
    settings: dict[str, Any] = {"kind": rule} | ({"patience": _PATIENCE} if rule == PATIENCE else {})
    texts = check_texts(checkpoint)
    expected = _TASK.probabilities(_in_one_piece(checkpoint, whole, texts))
    with write_bundle(output, overwrite=overwrite) as folder, TemporaryDirectory(prefix="cascade-export-") as work:
        checkpoint.write_tokenizer(folder / TOKENIZER_FILE)
        with guarded(source, "cannot be exported to ONNX", "expected a multi-exit model of BERT or its like"):
            members = [_fused(checkpoint, segment, Path(work), index) for index, segment in enumerate(segments)]
        if EXIT_RULES[rule].parameter == "thresholds":
            members = [replace(member, threshold=threshold) for member in members[:-1]] + members[-1:]
        bundle = replace(bundle_of([checkpoint], members, folder), exit_rule=settings)
        bundle = _written(bundle, Path(work), folder, "fp32")
        differences = _compared(checkpoint, folder, texts, expected)
        if precision != "fp32":
            bundle = _written(bundle, Path(work), folder, precision)
        with CascadeRuntime(folder, **replace(check.execution, cache=OFF).arguments()) as runtime:
            facts: list[dict[str, Any]] = [{"max_probability_difference": difference} for difference in differences]
            for fact, batched in zip(facts, _batch_differences(runtime, texts), strict=True):
                fact["batch_difference"] = batched
            data = load_check_data(check.data, checkpoint, check.reading)
            if data is not None:
                original = _TASK.probabilities(_in_one_piece(checkpoint, whole, data.texts))
                finished = _TASK.probabilities(runtime.member_logits(data.texts)[0])
                for fact, member, ours, theirs in zip(facts, bundle.members, finished, original, strict=True):
                    fact["check"] = report = compare(theirs, ours, data.labels)
                    check_drop(member.name, precision, report, check.max_accuracy_drop)
        checked = [
            replace(member, other={**member.other, **fact}) for member, fact in zip(bundle.members, facts, strict=True)
        ]
        bundle = replace(bundle, members=tuple(checked))
        write_manifest(folder, bundle)
    return bundle


def _fused(checkpoint: TorchCheckpoint, segment: Segment, work: Path, index: int) -> MemberEntry:
    """Write a segment's fused fp32 graph to the folder `work`; return its entry, without threshold and hash."""
    name = f"exit-{index + 1}"
    fused = convert_segment(segment, work / f"{name}.onnx", _TRACED)
    return MemberEntry(
        name=name,
        file=f"{name}.onnx",
        sha256="",
        layers=len(segment.layers),
        hidden_size=checkpoint.hidden_size,
        parameters=sum(weight.numel() for weight in segment.parameters()),
        precision="fp32",
        threshold=None,
        intermediate_size=checkpoint.intermediate_size,
        positions=checkpoint.positions,
        reads=TOKENS if segment.reads_tokens else HIDDEN_STATES,
        exit_flops=() if segment.exit is None else segment.exit.flops,
        other={"fused": fused},
    )


def _written(bundle: Bundle, work: Path, folder: Path, precision: str) -> Bundle:
    """Write the segments of the folder `work` in a precision into the bundle's folder, with a manifest; return it."""
    members = []
    for member in bundle.members:
        file = folder / member.file
        write_precision(work / member.file, file, precision)
        data = tuple(WeightFile.of(folder, name) for name in move_weights(file))
        bits = PRECISIONS[precision].weight_bits
        members.append(replace(member, precision=precision, sha256=sha256_of(file), data=data, weight_bits=bits))
    bundle = replace(bundle, members=tuple(members))
    write_manifest(folder, bundle)
    return bundle


def _in_one_piece(
    checkpoint: TorchCheckpoint, whole: MultiExitClassifier, texts: Sequence[Text]
) -> NDArray[np.float32]:
    """Return the logits of all exits, float32 (exits, texts, labels), from torch, each text alone."""
    rows = features(checkpoint.tokenizer, whole.model, Examples(texts, [0] * len(texts)), checkpoint.max_length)
    collate = collator(checkpoint.tokenizer)
    with torch.inference_mode():
        logits = [whole(**collate([row])) for row in rows]
    return np.concatenate([found.float().numpy() for found in logits], axis=1)


def _compared(
    checkpoint: TorchCheckpoint, folder: Path, texts: Sequence[Text], expected: NDArray[np.float64]
) -> list[float]:
    """Return the largest difference of a probability from torch, for each exit; raise CascadeError beyond TOLERANCE."""
    with CascadeRuntime(folder, cache=OFF) as runtime:
        found = _TASK.probabilities(runtime.member_logits(texts)[0])
    differences = np.abs(found - expected).max(axis=(1, 2))
    if not differences.max() <= TOLERANCE:
        exit = int(differences.argmax())
        raise CascadeError(
            f"{checkpoint.source}: after exit {exit + 1} the exported graph differs from torch, probabilities by "
            f"{differences[exit]:.2e} (allowed {TOLERANCE:.0e}); this model cannot be exported"
        )
    return [float(difference) for difference in differences]


def _batch_differences(runtime: CascadeRuntime, texts: Sequence[Text]) -> list[float]:
    """Return how much a probability of each exit depends on the other texts of a call."""
    together = _TASK.probabilities(runtime.member_logits(texts)[0])
    alone = np.concatenate([_TASK.probabilities(runtime.member_logits([text])[0]) for text in texts], axis=1)
    return [float(difference) for difference in np.abs(together - alone).max(axis=(1, 2))]
