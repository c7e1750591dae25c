"""Export untrained copies of members before they are trained: what cannot be exported is found in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cascade_export.check import MAX_ACCURACY_DROP
from cascade_export.checkpoint import member_name
from cascade_export.exits import export_exits
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.exits import MultiExitClassifier, write_exits
from cascade_train.finetune import load_base

from cascade_rt.errors import CascadeError
from cascade_rt.io.writers import write_json

_LAYERS = 2  # of a copy: further ones are like them
_TOKENS = 8


@dataclass(frozen=True)
class Start:
    """Where a member starts; the fields are those of `finetune`."""

    base: str
    layers: int | None = None
    tokenizer: str | None = None
    name: str | None = None
    """Of the member; None for that of the base."""


def try_export(
    starts: Sequence[Start],
    labels: tuple[str, ...],
    *,
    pair: bool,
    max_length: int,
    precision: str = "fp32",
    exits: str | None = None,
    remedy: str = "",
) -> None:
    """Export copies of members together as one bundle, and throw it away.

    A copy has the tokenizer and the weights of its base, but at most 2 layers, a new classifier and at most 8 tokens.
    `exits`: the kind of a multi-exit model, which is exported alone. `remedy`: what else the message says.
    Raises CascadeError as `load_base`, `export_bundle` and `export_exits` do.
    """
    with TemporaryDirectory(prefix="cascade-trial-") as work:
        record = {"pair": pair, "max_length": min(max_length, _TOKENS)}
        folders = [Path(work) / (start.name or member_name(start.base)) for start in starts]
        for folder, start in zip(folders, starts, strict=True):
            _write(folder, start, labels, record, exits)
        bundle = Path(work) / "bundle" / "trial"  # in a folder of its own, since a member may be called like it
        try:
            if exits:
                export_exits(str(folders[0]), bundle, max_accuracy_drop=MAX_ACCURACY_DROP)
            else:
                export_bundle([str(folder) for folder in folders], bundle, precision=precision)
        except CascadeError as error:
            bases = ", ".join(dict.fromkeys(start.base for start in starts))
            reason = str(error).replace(f"{work}/", "")
            raise CascadeError(f"a member made of {bases} could not be exported: {reason}{remedy}") from error


def _write(folder: Path, start: Start, labels: tuple[str, ...], record: Mapping[str, Any], exits: str | None) -> None:
    tokenizer, model = _copy(start, labels)
    if exits:
        whole = MultiExitClassifier(model, exits, range(1, model.config.num_hidden_layers))
        write_exits(folder, whole)
        record = {**record, "exits": {"kind": exits, "after": list(whole.after)}}
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / RECORD, record)


def _copy(start: Start, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """Return tokenizer and model; whole where the base has fewer layers than wanted or cannot be cut."""
    try:
        return load_base(start.base, labels, min(_LAYERS, start.layers or _LAYERS), start.tokenizer)
    except CascadeError:
        return load_base(start.base, labels, start.layers, start.tokenizer)
