"""One member on its way into a bundle: written in a precision, run, and compared with its original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cascade_export.check import (
    Check,
    CheckData,
    Probabilities,
    batch_difference,
    check_drop,
    compare,
    probabilities,
    speeds,
)
from cascade_export.checkpoint import Checkpoint, built_in_texts
from cascade_rt.bundle import BATCH_TOLERANCE, MemberEntry, WeightFile, sha256_of
from cascade_rt.bundle.manifest import TYPICAL_TOKENS, encoder_flops
from cascade_rt.engine.backends import usable
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.prepared import OFF
from cascade_rt.engine.providers import CPU, OPENVINO, instead_of, is_installed
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import BundleError, CascadeError, InputError, MissingExtraError
from cascade_rt.types import Text

AUTO = "auto"
FP32_ON_OPENVINO = "fp32 on openvino"
TABLE = "int8-table"
"""The precision of averaging networks in int8."""
_TRIED_BY_AUTO = ("int8", TABLE, "fp16", "fp32")
_PLAIN = 0.05  # deviation from the FLOPs of a plain encoder: poolers, classifiers and projections of embeddings
_LARGEST_COUNTED = 2**31 - 2**20  # bytes of a graph whose products are counted: it is changed in memory
_BATCHED = 64  # texts of the check data that are run in many batchings, to see whether that changes an answer


class Files(Protocol):
    """A member's ONNX files, one for each precision, and the original that they are compared with."""

    @property
    def precisions(self) -> Sequence[str]:
        """The precisions that there are files of, or that they can be made in."""

    @property
    def usual(self) -> str:
        """The default precision."""

    @property
    def removed(self) -> int:
        """Weights that it no longer has, of words."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts for the manifest."""

    def copy(self, precision: str, folder: Path) -> tuple[str, list[str]]:
        """Copy the file of a precision into a bundle's folder; return the paths there: its own, its external data's."""

    def weight_bits(self, precision: str) -> int:
        """Return the bits of the weights of products in a precision of bytes."""

    def original(self, texts: Sequence[Text], tokenizer: TextTokenizer) -> Probabilities | None:
        """Return the original's class probabilities, float64 (texts, labels); None where there is no original."""


class MemberExport:
    """A member, the texts that it is checked on, and the bundle's folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: Files,
        tokenizer: TextTokenizer,
        folder: Path,
        check: Check,
        data: CheckData | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._files = files
        self._folder = folder
        self._max_accuracy_drop = check.max_accuracy_drop
        self._execution = usable(replace(check.execution, cache=OFF))
        self._data = data
        self._encoded = tokenizer.encode(data.texts) if data else None
        self._original = files.original(data.texts, tokenizer) if data else None
        self._batched = tokenizer.encode([*built_in_texts(checkpoint.pair), *(data.texts[:_BATCHED] if data else [])])

    def export(self, precision: str | None) -> MemberEntry:
        """Write the member in a precision, None for the usual one, and check it; return its entry, without threshold.

        AUTO takes the fastest precision that is batch-invariant and passes. Raises InputError for a precision that the
        member cannot have, and CascadeError if the check fails.
        """
        precision, possible = precision or self._files.usual, self._files.precisions
        if precision.startswith("int8") and TABLE in possible:
            precision = TABLE  # its only one of bytes, so that a bundle in int8 can be asked for by one name
        by_auto = dict.fromkeys(instead_of(name, self._execution.provider) or name for name in _TRIED_BY_AUTO)
        tried = [name for name in by_auto if name in possible] if precision == AUTO else [precision]
        if not tried or not set(tried) <= set(possible):
            raise InputError(
                f"member {self._checkpoint.name!r}: found the precision {precision!r}, expected one of: "
                f"{', '.join([*possible, AUTO])}"
            )
        return self._fastest(tried) if precision == AUTO else self._checked(*self._written(precision))

    def _fastest(self, tried: Sequence[str]) -> MemberEntry:
        """Measure each precision on single texts and in bulk, and take the fastest that is batch-invariant and passes.

        Where OpenVINO is installed, fp32 is measured there too, for comparison.
        """
        if self._encoded is None or self._original is None:
            missing = (
                "no texts to compare on; give check data" if self._data is None else "no fp32 file to compare with"
            )
            raise InputError(f"member {self._checkpoint.name!r}: found the precision auto and {missing}")
        members: dict[str, Stage] = {}
        elsewhere: dict[str, Stage] = {}
        refused: dict[str, str] = {}
        for name in tried:
            try:
                entry, member = self._written(name)
                member.load()  # now, because the next precision replaces its file
                members[name] = member
                if name == "fp32" and self._execution.provider == CPU and is_installed(OPENVINO):
                    with suppress(BundleError):  # it does not have all operators
                        other = self._stage(entry, usable(Execution(OPENVINO, self._execution.threads)))
                        other.load()
                        elsewhere[FP32_ON_OPENVINO] = other
            except CascadeError as error:  # the provider has no kernels for it
                refused[name] = str(error)
        compared = speeds({**members, **elsewhere}, self._encoded)
        for name in sorted(members, key=lambda name: compared[name].alone * compared[name].in_bulk):
            try:
                entry = self._checked(*self._written(name))
            except CascadeError as error:
                refused[name] = str(error)
                continue
            difference = entry.other.get("batch_difference")
            if difference is None or difference > BATCH_TOLERANCE:
                refused[name] = f"scores depend on the batch (by {difference})"
                continue
            found = {"seconds_per_text": {name: vars(speed) for name, speed in compared.items()}, "refused": refused}
            return replace(entry, other={**entry.other, AUTO: found})
        raise CascadeError("no precision passes: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))

    def _written(self, precision: str) -> tuple[MemberEntry, Stage]:
        """Put the member's file in a precision into the folder, in place of one that was tried before."""
        checkpoint, folder = self._checkpoint, self._folder
        file, data = self._files.copy(precision, folder)
        size = sum((folder / name).stat().st_size for name in [file, *data])
        entry = MemberEntry(
            name=checkpoint.name,
            file=file,
            sha256=sha256_of(folder / file),
            layers=checkpoint.layers,
            hidden_size=checkpoint.hidden_size,
            parameters=checkpoint.parameters - self._files.removed,
            precision=precision,
            threshold=None,
            intermediate_size=checkpoint.intermediate_size,
            positions=checkpoint.max_length if self._files.removed else checkpoint.positions,
            data=tuple(WeightFile.of(folder, file) for file in data),
            flops=_flops(folder / file, checkpoint) if size < _LARGEST_COUNTED else (),
            weight_bits=self._files.weight_bits(precision),
            other=self._files.facts,
        )
        return entry, self._stage(entry, self._execution)

    def _stage(self, entry: MemberEntry, execution: Execution) -> Stage:
        return Stage(entry, self._folder / entry.file, len(self._checkpoint.labels), execution)

    def _checked(self, entry: MemberEntry, member: Stage) -> MemberEntry:
        """Run the finished member; return its entry with the measurements; raise CascadeError if it lost too much."""
        found: dict[str, Any] = {}
        task = self._checkpoint.task
        alone = probabilities(member, self._batched, task)
        if (difference := batch_difference(member, self._batched, alone, task)) is not None:
            found["batch_difference"] = difference
        if self._encoded is not None and self._data is not None:
            exported = probabilities(member, self._encoded, task)
            found["check"] = report = compare(self._original, exported, self._data.labels, task)
            if self._original is not None:
                check_drop(entry.name, entry.precision, report, self._max_accuracy_drop)
        return replace(entry, other={**entry.other, **found})


def _flops(file: Path, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the FLOPs counted in a member's graph, () where they are those of a plain encoder of its shape."""
    try:
        from cascade_export.flops import graph_flops  # noqa: PLC0415 - loads onnx
    except ImportError as error:
        if checkpoint.layers:
            return ()
        raise MissingExtraError("a member without layers", "export", error) from error
    counted = graph_flops(file)
    plain = encoder_flops(checkpoint.layers, checkpoint.hidden_size, checkpoint.intermediate_size)
    found = np.polynomial.polynomial.polyval(TYPICAL_TOKENS, counted)
    return () if abs(found - plain) <= _PLAIN * plain else counted
