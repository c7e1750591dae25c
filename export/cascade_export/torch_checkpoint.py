"""Fine-tuned members as they come from training or from the hub: torch weights in a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from cascade_export.checkpoint import Checkpoint, checked_labels, checked_length, member_name, training_record
from cascade_rt.errors import InputError, first_line


@dataclass(frozen=True)
class TorchCheckpoint(Checkpoint):
    """A checkpoint whose weights torch has loaded."""

    config: Any
    model: Any
    tokenizer: PreTrainedTokenizerFast


def open_torch(source: str, *, pair: bool | None = None, max_length: int | None = None) -> TorchCheckpoint:
    """Open a fine-tuned classifier, a Hugging Face folder or hub id.

    `pair` and `max_length` override what training recorded; for a checkpoint without a record the defaults are
    single texts, and as many tokens as the model takes. Raises InputError where it cannot be opened.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source, dtype="float32", output_loading_info=True
        )
        training = training_record(source)
    except Exception as error:  # a folder can be broken in many ways, and each library has its own errors
        raise InputError(
            f"cannot open the member {source!r} ({first_line(error)}); expected a Hugging Face folder of a "
            "fine-tuned classifier"
        ) from error
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise InputError(f"{source}: not a fine-tuned classifier (has no weights for {missing}); fine-tune it first")
    labels = checked_labels(source, {index: config.id2label[index] for index in range(config.num_labels)})
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{source}: has no fast tokenizer (tokenizer.json); cascade-rt needs one")
    length = checked_length(source, max_length, training, int(min(_positions(model), tokenizer.model_max_length)))
    return TorchCheckpoint(
        source=source,
        name=member_name(source),
        labels=labels,
        pair=bool(training.get("pair", False)) if pair is None else pair,
        max_length=length,
        layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        intermediate_size=getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None),
        parameters=sum(weight.numel() for weight in model.parameters()),
        model_type=config.model_type,
        backend=_backend(tokenizer, length),
        training=training,
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
    )


def _positions(model: Any) -> int:
    """Return how many tokens the model has positions for; RoBERTa-like models start after the padding token's id."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings) - reserved
    return int(model.config.max_position_embeddings)


def _backend(tokenizer: PreTrainedTokenizerFast, max_length: int) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(
        direction="right",  # always: on the left, the first token of a text would get another position than when alone
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
    )
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)
    return backend
