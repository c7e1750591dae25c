"""Tokenize examples once, put them into batches, and compute a classifier's logits for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from cascade_rt.types import Text
from cascade_train.progress import Bar
from cascade_train.tasks import Examples

_BATCH = 64
EXTRAS = ("difficulty", "teacher", "teacher_states")
"""Values of each example that an objective takes besides its label."""

Row = dict[str, Any]
"""An example as a model takes it, unpadded: token ids, mask and types as lists, `label`, and an objective's values."""


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text], max_length: int) -> Any:
    """Return what a tokenizer makes of texts or pairs, each a list of ids, cut off after `max_length` tokens."""
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    return tokenizer(first, second, truncation=True, max_length=max_length)


def features(tokenizer: PreTrainedTokenizerFast, model: Any, examples: Examples, max_length: int) -> list[Row]:
    """Tokenize each example once; batches are padded by `collator`.

    A text without tokens (where a tokenizer adds no special ones) gets one of padding, as in the runtime.
    """
    encoded = tokenize(tokenizer, examples.texts, max_length)
    taken = inspect.signature(model.forward).parameters  # DistilBERT, for one, takes no token types
    empty = _padding(tokenizer) | {"attention_mask": 1}
    return [
        {name: values[row] or [empty[name]] for name, values in encoded.items() if name in taken}
        | {"label": target(label, model.config.num_labels)}
        for row, label in enumerate(examples.labels)
    ]


def target(label: Any, labels: int) -> Any:
    """Return what a loss compares with: several class ids as a list of 0 and 1, one for each label; others as it is."""
    return [float(index in label) for index in range(labels)] if isinstance(label, tuple) else label


def collator(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Row]], dict[str, Tensor]]:
    """Return what makes a batch of rows: it pads on the right, as the runtime does, to the longest row."""
    padding = _padding(tokenizer)

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        batch = {"labels": torch.tensor([row["label"] for row in rows])}
        for name in rows[0].keys() - {"label"}:
            values = [torch.as_tensor(row[name]) for row in rows]
            batch[name] = torch.stack(values) if name in EXTRAS else pad_sequence(values, True, padding.get(name, 0))
        return batch

    return collate


def _padding(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}


def answers(tokenizer: PreTrainedTokenizerFast, model: Any, rows: list[Row]) -> NDArray[np.float32]:
    """Return the logits of a model for the rows of `features`, float32 (rows, labels), in their order.

    The Trainer's `predict` is not used: with `group_by_length` it returns rows in the order of their lengths.
    """
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    for some, found in _outputs(tokenizer, model, rows):
        logits[some] = found.logits.float().cpu().numpy()
    return logits


def first_token_states(
    tokenizer: PreTrainedTokenizerFast, model: Any, rows: list[Row], layers: Sequence[int]
) -> NDArray[np.float16]:
    """Return the hidden states of the first token after some layers, counted from 1: float16 (rows, layers, hidden)."""
    states = np.empty((len(rows), len(layers), model.config.hidden_size), dtype=np.float16)
    for some, found in _outputs(tokenizer, model, rows, output_hidden_states=True):
        states[some] = torch.stack([found.hidden_states[layer][:, 0] for layer in layers], 1).half().cpu().numpy()
    return states


def _outputs(
    tokenizer: PreTrainedTokenizerFast, model: Any, rows: list[Row], **wanted: bool
) -> Iterator[tuple[list[int], Any]]:
    """Yield what a model computes, in batches of like length, each with the places of its rows."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    collate = collator(tokenizer)
    progress = Bar("answers", len(order), "texts", passing=True)
    try:
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            batch = {name: values.to(model.device) for name, values in collate([rows[row] for row in some]).items()}
            batch.pop("labels")
            with torch.inference_mode():
                yield some, model(**batch, **wanted)
            progress.update(len(some))
    finally:
        progress.close()


def text_logits(
    tokenizer: PreTrainedTokenizerFast, model: Any, texts: Sequence[Text], max_length: int
) -> NDArray[np.float32]:
    """Return the logits of a model for texts or pairs, float32 (texts, labels)."""
    return answers(tokenizer, model, features(tokenizer, model, Examples(texts, [0] * len(texts)), max_length))
