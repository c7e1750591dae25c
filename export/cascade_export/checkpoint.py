"""Fine-tuned members as they come from training or from the hub, and whether they fit into one cascade."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_train.finetune import RECORD
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from cascade_rt.errors import CascadeError, InputError

_SHORTEST = 3  # a token between [CLS] and [SEP]


@dataclass(frozen=True)
class Checkpoint:
    """One fine-tuned classifier: a Hugging Face folder or hub id, opened."""

    source: str
    name: str
    config: Any
    model: Any
    tokenizer: PreTrainedTokenizerFast
    labels: tuple[str, ...]
    pair: bool
    max_length: int
    training: dict[str, Any]

    @property
    def layers(self) -> int:
        """Encoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def parameters(self) -> int:
        """All weights, embeddings and classifier included."""
        return sum(weight.numel() for weight in self.model.parameters())

    def write_tokenizer(self, path: Path, max_length: int) -> None:
        """Write `tokenizer.json` with the model's padding and truncation, which the runtime then follows."""
        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.enable_padding(
            direction=self.tokenizer.padding_side,
            pad_id=self.tokenizer.pad_token_id,
            pad_type_id=self.tokenizer.pad_token_type_id,
            pad_token=self.tokenizer.pad_token,
        )
        tokenizer.enable_truncation(max_length, direction=self.tokenizer.truncation_side)
        tokenizer.save(str(path))


def open_checkpoint(source: str, *, pair: bool | None = None, max_length: int | None = None) -> Checkpoint:
    """Open a fine-tuned classifier.

    `pair` and `max_length` override what training recorded; for a checkpoint without a record the defaults are
    single texts, and as many tokens as the model takes. Raises InputError where it cannot be opened.
    """
    record = Path(source) / RECORD
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, dtype="float32", output_loading_info=True
        )
        training = dict(json.loads(record.read_text("utf-8"))) if record.is_file() else {}
    except Exception as error:  # a folder can be broken in any way, and each library has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot open the member {source!r} ({reason}); expected the Hugging Face folder of a fine-tuned classifier"
        ) from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{source}: holds no trained classifier (has no weights for {missing}); fine-tune it first")
    if config.num_labels < 2 or len(set(config.id2label.values())) < config.num_labels:
        found = _shown(list(config.id2label.values()))
        raise InputError(f"{source}: found the labels {found}; expected at least two, with different names")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{source}: has no fast tokenizer (tokenizer.json); cascade-rt needs one")
    longest = int(min(config.max_position_embeddings, tokenizer.model_max_length))
    length = training.get("max_length", longest) if max_length is None else max_length
    if not _SHORTEST <= length <= longest:
        raise InputError(
            f"{source}: found a maximum length of {length}, expected {_SHORTEST} to {longest} tokens for this model"
        )
    return Checkpoint(
        source=source,
        name=re.sub(r"[^\w.-]", "-", Path(source).resolve().name if Path(source).is_dir() else source),
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
        labels=tuple(config.id2label[index] for index in range(config.num_labels)),
        pair=bool(training.get("pair", False)) if pair is None else pair,
        max_length=length,
        training=training,
    )


def check_fit(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise CascadeError unless all members share labels, pair-ness, length and tokenizer; say what differs."""
    sources: dict[str, str] = {}
    for checkpoint in checkpoints:
        if checkpoint.name in sources:
            found = f"{sources[checkpoint.name]}, {checkpoint.source}"
            raise CascadeError(f"two members are called {checkpoint.name!r} ({found}); rename one folder")
        sources[checkpoint.name] = checkpoint.source
    first = checkpoints[0]
    for other in checkpoints[1:]:
        where = f"members {first.name!r} and {other.name!r} do not fit together:"
        if first.labels != other.labels:
            raise CascadeError(f"{where} labels {_shown(first.labels)} against {_shown(other.labels)}")
        if first.pair != other.pair:
            kinds = {True: "pairs", False: "single texts"}
            raise CascadeError(f"{where} {kinds[first.pair]} against {kinds[other.pair]}")
        if first.max_length != other.max_length:
            raise CascadeError(
                f"{where} maximum length {first.max_length} against {other.max_length} tokens; say --max-length"
            )
        ours, theirs = _tokenizer_parts(first), _tokenizer_parts(other)
        differing = [part for part in ours if ours[part] != theirs[part]]
        if differing:
            raise CascadeError(f"{where} their tokenizers differ in {', '.join(differing)}; use members of one family")


def _tokenizer_parts(checkpoint: Checkpoint) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(checkpoint.tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):  # state left by the last call, not part of the tokenizer
        parts.pop(setting)
    return parts | {
        "pad token": (checkpoint.tokenizer.pad_token_id, checkpoint.tokenizer.pad_token_type_id),
        "sides": (checkpoint.tokenizer.padding_side, checkpoint.tokenizer.truncation_side),
    }


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (f", ... ({len(labels)})" if len(labels) > 6 else "")
