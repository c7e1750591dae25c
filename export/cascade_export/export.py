"""Fine-tuned members -> one bundle, checked before it appears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cascade_train.settings import guarded
from tqdm import tqdm

from cascade_export.check import USUAL_CHECK, Check, CheckData, load_check_data
from cascade_export.checkpoint import EXPORTERS, TRACE, Checkpoint, built_in_texts, check_fit, tokenizer_differences
from cascade_export.cuts import with_chosen_cuts, with_shared_cuts
from cascade_export.member import Files, MemberExport
from cascade_export.onnx_checkpoint import OnnxCheckpoint, is_onnx, open_onnx
from cascade_rt.bundle import Bundle, MemberEntry, sha256_of, write_bundle, write_manifest
from cascade_rt.bundle.manifest import encoder_flops
from cascade_rt.engine.backends import usable
from cascade_rt.engine.task import MultiLabel
from cascade_rt.engine.tokenization import TextTokenizer
from cascade_rt.errors import CascadeError, InputError, InvalidOption, MissingExtraError
from cascade_rt.io.readers import read_examples

if TYPE_CHECKING:
    from cascade_export.vocabulary import Vocabulary

DEFAULT_THRESHOLD = 0.9
TOKENIZER_FILE = "tokenizer.json"
_ALIGNMENT_TEXTS = 1000
_TOOLS = ("cascade-rt", "torch", "transformers", "onnx", "onnxruntime", "tokenizers")


def export_bundle(
    sources: Sequence[str],
    output: Path,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    pair: bool | None = None,
    max_length: int | None = None,
    precision: str | Mapping[str, str] | None = None,
    check: Check = USUAL_CHECK,
    overwrite: bool = False,
) -> Bundle:
    """Export fine-tuned classifiers as the members of one bundle; each is checked before the bundle appears.

    Args:
        sources: Hugging Face folders or hf:NAME, or ONNX files or folders; they are sorted by their FLOPs.
            Those with another tokenizer than the first, but the same words, are aligned to it (torch weights only).
        output: The bundle's folder.
        threshold: Threshold of every member but the last, until tuning finds better ones.
        pair: Whether the task is on pairs of texts; None for what training recorded, else single texts.
        max_length: Tokens; None for what training recorded, else what the model takes.
        precision: One for all members, or by the member's name ("" for the others); None for fp32, or what an ONNX
            folder holds. "auto" takes the fastest, where the check runs, that is batch-invariant and passes the check.
        check: How members are converted, and how aligned and finished ones are compared with their originals.
        overwrite: Replace an existing bundle.

    Raises:
        CascadeError: Members do not fit together, or one fails its check; nothing is written.
    """
    if not 0 <= threshold <= 1:
        raise InvalidOption("threshold", threshold, "a number from 0 to 1")
    checkpoints = [_open(source, pair, max_length) for source in sources]
    checkpoints.sort(key=_cost)
    check_fit(checkpoints)
    checkpoints = _with_one_tokenizer(checkpoints, check)
    wanted = _by_member(precision, [checkpoint.name for checkpoint in checkpoints])
    usable(check.execution)  # fails before the work
    first = checkpoints[0]
    vocabulary = _vocabulary(checkpoints, check)
    with write_bundle(output, overwrite=overwrite) as folder:
        (vocabulary or first).backend.save(str(folder / TOKENIZER_FILE))
        tokenizer = TextTokenizer(folder / TOKENIZER_FILE, first.max_length, first.pair)
        if check.choose_cuts:
            for at, checkpoint in enumerate(checkpoints):
                with _running(checkpoint):
                    checkpoints[at] = with_chosen_cuts(checkpoint, tokenizer, check)
        checkpoints, own_cuts = with_shared_cuts(checkpoints)
        members = []
        for checkpoint in tqdm(checkpoints, desc="exporting", unit=" members", disable=None):
            data = load_check_data(check.data, checkpoint, check.reading)
            with _running(checkpoint), TemporaryDirectory(prefix="cascade-export-") as work:
                files = _files(checkpoint, tokenizer, data, Path(work), check, vocabulary)
                member = MemberExport(checkpoint, files, tokenizer, folder, check, data)
                entry = member.export(wanted[checkpoint.name])
            if checkpoint.name in own_cuts:
                entry = replace(entry, other={**entry.other, "own_cuts": list(own_cuts[checkpoint.name])})
            members.append(entry)
        if not any(isinstance(checkpoint, OnnxCheckpoint) for checkpoint in checkpoints):
            from cascade_export.weights import share_weights  # noqa: PLC0415 - loads onnx

            members = share_weights(folder, members)
        members[:-1] = [replace(member, threshold=threshold) for member in members[:-1]]
        bundle = bundle_of(checkpoints, members, folder, check.exporter)
        if vocabulary:
            bundle = replace(bundle, provenance={**bundle.provenance, "vocabulary": vocabulary.facts})
        write_manifest(folder, bundle)
    return bundle


def _running(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Turn what goes wrong while a checkpoint is run into an InputError that names it."""
    return guarded(checkpoint.source, "cannot be exported", "expected a fine-tuned classifier that can run")


def _cost(one: Checkpoint) -> tuple[float, int]:
    return encoder_flops(one.layers, one.hidden_size, one.intermediate_size), one.parameters


def bundle_of(
    checkpoints: Sequence[Checkpoint], members: Sequence[MemberEntry], folder: Path, exporter: str = TRACE
) -> Bundle:
    """Return the manifest of members in `folder`, where the tokenizer is too, with the facts of their checkpoints.

    `exporter`: what has converted those that have torch weights, one of EXPORTERS.
    """
    first, task = checkpoints[0], checkpoints[-1].task
    return Bundle(
        labels=first.labels,
        task=task.name,
        cuts=task.cuts if isinstance(task, MultiLabel) else (),
        pair=first.pair,
        max_length=first.max_length,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
        members=tuple(members),
        provenance={
            "versions": {tool: found for tool in _TOOLS if (found := _version(tool))},
            "checkpoints": {checkpoint.name: _origin(checkpoint, exporter) for checkpoint in checkpoints},
        },
    )


def _open(source: str, pair: bool | None, max_length: int | None) -> Checkpoint:
    if is_onnx(source):
        return open_onnx(source, pair=pair, max_length=max_length)
    try:
        import cascade_export.torch_files  # noqa: F401, PLC0415 - loads torch and all else that is needed
        from cascade_export.torch_checkpoint import open_torch  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(f"exporting {source!r}, which is not an ONNX file,", "export", error) from error
    return open_torch(source, pair=pair, max_length=max_length)


def _with_one_tokenizer(checkpoints: Sequence[Checkpoint], check: Check) -> list[Checkpoint]:
    """Align the members whose tokenizer is another than the first's; raise CascadeError if that cannot be done."""
    first, *others = checkpoints
    differing = {other.name: parts for other in others if (parts := tokenizer_differences(first, other))}
    if not differing:
        return list(checkpoints)
    progress = tqdm(others, desc="aligning", unit=" members", disable=None)
    return [
        first,
        *(
            _aligned(other, first, differing[other.name], check) if other.name in differing else other
            for other in progress
        ),
    ]


def _aligned(checkpoint: Checkpoint, first: Checkpoint, differing: Sequence[str], check: Check) -> Checkpoint:
    for member in (first, checkpoint):
        if isinstance(member, OnnxCheckpoint):
            raise CascadeError(
                f"members {first.name!r} and {checkpoint.name!r} do not fit together: their tokenizers differ in "
                f"{', '.join(differing)}, and {member.name!r} is an ONNX file, which cannot be aligned; use its torch "
                "weights, or members of one family"
            )
    if not checkpoint.layers:
        raise CascadeError(
            f"members {first.name!r} and {checkpoint.name!r} do not fit together: their tokenizers differ in "
            f"{', '.join(differing)}, and {checkpoint.name!r} has hashed its own n-grams; train it again under the "
            "other tokenizer"
        )
    from cascade_export.torch_checkpoint import TorchCheckpoint, align_checkpoint  # noqa: PLC0415 - loads torch

    if not (isinstance(checkpoint, TorchCheckpoint) and isinstance(first, TorchCheckpoint)):
        raise TypeError(f"no way to align a {type(checkpoint).__name__} to a {type(first).__name__}")
    data = load_check_data(check.data, checkpoint, check.reading)
    texts = data.texts[:_ALIGNMENT_TEXTS] if data else built_in_texts(checkpoint.pair)
    return align_checkpoint(checkpoint, first, texts)


def _by_member(precision: str | Mapping[str, str] | None, names: Sequence[str]) -> dict[str, str | None]:
    """Return each member's precision, None for its own; raise InputError for a name that no member has."""
    by_name = {"": precision} if isinstance(precision, str) else dict(precision or {})
    if unknown := by_name.keys() - {"", *names}:
        raise InvalidOption("precision", sorted(unknown), f"members among: {', '.join(names)}")
    return {name: by_name.get(name, by_name.get("")) for name in names}


def _vocabulary(checkpoints: Sequence[Checkpoint], check: Check) -> Vocabulary | None:
    """Return the vocabulary that the texts of `check` need; None where all tokens are kept."""
    if check.vocabulary is None:
        return None
    from cascade_export.vocabulary import trimmed  # noqa: PLC0415 - loads onnx

    first = checkpoints[0]
    if wrong := [checkpoint.name for checkpoint in checkpoints if isinstance(checkpoint, OnnxCheckpoint)]:
        raise InputError(f"member {wrong[0]!r} is an ONNX file; trimming the vocabulary needs torch weights")
    texts = [example.text for example in read_examples(check.vocabulary, pair=first.pair)]
    try:
        return trimmed(first.backend, texts, check.most_cut_differently)
    except InputError as error:
        raise InputError(f"{check.vocabulary}: {error}") from error


def _files(
    checkpoint: Checkpoint,
    tokenizer: TextTokenizer,
    data: CheckData | None,
    work: Path,
    check: Check,
    vocabulary: Vocabulary | None,
) -> Files:
    if isinstance(checkpoint, OnnxCheckpoint):
        if check.calibrate:
            raise InputError(f"member {checkpoint.name!r} is an ONNX file; calibration needs torch weights")
        return checkpoint
    from cascade_export.torch_checkpoint import TorchCheckpoint  # noqa: PLC0415 - loads torch, ONNX folders need none
    from cascade_export.torch_files import TorchFiles  # noqa: PLC0415

    if not isinstance(checkpoint, TorchCheckpoint):
        raise TypeError(f"no way to export a {type(checkpoint).__name__}")
    return TorchFiles(checkpoint, tokenizer, data, work, check, vocabulary)


def _origin(checkpoint: Checkpoint, exporter: str) -> dict[str, Any]:
    """Return where a member comes from, without paths of the machine that exported it."""
    record = checkpoint.training
    kept = ("layers", "task", "recipe", "data", "metric", "exits")
    training: dict[str, Any] = {key: record[key] for key in kept if key in record}
    training |= {key: _public(record[key]) for key in ("base", "tokenizer") if record.get(key)}
    if "validation" in record:
        training["validation"] = record["validation"]["best"]
    origin: dict[str, Any] = {"source": _public(checkpoint.source), "model_type": checkpoint.model_type}
    if checkpoint.layers and not isinstance(checkpoint, OnnxCheckpoint):  # an averaging network writes its own graph
        package = EXPORTERS[exporter]
        origin["exporter"] = {"name": exporter, "package": package, "version": _version(package)}
    return origin | ({"training": training} if training else {})


def _public(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def _version(tool: str) -> str | None:
    try:
        return version(tool)
    except PackageNotFoundError:
        return None
