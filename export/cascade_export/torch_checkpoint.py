"""Fine-tuned members as they come from training or from the hub: torch weights in a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cascade_train.alignment import align, check_alignment, usable_positions
from cascade_train.sources import pretrained
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from cascade_export.checkpoint import Checkpoint, checked_labels, checked_length, member_name, training_record
from cascade_rt.errors import InputError, first_line
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


def open_torch(source: str, *, pair: bool | None = None, max_length: int | None = None) -> TorchCheckpoint:
    """Open a fine-tuned classifier, a Hugging Face folder or hf:NAME.

    `pair` and `max_length` override what training recorded; for a checkpoint without a record the defaults are
    single texts, and as many tokens as the model takes. Raises InputError where it cannot be opened.
    """
    try:
        config = pretrained(AutoConfig, source)
        tokenizer = pretrained(AutoTokenizer, source)
        model, loading = pretrained(
            AutoModelForSequenceClassification, source, dtype="float32", output_loading_info=True
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
    length = checked_length(source, max_length, training, int(min(usable_positions(model), tokenizer.model_max_length)))
    return TorchCheckpoint(
        source=source,
        name=member_name(source),
        labels=labels,
        pair=bool(training.get("pair", False)) if pair is None else pair,
        max_length=length,
        positions=usable_positions(model),
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
            f"again with cascade-rt train and `tokenizer` {first.source}"
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
