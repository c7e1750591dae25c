"""Fine-tuned members as they come from training or from the hub: torch weights in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from cascade_train.alignment import align, check_alignment, check_token_types, usable_positions
from cascade_train.finetune import last_linear
from cascade_train.settings import Settings, guarded
from cascade_train.sources import (
    check_tokens,
    check_weights,
    classifier_settings,
    load_classifier,
    load_tokenizer,
    pretrained,
)
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedTokenizerFast

from cascade_export.checkpoint import Checkpoint, checked_length, member_name, task_of, training_record
from cascade_export.tokenizer_file import Padding, bundled, check_same_tokens
from cascade_rt.errors import InputError
from cascade_rt.types import Text

_SHOWN_TOKENS = 12


@dataclass(frozen=True)
class TorchCheckpoint(Checkpoint):
    """A checkpoint whose weights torch has loaded."""

    config: Any
    model: Any
    tokenizer: PreTrainedTokenizerFast
    original: TorchCheckpoint | None = None  # before it was aligned to another member's tokenizer
    alignment: Mapping[str, Any] | None = None  # what that changed, for the manifest

    def shift_logits(self, shift: NDArray[np.float64]) -> None:
        """Add `shift`, (labels,), to all logits, in the last layer; raise CascadeError if that is not linear."""
        for model in [self.model, *([self.original.model] if self.original else [])]:
            layer = last_linear(model)
            added = torch.as_tensor(shift, dtype=layer.weight.dtype)
            layer.bias = torch.nn.Parameter(added if layer.bias is None else layer.bias.detach() + added)


def open_torch(source: str, *, pair: bool | None = None, max_length: int | None = None) -> TorchCheckpoint:
    """Open a fine-tuned classifier, a Hugging Face folder or hf:NAME.

    `pair` and `max_length` override what training recorded; for a checkpoint without a record the defaults are
    single texts, and as many tokens as the model takes. Raises InputError, which names the source, where it cannot be
    opened or has settings that would change its answers (docs/reference/checkpoints.md).
    """
    settings = classifier_settings(source)
    settings.labels  # noqa: B018 - fails before the weights are loaded
    config = pretrained(AutoConfig, source)
    tokenizer = load_tokenizer(source)
    model = load_classifier(source, attn_implementation="eager")  # which the fusions of the export know
    with guarded(source, "cannot be used", "expected a fine-tuned encoder of a family in docs/guide/families.md"):
        return _checked(settings, config, tokenizer, model, pair, max_length)


def _checked(
    settings: Settings,
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    model: Any,
    pair: bool | None,
    max_length: int | None,
) -> TorchCheckpoint:
    source = settings.source
    training = training_record(source)
    is_pair = bool(training.get("pair", False)) if pair is None else pair
    check_weights(source, model)
    check_tokens(source, tokenizer, model)
    check_token_types(source, tokenizer, model, is_pair)
    length = checked_length(source, max_length, training, int(min(usable_positions(model), tokenizer.model_max_length)))
    padding = Padding(tokenizer.pad_token or "[PAD]", tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id)
    takes_types = "token_type_ids" in signature(model.forward).parameters
    typed = not takes_types or "token_type_ids" in tokenizer.model_input_names
    backend = bundled(tokenizer.backend_tokenizer, padding, length, tokenizer.truncation_side, typed=typed)
    check_same_tokens(source, backend, tokenizer, length, is_pair)
    return TorchCheckpoint(
        source=source,
        name=member_name(source),
        labels=settings.labels,
        task=task_of(settings, training),
        pair=is_pair,
        max_length=length,
        positions=usable_positions(model),
        layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        intermediate_size=getattr(config, "intermediate_size", None) or getattr(config, "hidden_dim", None),
        parameters=sum(weight.numel() for weight in model.parameters()),
        model_type=config.model_type,
        backend=backend,
        training=training,
        config=config,
        model=model.eval(),
        tokenizer=tokenizer,
    )


def align_checkpoint(checkpoint: TorchCheckpoint, first: TorchCheckpoint, texts: Sequence[Text]) -> TorchCheckpoint:
    """Return `checkpoint` with the tokenizer of `first`, compared with the original on `texts`.

    Raises InputError if the vocabularies do not have the same words or no text has the same tokens, and CascadeError if
    the two answer differently.
    """
    aligned = align(checkpoint.model, checkpoint.tokenizer, first.tokenizer)
    check = check_alignment(
        checkpoint.model, checkpoint.tokenizer, aligned, first.tokenizer, texts, checkpoint.max_length
    )
    if not check.same_tokens:
        found, expected = _tokens(checkpoint, first, texts)
        raise InputError(
            f"member {checkpoint.name!r} cannot be aligned to the tokenizer of {first.name!r}, which gives none of "
            f"{len(texts)} texts the same tokens as its own (found {found!r}, expected {expected!r}); fine-tune it "
            f"again with cascade-rt train --tokenizer {first.source}"
        )
    return replace(
        checkpoint,
        parameters=sum(weight.numel() for weight in aligned.model.parameters()),
        backend=first.backend,
        config=aligned.model.config,
        model=aligned.model,
        tokenizer=first.tokenizer,
        original=checkpoint,
        alignment={"tokenizer_of": first.name, "tokens": aligned.tokens, "moved": aligned.moved, **asdict(check)},
    )


def _tokens(checkpoint: TorchCheckpoint, first: TorchCheckpoint, texts: Sequence[Text]) -> tuple[str, str]:
    """Return the tokens of a short text under the tokenizer of `first`, and under the member's own."""
    shown = ("", "")
    shortest = min(texts, key=lambda text: len("".join(text)))
    for text in (("a", "b") if checkpoint.pair else "a", shortest):
        first_text, second_text = (text, None) if isinstance(text, str) else text
        tokens = [
            side.tokenizer.tokenize(first_text, second_text, add_special_tokens=True) for side in (first, checkpoint)
        ]
        shown = (" ".join(tokens[0][:_SHOWN_TOKENS]), " ".join(tokens[1][:_SHOWN_TOKENS]))
        if len(tokens[0]) != len(tokens[1]):
            break  # the templates differ, not the words
    return shown
