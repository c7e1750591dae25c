"""Members with random weights in any shape, to measure hardware before anything is trained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from cascade_train.compat import quiet
from cascade_train.sources import load_tokenizer
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
)

from cascade_rt.errors import InvalidOption

VOCABULARY_SIZE = 30_522  # as BERT's


def write_random_members(
    shapes: Sequence[tuple[int, int]], folder: Path, *, tokenizer: str | None = None, labels: int = 2, seed: int = 0
) -> list[str]:
    """Write a random BERT classifier per shape (layers, hidden size) into `folder`; return the paths.

    Each has BERT's proportions: 64 units per attention head (12 heads of 32 for MiniLM's 384), an inner size of four
    times the hidden one, 512 positions. `tokenizer` names a Hugging Face folder or hf:NAME to take the vocabulary
    from; by default it is made up, so that texts in a real language are cut into more tokens than BERT's would.
    """
    words = load_tokenizer(tokenizer) if tokenizer else _made_up_tokenizer(seed)
    paths = []
    for layers, hidden in shapes:
        torch.manual_seed(seed + layers)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=_heads(hidden),
            intermediate_size=4 * hidden,
            num_labels=labels,
        )
        model = BertForSequenceClassification(config).eval()
        _spread_confidences(model)
        path = folder / f"{layers}L-{hidden}"
        with quiet():
            model.save_pretrained(path)
        words.save_pretrained(path)
        paths.append(str(path))
    return paths


def _spread_confidences(model: BertForSequenceClassification) -> None:
    """Change the classifier so that thresholds can split the texts: logits differ, and do not depend on the length.

    Longer texts still vary less, so more of them continue; the speed-up by FLOPs shows how much longer they are.
    """
    with torch.no_grad():
        drawn = [torch.randint(model.config.vocab_size // 30, model.config.vocab_size, (8, 6 * n)) for n in range(1, 9)]
        pooled = torch.cat([model.bert(ids).pooler_output for ids in drawn])
        lengths = torch.cat([torch.full((len(ids),), float(ids.shape[1])) for ids in drawn])
        longer = (pooled - pooled.mean(dim=0)).T @ (lengths - lengths.mean())  # where the length of a text shows
        weight = model.classifier.weight
        weight -= torch.outer(weight @ longer, longer) / (longer @ longer)
        logits = pooled @ weight.T
        scale = 2 / logits.std(dim=0).mean()
        weight *= scale
        model.classifier.bias.copy_(-scale * logits.mean(dim=0))


def parse_shape(written: str) -> tuple[int, int]:
    """Read "LAYERSxHIDDEN", for instance "2x768"; raise InputError for anything else."""
    layers, _, hidden = written.partition("x")
    if not (layers.isdecimal() and hidden.isdecimal() and 1 <= int(layers) <= 96 and _heads(int(hidden))):
        raise InvalidOption("random", written, "LAYERSxHIDDEN, for instance 2x768, with HIDDEN a multiple of 32")
    return int(layers), int(hidden)


def _heads(hidden: int) -> int:
    """Return the attention heads of usual models of this hidden size; 0 for an unusual size."""
    return 12 if hidden == 384 else hidden // 64 if hidden % 64 == 0 else hidden // 32 if hidden % 32 == 0 else 0


def _made_up_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    pieces = dict.fromkeys(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    )
    while len(pieces) < VOCABULARY_SIZE:
        syllables = draw.randint(1, 4)
        pieces["".join(draw.choice("bcdfghklmnprstvw") + draw.choice("aeiou") for _ in range(syllables))] = None
    backend = BertWordPieceTokenizer({piece: index for index, piece in enumerate(pieces)})
    return BertTokenizerFast(tokenizer_object=backend._tokenizer, model_max_length=512)
