"""The toy models of `tests/toy.py` as transformers' own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from ..toy import LABELS, Weights, vocabulary


def bert(weights: Weights) -> BertForSequenceClassification:
    """Return a classifier of transformers with these weights, all its layers in one piece."""
    inner, hidden = weights["bert.encoder.layer.0.intermediate.dense.weight"].shape
    config = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=hidden,
        num_hidden_layers=sum(name.endswith("intermediate.dense.bias") for name in weights),
        num_attention_heads=4,
        intermediate_size=inner,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config).eval()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return model


def tokenizer(folder: Path, max_length: int = 32) -> BertTokenizerFast:
    """Return transformers' tokenizer with the toy's vocabulary; `folder` is for its file."""
    file = folder / "vocab.txt"
    file.write_text("\n".join(vocabulary()), "utf-8")
    return BertTokenizerFast(str(file), model_max_length=max_length)
