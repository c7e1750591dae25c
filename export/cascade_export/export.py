"""Fine-tuned members -> one bundle, checked before it appears."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from cascade_train.settings import guarded
from tqdm import tqdm

from cascade_export.check import (
    MAX_ACCURACY_DROP,
    CheckData,
    Probabilities,
    batch_difference,
    check_allowed,
    check_drop,
    compare,
    load_check_data,
    probabilities,
    speeds,
)
from cascade_export.checkpoint import SENTENCES, Checkpoint, check_fit, tokenizer_differences
from cascade_export.onnx_checkpoint import OnnxCheckpoint, is_onnx, open_onnx
from cascade_rt.bundle import BATCH_TOLERANCE, Bundle, MemberEntry, WeightFile, sha256_of, write_bundle, write_manifest
from cascade_rt.engine.backends import usable
from cascade_rt.engine.execution import Execution
from cascade_rt.engine.providers import CPU, OPENVINO, instead_of, is_installed, provider_name
from cascade_rt.engine.stage import Stage
from cascade_rt.engine.task import SingleLabel
from cascade_rt.engine.tokenization import Encoded, TextTokenizer
from cascade_rt.errors import BundleError, CascadeError, InputError, InvalidOption, MissingExtraError
from cascade_rt.io.readers import AS_USUAL, Reading
from cascade_rt.tuning.metrics import ece
from cascade_rt.types import Text

_TASK = SingleLabel()

if TYPE_CHECKING:
    from cascade_export.torch_checkpoint import TorchCheckpoint

DEFAULT_THRESHOLD = 0.9
TOKENIZER_FILE = "tokenizer.json"
AUTO = "auto"
FP32_ON_OPENVINO = "fp32 on openvino"
_TRIED_BY_AUTO = ("int8", "fp16", "fp32")
_ROUNDING_TEXTS = 512
_BATCHED = 64
_ALIGNMENT_TEXTS = 1000
_TOOLS = ("cascade-rt", "torch", "transformers", "optimum-onnx", "onnx", "onnxruntime", "tokenizers")


@dataclass(frozen=True)
class Checks:
    """What finished members are checked on, and what they may lose."""

    data: CheckData | None
    max_accuracy_drop: float
    provider: str  # as `provider_name` returns it
    provider_options: Mapping[str, str] | None
    calibrate: bool
    batched: Encoded  # texts that are run in many batchings, to see whether that changes an answer


@dataclass(frozen=True)
class _Writer:
    """A member that can be written in some precisions, and the original that it is compared with."""

    precisions: Sequence[str]
    usual: str
    write: Callable[[str, Path], tuple[str, list[str]]]  # (precision, folder) -> file and external data, in the folder
    original: Callable[[], Probabilities | None]  # of the check data
    facts: Mapping[str, Any]


def export_bundle(
    sources: Sequence[str],
    output: Path,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    pair: bool | None = None,
    max_length: int | None = None,
    precision: str | Mapping[str, str] | None = None,
    check_data: Path | None = None,
    reading: Reading = AS_USUAL,
    max_accuracy_drop: float = MAX_ACCURACY_DROP,
    provider: str = "cpu",
    provider_options: Mapping[str, str] | None = None,
    calibrate: bool = False,
    overwrite: bool = False,
) -> Bundle:
    """Export fine-tuned classifiers as the members of one bundle; each is checked before the bundle appears.

    Args:
        sources: Hugging Face folders or hf:NAME, or ONNX files or folders; they are sorted by their number of layers.
            Those with another tokenizer than the first, but the same words, are aligned to it (torch weights only).
        output: The bundle's folder.
        threshold: Threshold of every member but the last, until tuning finds better ones.
        pair: Whether the task is on pairs of texts; None for what training recorded, else single texts.
        max_length: Tokens; None for what training recorded, else what the model takes.
        precision: One for all members, or by the member's name ("" for the others); None for fp32, or what an ONNX
            folder holds. "auto" takes the fastest, on `provider`, that is batch-invariant and passes the check.
        check_data: Texts, with or without labels, to compare aligned and finished members with their originals on;
            None for what training held out.
        reading: How check_data is read.
        max_accuracy_drop: Percentage points that a member may lose in that check.
        provider: Where finished members are checked and timed.
        provider_options: As for `CascadeRuntime`.
        calibrate: Divide each member's logits by the temperature that fits the check data best; they need labels.
        overwrite: Replace an existing bundle.

    Raises:
        CascadeError: Members do not fit together, or one fails its check; nothing is written.
    """
    if not 0 <= threshold <= 1:
        raise InvalidOption("threshold", threshold, "a number from 0 to 1")
    check_allowed(max_accuracy_drop)
    checkpoints = [_open(source, pair, max_length) for source in sources]
    checkpoints.sort(key=lambda checkpoint: (checkpoint.layers, checkpoint.parameters))
    check_fit(checkpoints)
    checkpoints = _with_one_tokenizer(checkpoints, check_data, reading)
    wanted = _by_member(precision, [checkpoint.name for checkpoint in checkpoints])
    running = provider_name(provider)
    first = checkpoints[0]
    with write_bundle(output, overwrite=overwrite) as folder:
        first.write_tokenizer(folder / TOKENIZER_FILE)
        tokenizer = TextTokenizer(folder / TOKENIZER_FILE, first.max_length, first.pair)
        members = []
        for checkpoint in tqdm(checkpoints, desc="exporting", unit=" members", disable=None):
            data = load_check_data(check_data, checkpoint, reading)
            batched = tokenizer.encode([*_built_in(first.pair), *(data.texts[:_BATCHED] if data else [])])
            checks = Checks(data, max_accuracy_drop, running, provider_options, calibrate, batched)
            tau = None if checkpoint is checkpoints[-1] else threshold
            with guarded(checkpoint.source, "cannot be exported", "expected a fine-tuned classifier that can run"):
                members.append(_export_member(checkpoint, folder, tokenizer, tau, wanted[checkpoint.name], checks))
        bundle = bundle_of(checkpoints, members, folder)
        write_manifest(folder, bundle)
    return bundle


def bundle_of(checkpoints: Sequence[Checkpoint], members: Sequence[MemberEntry], folder: Path) -> Bundle:
    """Return the manifest of members in `folder`, where the tokenizer is too, with the facts of their checkpoints."""
    first = checkpoints[0]
    return Bundle(
        labels=first.labels,
        pair=first.pair,
        max_length=first.max_length,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
        members=tuple(members),
        provenance={
            "versions": {tool: found for tool in _TOOLS if (found := _version(tool))},
            "checkpoints": {checkpoint.name: _origin(checkpoint) for checkpoint in checkpoints},
        },
    )


def _built_in(pair: bool) -> list[Text]:
    return [(one, other) for one in SENTENCES for other in SENTENCES[:2]] if pair else [*SENTENCES, *SENTENCES[::-1]]


def _open(source: str, pair: bool | None, max_length: int | None) -> Checkpoint:
    if is_onnx(source):
        return open_onnx(source, pair=pair, max_length=max_length)
    try:
        import cascade_export.convert  # noqa: PLC0415 - they load torch and all else that is needed
        import cascade_export.precision  # noqa: PLC0415
        import cascade_export.verify  # noqa: F401, PLC0415
        from cascade_export.torch_checkpoint import open_torch  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(f"exporting {source!r}, which is not an ONNX file,", "export", error) from error
    return open_torch(source, pair=pair, max_length=max_length)


def _with_one_tokenizer(
    checkpoints: Sequence[Checkpoint], check_data: Path | None, reading: Reading
) -> list[Checkpoint]:
    """Align the members whose tokenizer is another than the first's; raise CascadeError if that cannot be done."""
    first, *others = checkpoints
    differing = {other.name: parts for other in others if (parts := tokenizer_differences(first, other))}
    if not differing:
        return list(checkpoints)
    progress = tqdm(others, desc="aligning", unit=" members", disable=None)
    return [
        first,
        *(
            _aligned(other, first, differing[other.name], check_data, reading) if other.name in differing else other
            for other in progress
        ),
    ]


def _aligned(
    checkpoint: Checkpoint, first: Checkpoint, differing: Sequence[str], check_data: Path | None, reading: Reading
) -> Checkpoint:
    for member in (first, checkpoint):
        if isinstance(member, OnnxCheckpoint):
            raise CascadeError(
                f"members {first.name!r} and {checkpoint.name!r} do not fit together: their tokenizers differ in "
                f"{', '.join(differing)}, and {member.name!r} is an ONNX file, which cannot be aligned; use its torch "
                "weights, or members of one family"
            )
    from cascade_export.torch_checkpoint import TorchCheckpoint, align_checkpoint  # noqa: PLC0415 - loads torch

    if not (isinstance(checkpoint, TorchCheckpoint) and isinstance(first, TorchCheckpoint)):
        raise TypeError(f"no way to align a {type(checkpoint).__name__} to a {type(first).__name__}")
    data = load_check_data(check_data, checkpoint, reading)
    texts = data.texts[:_ALIGNMENT_TEXTS] if data else _built_in(checkpoint.pair)
    return align_checkpoint(checkpoint, first, texts)


def _by_member(precision: str | Mapping[str, str] | None, names: Sequence[str]) -> dict[str, str | None]:
    """Return each member's precision, None for its own; raise InputError for a name that no member has."""
    by_name = {"": precision} if isinstance(precision, str) else dict(precision or {})
    if unknown := by_name.keys() - {"", *names}:
        raise InvalidOption("precision", sorted(unknown), f"members among: {', '.join(names)}")
    return {name: by_name.get(name, by_name.get("")) for name in names}


def _export_member(
    checkpoint: Checkpoint,
    folder: Path,
    tokenizer: TextTokenizer,
    threshold: float | None,
    wanted: str | None,
    checks: Checks,
) -> MemberEntry:
    encoded = tokenizer.encode(checks.data.texts) if checks.data else None
    with _writer(checkpoint, tokenizer, checks) as writer:
        precision = wanted or writer.usual
        by_auto = dict.fromkeys(instead_of(name, checks.provider) or name for name in _TRIED_BY_AUTO)
        tried = [name for name in by_auto if name in writer.precisions] if precision == AUTO else [precision]
        if not tried or not set(tried) <= set(writer.precisions):
            raise InputError(
                f"member {checkpoint.name!r}: found the precision {precision!r}, expected one of: "
                f"{', '.join([*writer.precisions, AUTO])}"
            )
        original = writer.original() if checks.data else None

        def written(name: str) -> tuple[MemberEntry, Stage]:
            file, data = writer.write(name, folder)
            entry = MemberEntry(
                name=checkpoint.name,
                file=file,
                sha256=sha256_of(folder / file),
                layers=checkpoint.layers,
                hidden_size=checkpoint.hidden_size,
                parameters=checkpoint.parameters,
                precision=name,
                threshold=threshold,
                intermediate_size=checkpoint.intermediate_size,
                positions=checkpoint.positions,
                data=tuple(WeightFile(file, sha256_of(folder / file)) for file in data),
                other=writer.facts,
            )
            return entry, run_by(checks.provider, entry, checks.provider_options)

        def run_by(provider: str, entry: MemberEntry, options: Mapping[str, str] | None = None) -> Stage:
            execution = usable(Execution(provider, provider_options=options))
            return Stage(entry, folder / entry.file, len(checkpoint.labels), execution)

        if precision != AUTO:
            entry, member = written(precision)
            return _checked(entry, member, encoded, original, checks)
        if encoded is None or original is None:
            missing = "no texts to compare on; give check data" if encoded is None else "no fp32 file to compare with"
            raise InputError(f"member {checkpoint.name!r}: found the precision auto and {missing}")
        return _fastest(tried, written, run_by, encoded, original, checks)


def _fastest(
    tried: Sequence[str],
    written: Callable[[str], tuple[MemberEntry, Stage]],
    run_by: Callable[[str, MemberEntry], Stage],
    encoded: Encoded,
    original: Probabilities,
    checks: Checks,
) -> MemberEntry:
    """Measure each precision on single texts and in bulk, and take the fastest that is batch-invariant and passes.

    Where OpenVINO is installed, fp32 is measured there too, for comparison.
    """
    members: dict[str, Stage] = {}
    elsewhere: dict[str, Stage] = {}
    refused: dict[str, str] = {}
    for name in tried:
        try:
            entry, member = written(name)
            member.load()  # now, because the next precision replaces its file
            members[name] = member
            if name == "fp32" and checks.provider == CPU and is_installed(OPENVINO):
                with suppress(BundleError):  # it does not have all operators
                    other = run_by(OPENVINO, entry)
                    other.load()
                    elsewhere[FP32_ON_OPENVINO] = other
        except CascadeError as error:  # the provider has no kernels for it
            refused[name] = str(error)
    compared = speeds({**members, **elsewhere}, encoded)
    measured = {name: compared[name] for name in members}
    for name in sorted(measured, key=lambda name: measured[name].alone * measured[name].in_bulk):
        try:
            entry = _checked(*written(name), encoded, original, checks)
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


def _checked(
    entry: MemberEntry, member: Stage, encoded: Encoded | None, original: Probabilities | None, checks: Checks
) -> MemberEntry:
    """Run the finished member; return its entry with the measurements, or raise CascadeError if it lost too much."""
    found: dict[str, Any] = {}
    alone = probabilities(member, checks.batched)
    if (difference := batch_difference(member, checks.batched, alone)) is not None:
        found["batch_difference"] = difference
    if encoded is not None and checks.data is not None:
        found["check"] = report = compare(original, probabilities(member, encoded), checks.data.labels)
        if original is not None:
            check_drop(entry.name, entry.precision, report, checks.max_accuracy_drop)
    return replace(entry, other={**entry.other, **found})


@contextmanager
def _writer(checkpoint: Checkpoint, tokenizer: TextTokenizer, checks: Checks) -> Iterator[_Writer]:
    if isinstance(checkpoint, OnnxCheckpoint):
        if checks.calibrate:
            raise InputError(f"member {checkpoint.name!r} is an ONNX file; calibration needs torch weights")
        yield _onnx_writer(checkpoint, tokenizer, checks)
        return
    from cascade_export.convert import convert  # noqa: PLC0415 - loads torch, which ONNX folders do not need
    from cascade_export.precision import WRITERS, write_precision  # noqa: PLC0415
    from cascade_export.torch_checkpoint import TorchCheckpoint  # noqa: PLC0415
    from cascade_export.verify import check_texts, torch_probabilities, verify  # noqa: PLC0415

    if not isinstance(checkpoint, TorchCheckpoint):
        raise TypeError(f"no way to export a {type(checkpoint).__name__}")
    scaled = _calibrate(checkpoint, checks) if checks.calibrate else {}
    aligned = {"alignment": checkpoint.alignment} if checkpoint.alignment else {}
    with TemporaryDirectory(prefix="cascade-export-") as work:
        source = Path(work) / f"{checkpoint.name}.onnx"
        fused = convert(checkpoint, source)
        texts = check_texts(checkpoint)
        difference = verify(checkpoint, _reference(checkpoint, source), tokenizer, texts)
        some = checks.data.texts[:: len(checks.data.texts) // _ROUNDING_TEXTS or 1] if checks.data else texts
        like = tokenizer.encode(some[:_ROUNDING_TEXTS])

        @cache  # `auto` writes the one that it takes a second time
        def made(name: str) -> Path:
            file = Path(work) / f"{name}-{source.name}"
            write_precision(source, file, name, like)
            return file

        def write(name: str, folder: Path) -> tuple[str, list[str]]:
            shutil.copyfile(made(name), folder / source.name)
            return source.name, []

        yield _Writer(
            tuple(WRITERS),
            "fp32",
            write,
            lambda: torch_probabilities(checkpoint.original or checkpoint, checks.data.texts) if checks.data else None,
            {"fused": fused, "max_probability_difference": difference, **aligned, **scaled},
        )


def _calibrate(checkpoint: TorchCheckpoint, checks: Checks) -> dict[str, Any]:
    """Scale the checkpoint's logits by the temperature that fits the check data; return it for the manifest."""
    from cascade_export.temperature import divide_logits, fit_temperature  # noqa: PLC0415 - loads torch
    from cascade_export.verify import torch_probabilities  # noqa: PLC0415

    if checks.data is None or checks.data.labels is None:
        raise InputError(f"member {checkpoint.name!r}: found no labelled data to calibrate on; give check data")
    before = torch_probabilities(checkpoint, checks.data.texts)
    logits = np.log(np.maximum(before, 1e-30))
    temperature = fit_temperature(logits, checks.data.labels)
    divide_logits(checkpoint.model, temperature)
    if checkpoint.original:
        divide_logits(checkpoint.original.model, temperature)
    after = _TASK.probabilities(logits / temperature)
    correct = before.argmax(axis=1) == checks.data.labels
    return {
        "temperature": {
            "value": temperature,
            "texts": len(correct),
            "ece": {
                "before": ece(correct, _TASK.confidence(before)),
                "after": ece(correct, _TASK.confidence(after)),
            },
        }
    }


def _onnx_writer(checkpoint: OnnxCheckpoint, tokenizer: TextTokenizer, checks: Checks) -> _Writer:
    """Take the file as it is; an fp32 file in the same folder is the original."""

    def original() -> Probabilities | None:
        if "fp32" not in checkpoint.files or not checks.data:
            return None
        return probabilities(_reference(checkpoint, checkpoint.files["fp32"]), tokenizer.encode(checks.data.texts))

    return _Writer(tuple(checkpoint.files), checkpoint.usual, checkpoint.copy, original, {})


def _reference(checkpoint: Checkpoint, path: Path) -> Stage:
    """Return the member in fp32 on the CPU, the reference for every provider and precision."""
    entry = MemberEntry(checkpoint.name, path.name, "", checkpoint.layers, checkpoint.hidden_size, 1, "fp32", None)
    return Stage(entry, path, len(checkpoint.labels), usable(Execution()))


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return where a member comes from, without paths of the machine that exported it."""
    record = checkpoint.training
    kept = ("layers", "task", "recipe", "data", "metric", "exits")
    training: dict[str, Any] = {key: record[key] for key in kept if key in record}
    training |= {key: _public(record[key]) for key in ("base", "tokenizer") if record.get(key)}
    if "validation" in record:
        training["validation"] = record["validation"]["best"]
    origin = {"source": _public(checkpoint.source), "model_type": checkpoint.model_type}
    return origin | ({"training": training} if training else {})


def _public(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def _version(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None
