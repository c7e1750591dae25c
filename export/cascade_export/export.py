"""Fine-tuned members -> one bundle, verified before it appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cascade_export.checkpoint import Checkpoint, check_fit, open_checkpoint
from cascade_export.convert import convert
from cascade_export.verify import check_texts, verify
from cascade_rt.bundle import Bundle, MemberEntry, sha256_of, write_bundle, write_manifest
from cascade_rt.cpus import usable_threads
from cascade_rt.errors import InputError
from cascade_rt.member import Member, provider_name
from cascade_rt.tokenization import TextTokenizer

DEFAULT_THRESHOLD = 0.9
TOKENIZER_FILE = "tokenizer.json"
_TOOLS = ("cascade-rt", "torch", "transformers", "optimum-onnx", "onnx", "onnxruntime", "tokenizers")


def export_bundle(
    sources: Sequence[str],
    output: Path,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    pair: bool | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Export fine-tuned classifiers (Hugging Face folders or hub ids) as the members of one bundle.

    Members are sorted by their number of layers. `threshold` is every gate's tau until tuning finds better ones;
    `pair` and `max_length` override what training recorded. Each finished graph is compared with torch on
    built-in texts and on some of its own validation texts. Raises CascadeError where members do not fit together
    or a graph differs; then nothing is written.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"found the threshold {threshold}, expected a number from 0 to 1")
    checkpoints = [open_checkpoint(source, pair=pair, max_length=max_length) for source in sources]
    checkpoints.sort(key=lambda checkpoint: (checkpoint.layers, checkpoint.parameters))
    check_fit(checkpoints)
    first = checkpoints[0]
    with write_bundle(output, overwrite=overwrite) as folder:
        first.write_tokenizer(folder / TOKENIZER_FILE, first.max_length)
        tokenizer = TextTokenizer(folder / TOKENIZER_FILE, first.max_length, first.pair)
        members = [
            _export_member(checkpoint, folder, tokenizer, None if checkpoint is checkpoints[-1] else threshold)
            for checkpoint in tqdm(checkpoints, unit=" members", disable=None)
        ]
        bundle = Bundle(
            labels=first.labels,
            pair=first.pair,
            max_length=first.max_length,
            tokenizer_file=TOKENIZER_FILE,
            tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
            members=tuple(members),
            provenance={
                "versions": {tool: version(tool) for tool in _TOOLS},
                "checkpoints": {checkpoint.name: _origin(checkpoint) for checkpoint in checkpoints},
            },
        )
        write_manifest(folder, bundle)
    return bundle


def _export_member(
    checkpoint: Checkpoint, folder: Path, tokenizer: TextTokenizer, threshold: float | None
) -> MemberEntry:
    path = folder / f"{checkpoint.name}.onnx"
    fused = convert(checkpoint, path)
    entry = MemberEntry(
        name=checkpoint.name,
        file=path.name,
        sha256=sha256_of(path),
        layers=checkpoint.layers,
        hidden_size=int(checkpoint.config.hidden_size),
        parameters=checkpoint.parameters,
        precision="fp32",
        threshold=threshold,
        intermediate_size=getattr(checkpoint.config, "intermediate_size", None)
        or getattr(checkpoint.config, "hidden_dim", None),  # DistilBERT's name for it
    )
    member = Member(entry, path, len(checkpoint.labels), provider_name("cpu"), usable_threads(None))
    difference = verify(checkpoint, member, tokenizer, check_texts(checkpoint))
    return replace(entry, other={"fused": fused, "max_probability_difference": difference})


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tell where a member comes from, without the paths of the machine that exported it."""
    record = checkpoint.training
    kept = ("layers", "task", "recipe", "data", "metric")
    training: dict[str, Any] = {key: record[key] for key in kept if key in record}
    if "base" in record:
        training["base"] = _public(record["base"])
    if "validation" in record:
        training["validation"] = record["validation"]["best"]
    origin = {"source": _public(checkpoint.source), "model_type": checkpoint.config.model_type}
    return origin | ({"training": training} if training else {})


def _public(source: str) -> str:
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source
