"""Export untrained copies of members before they are trained: what cannot be exported is found in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cascade_export.checkpoint import member_name
from cascade_export.exits import export_exits
from cascade_export.export import export_bundle
from cascade_train import RECORD
from cascade_train.compat import quiet
from cascade_train.exits import MultiExitClassifier, write_exits
from cascade_train.finetune import load_base
from cascade_train.settings import guarded
from transformers import AutoModelForSequenceClassification

from cascade_rt.errors import CascadeError
from cascade_rt.io.writers import write_json

_LAYERS = 2  # of a copy: further ones are like them
_TOKENS = 8
_WIDTH = 8  # of an attention head
_AS_WIDE = ("embedding_size", "pooler_hidden_size")  # settings of some families, often equal to the hidden size


@dataclass(frozen=True)
class Start:
    """Where a member starts; the fields are those of `finetune`."""

    base: str
    layers: int | None = None
    tokenizer: str | None = None
    name: str | None = None
    """The member's name; None for that of the base."""


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

    A copy has the tokenizer and the settings of its base, but at most 2 layers, narrow ones with random weights, and at
    most 8 tokens. Where that fails, it is tried in full width: not every family can be narrowed.
    `exits`: the kind of a multi-exit model, which is exported alone. `remedy`: what else the message says.
    Raises CascadeError as `load_base`, `export_bundle` and `export_exits` do.
    """
    copies = [_copy(start, labels) for start in starts]
    record = {"pair": pair, "max_length": min(max_length, _TOKENS)}
    for narrow in (True, False):
        with TemporaryDirectory(prefix="cascade-trial-") as work:
            folders = [Path(work) / (start.name or member_name(start.base)) for start in starts]
            bundle = Path(work) / "bundle" / "trial"  # in a folder of its own, since a member may be called like it
            try:
                for folder, (tokenizer, model) in zip(folders, copies, strict=True):
                    _write(folder, tokenizer, _narrowed(model, folder.name) if narrow else model, record, exits)
                if exits:
                    export_exits(str(folders[0]), bundle)
                else:
                    export_bundle([str(folder) for folder in folders], bundle, precision=precision)
                return
            except CascadeError as error:
                if narrow:
                    continue
                bases = ", ".join(dict.fromkeys(start.base for start in starts))
                reason = str(error).replace(f"{work}/", "")
                raise CascadeError(f"a member made of {bases} could not be exported: {reason}{remedy}") from error


def _write(folder: Path, tokenizer: Any, model: Any, record: Mapping[str, Any], exits: str | None) -> None:
    with quiet():
        if exits:
            whole = MultiExitClassifier(model, exits, range(1, model.config.num_hidden_layers))
            write_exits(folder, whole)
            record = {**record, "exits": {"kind": exits, "after": list(whole.after)}}
        else:
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / RECORD, record)


def _narrowed(model: Any, name: str) -> Any:
    """Return a model of the same settings with random weights and narrow layers: the word table is most of the work."""
    with guarded(name, "cannot be narrowed", ""):
        config = deepcopy(model.config)
        wide, width = config.hidden_size, config.num_attention_heads * _WIDTH
        for key in ("hidden_size", *_AS_WIDE):
            if getattr(config, key, None) == wide > width:
                setattr(config, key, width)
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def _copy(start: Start, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """Return tokenizer and model; whole where the base has fewer layers than wanted or cannot be cut."""
    try:
        return load_base(start.base, labels, min(_LAYERS, start.layers or _LAYERS), start.tokenizer)
    except CascadeError:
        return load_base(start.base, labels, start.layers, start.tokenizer)
