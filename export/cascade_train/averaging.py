"""Deep averaging networks (DAN; Iyyer et al., 2015): classifiers without layers, over word pieces and their n-grams.

Each word piece and each hashed n-gram has a vector. A text is the sum of its vectors over the square root of their
number, and two small linear layers classify it. A pair is its first text, its second one, how they differ, and what
they share. With one label per text, logits are multiplied by the share of the n-grams that training has seen: texts
unlike those of training are answered with less confidence, and by the same label.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from cascade_rt.errors import InputError, InvalidOption
from cascade_train.ranges import check_ranges
from cascade_train.settings import PROBLEM_TYPES

MODEL_TYPE = "averaging-network"
LONGEST_NGRAM = 3
_PAIR_VECTORS = 5
_LARGEST_TABLE = 2**29 - 2**20  # numbers of 4 bytes
_FACTORS = (1_000_003, 998_244_353)  # of the second and the third token of an n-gram


@dataclass(frozen=True)
class Network:
    """The size of a network. Its table has a row for each token and `buckets` for n-grams, `dimension` columns each."""

    ngrams: int = 2
    """The longest n-grams, in tokens: 1 to 3."""
    buckets: int = 131_072
    """Rows that n-grams are hashed to."""
    dimension: int = 128
    hidden: int = 256
    """Width of the hidden layer."""
    dropout: float = 0.3
    """Dropout of the hidden layer, in training."""
    token_dropout: float = 0.2
    """Share of the tokens and n-grams that a training step leaves out."""

    def __post_init__(self) -> None:
        """Raise InvalidOption for a value out of range."""
        sizes = {"buckets": (1, 2**22), "dimension": (1, 2**12), "hidden": (1, 2**13)}
        check_ranges(self, {"ngrams": (1, LONGEST_NGRAM), **sizes, "dropout": (0, 0.99), "token_dropout": (0, 0.99)})


class AveragingConfig(PretrainedConfig):  # type: ignore[misc]  # the library has no types
    """The settings of a deep averaging network, as `config.json` keeps them."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        *,
        vocab_size: int = 1,
        network: dict[str, Any] | None = None,
        pair: bool = False,
        max_position_embeddings: int = 512,
        **others: Any,
    ) -> None:
        """`network`: the fields of `Network`. `others`: settings that all models have, as labels and special tokens."""
        super().__init__(**others)
        size = Network(**(network or {}))
        self.vocab_size = vocab_size
        self.network = asdict(size)
        self.pair = pair
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 0
        self.hidden_size = size.dimension
        self.intermediate_size = size.hidden

    @property
    def size(self) -> Network:
        """The size of the network."""
        return Network(**self.network)

    @property
    def several(self) -> bool:
        """True if a text has any number of labels."""
        return bool(self.problem_type == PROBLEM_TYPES[True])


class AveragingForSequenceClassification(PreTrainedModel):  # type: ignore[misc]  # the library has no types
    """A deep averaging network with the interface of transformers' sequence classifiers."""

    config_class: ClassVar[type[AveragingConfig]] = AveragingConfig
    base_model_prefix = "averaging"

    def __init__(self, config: AveragingConfig) -> None:
        """Make a network whose tokens have random vectors, and whose n-grams have zeros."""
        super().__init__(config)
        size = config.size
        self.table = nn.EmbeddingBag(config.vocab_size + size.buckets, size.dimension, mode="sum", sparse=True)
        self.hidden = nn.Linear(size.dimension * (_PAIR_VECTORS if config.pair else 1), size.hidden)
        self.classifier = nn.Linear(size.hidden, config.num_labels)
        self.register_buffer("seen", torch.ones(self.table.num_embeddings, dtype=torch.bool))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        with torch.no_grad():
            if isinstance(module, nn.EmbeddingBag):
                tokens = self.config.vocab_size
                module.weight[:tokens].normal_(0, 1)
                module.weight[tokens:].zero_()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table."""
        return self.table

    def set_token_vectors(self, vectors: Tensor) -> None:
        """Start the tokens from given vectors, float (tokens, dimension)."""
        with torch.no_grad():
            self.table.weight[: len(vectors)] = vectors

    def see(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Note that training has the n-grams of these texts, int64 (batch, tokens), padded on the right."""
        rows, real = ngram_rows(input_ids, attention_mask, self.config)
        self.seen[rows[real]] = True

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return logits, (batch, labels), and the loss where labels are given.

        `input_ids` and `attention_mask`: int64 (batch, tokens), padded on the right. `labels`: class ids, (batch,), or
        with several labels per text which of them, float (batch, labels).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows, real = ngram_rows(input_ids, mask, self.config)
        sides = second_side(input_ids, self.config) if self.config.pair else None
        kept = real
        if self.training and self.config.size.token_dropout:
            kept = real & (torch.rand(real.shape, device=real.device) >= self.config.size.token_dropout)
        if sides is None:
            vectors = self._mean(rows, kept)
        else:
            second = sides & kept
            first = ~sides & kept
            shared = _shared(rows, first, second)
            ours, theirs, both = (self._mean(rows, part) for part in (first, second, shared))
            vectors = torch.cat([ours, theirs, (ours - theirs).abs(), ours * theirs, both], dim=-1)
        hidden = torch.relu(self.hidden(vectors))
        logits = self.classifier(functional.dropout(hidden, self.config.size.dropout, self.training))
        if not self.config.several:
            logits = logits * ((self.seen[rows] & real).sum(1) / real.sum(1))[:, None]
        return SequenceClassifierOutput(loss=None if labels is None else self._loss(logits, labels), logits=logits)

    def _mean(self, rows: Tensor, kept: Tensor) -> Tensor:
        """Return the sum of the kept rows of each text over the square root of their number, (batch, dimension)."""
        counts = kept.sum(dim=1)
        offsets = counts.cumsum(0) - counts
        return self.table(rows[kept], offsets) / counts.clamp_min(1).sqrt()[:, None]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.several:
            return functional.binary_cross_entropy_with_logits(logits, labels.float())
        return functional.cross_entropy(logits, labels)


def ngram_rows(ids: Tensor, mask: Tensor, config: AveragingConfig) -> tuple[Tensor, Tensor]:
    """Return the table's rows for the n-grams of each text, and which of them are no padding: (batch, n-grams).

    First the tokens, then the pairs of neighbours, then the triples; their rows are after those of the tokens, at
    (x + hash(y) + hash(z)) mod buckets.
    """
    size = config.size
    rows, real = [ids], [mask.bool()]
    mixed = ids
    for before in range(1, size.ngrams):
        mixed = mixed[:, :-1] + token_hashes(ids, before, size)[:, before:]
        rows.append(config.vocab_size + mixed % size.buckets)
        real.append(mask[:, before:].bool())
    return torch.cat(rows, 1), torch.cat(real, 1)


def token_hashes(ids: Tensor, before: int, size: Network) -> Tensor:
    """Return what tokens add to the hash of n-grams in which they have 1 or 2 tokens before them, below `buckets`.

    Sums of them stay exact in engines that compute int64 in 32 bits, or by float32, as OpenVINO does.
    """
    return ids * _FACTORS[before - 1] % size.buckets


def second_side(ids: Tensor, config: AveragingConfig) -> Tensor:
    """Return which n-grams begin in the second text of a pair, bool (batch, n-grams): after the first separator."""
    separators = (ids == config.sep_token_id).long()
    second = separators.cumsum(1) - separators > 0
    parts = [second[:, : max(0, second.shape[1] - shorter)] for shorter in range(config.size.ngrams)]
    return torch.cat(parts, 1)


def _shared(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return which n-grams occur in both texts, bool (batch, n-grams)."""
    same = rows[:, :, None] == rows[:, None, :]
    in_second = (same & second[:, None, :]).any(-1)
    in_first = (same & first[:, None, :]).any(-1)
    return (first & in_second) | (second & in_first)


def new_network(
    tokenizer: PreTrainedTokenizerFast, labels: tuple[str, ...], size: Network, *, pair: bool, several: bool = False
) -> AveragingForSequenceClassification:
    """Return a network for a tokenizer and labels; `several`: a text has any number of them.

    Raises InputError for pairs and a tokenizer that does not separate their texts, and InvalidOption for a table of
    more than 2 GB, the limit of an ONNX file.
    """
    if pair and (tokenizer.sep_token_id is None or tokenizer.sep_token_id not in tokenizer("a", "b").input_ids):
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer has no separator between the texts of a pair, expected a "
            "sep_token that it puts there; use the tokenizer of another encoder"
        )
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    if (most := max(0, _LARGEST_TABLE // size.dimension - vocabulary)) < size.buckets:
        expected = f"at most {most:,} with {size.dimension} columns and {vocabulary:,} tokens (2 GB), or fewer columns"
        raise InvalidOption("buckets", size.buckets, expected)
    longest = min(tokenizer.model_max_length, 2**16)
    return AveragingForSequenceClassification(
        AveragingConfig(
            vocab_size=vocabulary,
            network=asdict(size),
            pair=pair,
            max_position_embeddings=longest,
            pad_token_id=tokenizer.pad_token_id or 0,
            sep_token_id=tokenizer.sep_token_id,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type=PROBLEM_TYPES[several],
        )
    )


AutoConfig.register(MODEL_TYPE, AveragingConfig)
AutoModelForSequenceClassification.register(AveragingConfig, AveragingForSequenceClassification)
