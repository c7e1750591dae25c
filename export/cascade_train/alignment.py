"""Give a model another tokenizer whose vocabulary has the same words under other ids, without changing its answers.

A cascade shares one tokenization. MPNet, for one, has BERT's words, each id 4 higher and with special tokens of its
own; its embedding table is re-indexed here, so that it takes BERT's ids.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

from cascade_rt.errors import CascadeError, InputError
from cascade_rt.types import Text
from cascade_train.inference import text_logits, tokenize

TOLERANCE = 1e-4
"""Largest allowed |difference of a logit| between a model under its own tokenizer and the aligned one."""

_EXAMPLES = 5
_UNLIMITED = 512  # tokens, for a model that names no number of positions
_ROLES = {
    "cls_token": "bos_token",
    "bos_token": "cls_token",
    "sep_token": "eos_token",
    "eos_token": "sep_token",
    "pad_token": "pad_token",
    "unk_token": "unk_token",
    "mask_token": "mask_token",
}
"""The purpose of a special token, and the role that stands in where a tokenizer does not name this one."""


@dataclass(frozen=True)
class Aligned:
    """A model that takes the ids of another tokenizer than its own."""

    model: Any
    own_ids: NDArray[np.int64]
    """The id that each token of the tokenizer had in the model's own, (ids,); -1 for an id without a token."""

    @property
    def tokens(self) -> int:
        """The tokens of the tokenizer."""
        return int(np.sum(self.own_ids >= 0))

    @property
    def moved(self) -> int:
        """Number of them that had another id."""
        return int(np.sum((self.own_ids >= 0) & (self.own_ids != np.arange(len(self.own_ids)))))


@dataclass(frozen=True)
class AlignmentCheck:
    """An aligned model compared with the original under its own tokenizer."""

    texts: int
    same_tokens: int
    """Texts that both tokenizers give the same tokens."""
    max_logit_difference: float | None
    """On those; None if there are none."""


def align(model: Any, own: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> Aligned:
    """Return a copy of `model`, whose tokenizer is `own`, that takes the ids of `target`.

    Row i of its embedding table is the model's row for the token that `target` calls i. Special tokens correspond by
    their role, all others by their spelling. Where positions are counted from the padding id, their table moves with
    it. The copy is built from its configuration, so it is what `save_pretrained` and `from_pretrained` give back.

    Raises InputError if the model lacks tokens of `target`, or takes one of them for padding.
    """
    table = model.get_input_embeddings()
    own_ids = _own_ids(own, target, table.num_embeddings)
    config = _configured(model, target, len(own_ids))
    weights = model.state_dict()
    weights[_name_of(model, table)] = _rows(table, own_ids)

    if (types := _table(model, "token_type_embeddings")) is not None and types.num_embeddings < _types(target):
        config.type_vocab_size = _types(target)  # a model that does not tell the texts of a pair apart still does not
        known = types.num_embeddings
        weights[_name_of(model, types)] = _rows(types, [*range(known), *[0] * (config.type_vocab_size - known)])
    positions = _table(model, "position_embeddings")
    if positions is not None and positions.padding_idx is not None:
        padding = _padding_id(model, config)
        if padding == positions.padding_idx != target.pad_token_id and _can_emit(target, padding):
            raise InputError(
                f"{own.name_or_path}: a {type(model).__name__} always takes the id {padding} for padding, but in "
                f"{target.name_or_path} it is the token {target.convert_ids_to_tokens(padding)!r}, which would get no "
                "position; use a tokenizer that has an unused token there, for all members"
            )
        config.max_position_embeddings += padding - positions.padding_idx
        usable = range(positions.padding_idx, positions.num_embeddings)
        weights[_name_of(model, positions)] = _rows(positions, [-1] * padding + list(usable))

    aligned = type(model)(config)
    aligned.load_state_dict(weights)
    return Aligned(aligned.train(model.training), own_ids)


def check_alignment(
    model: Any,
    own: PreTrainedTokenizerFast,
    aligned: Aligned,
    target: PreTrainedTokenizerFast,
    texts: Sequence[Text],
    max_length: int,
) -> AlignmentCheck:
    """Compare the logits of the aligned model and the original on the texts that both tokenizers give the same tokens.

    Raises CascadeError, which names the text, if a logit differs by more than TOLERANCE.
    """
    equal = _same_tokens(model, own, aligned, target, texts, max_length)
    if not equal:
        return AlignmentCheck(len(texts), 0, None)
    same = [texts[row] for row in equal]
    difference = np.abs(
        text_logits(own, model, same, max_length) - text_logits(target, aligned.model, same, max_length)
    ).max(axis=1)
    worst = int(difference.argmax())
    if not difference[worst] <= TOLERANCE:
        raise CascadeError(
            f"{own.name_or_path}: under the tokenizer of {target.name_or_path} its logits differ by "
            f"{difference[worst]:.2e} (allowed {TOLERANCE:.0e}) for check text {equal[worst]}; this model cannot be "
            "aligned, use members of one family"
        )
    return AlignmentCheck(len(texts), len(equal), float(difference[worst]))


def usable_positions(model: Any) -> int:
    """Return how many tokens the model has positions for; RoBERTa-like models start after the padding token's id."""
    table = _table(model, "position_embeddings")
    if table is None:
        named = getattr(model.config, "max_position_embeddings", None) or 0
        return int(named) if named > 0 else _UNLIMITED  # XLNet has -1
    reserved = 0 if table.padding_idx is None else table.padding_idx + 1
    return int(table.num_embeddings) - reserved


def check_token_types(source: str, tokenizer: PreTrainedTokenizerFast, model: Any, pair: bool) -> None:
    """Raise InputError if the tokenizer gives token types that the model has no embedding for."""
    table = _table(model, "token_type_embeddings")
    if table is None:
        return
    encoded = tokenizer("a", "b") if pair else tokenizer("a")
    types = max(encoded.get("token_type_ids") or [0]) + 1
    if types > table.num_embeddings:
        raise InputError(
            f"{source}: its tokenizer gives {'pairs' if pair else 'texts'} {types} token types, expected at most "
            f"{table.num_embeddings} (type_vocab_size); use the tokenizer that the model was trained with"
        )


def _own_ids(own: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast, rows: int) -> NDArray[np.int64]:
    """Return the model's id of each token of `target`, -1 for ids without one; InputError if it lacks some."""
    vocabulary = {token: index for token, index in own.get_vocab().items() if index < rows}
    spelling = _by_role(own, target)
    wanted = target.get_vocab()
    own_ids = np.full(max(wanted.values()) + 1, -1, dtype=np.int64)
    lacking = []
    for token, index in sorted(wanted.items(), key=lambda item: item[1]):
        if (found := vocabulary.get(spelling.get(token, token))) is None:
            lacking.append(token)
        else:
            own_ids[index] = found
    if lacking:
        examples = ", ".join(map(repr, lacking[:_EXAMPLES])) + (", ..." if len(lacking) > _EXAMPLES else "")
        raise InputError(
            f"{own.name_or_path}: lacks {len(lacking)} of the {len(wanted)} tokens of {target.name_or_path} "
            f"({examples}), expected the same words under any ids; use members of one family, or fine-tune the "
            f"others with cascade-rt train --tokenizer {own.name_or_path}"
        )
    return own_ids


def _by_role(own: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return how `own` spells the special tokens of `target`."""
    ours, theirs = own.special_tokens_map, target.special_tokens_map
    spelling = {}
    for role, substitute in _ROLES.items():
        if role in theirs and (token := ours.get(role) or ours.get(substitute)):
            spelling[str(theirs[role])] = str(token)
    return spelling


def _configured(model: Any, target: PreTrainedTokenizerFast, size: int) -> Any:
    """Return the model's configuration with the tokenizer's vocabulary size and special ids."""
    if target.pad_token_id is None:
        raise InputError(f"{target.name_or_path}: its tokenizer has no padding token; a cascade needs one")
    config = copy.deepcopy(model.config)
    config.vocab_size = size
    theirs = target.special_tokens_map
    for role, substitute in _ROLES.items():
        token = theirs.get(role) or theirs.get(substitute)
        if token and getattr(config, f"{role}_id", None) is not None:
            setattr(config, f"{role}_id", target.convert_tokens_to_ids(str(token)))
    return config


def _padding_id(model: Any, config: Any) -> int:
    """Return the id that a model of this configuration gives no position; MPNet's does not depend on it."""
    config = copy.deepcopy(config)
    config.max_position_embeddings += config.vocab_size  # any padding id has a row
    with torch.device("meta"):
        probe = type(model)(config)
    table = _table(probe, "position_embeddings")
    if table is None or table.padding_idx is None:
        raise TypeError(f"{type(model).__name__}: has position embeddings only in some configurations")
    return int(table.padding_idx)


def _can_emit(tokenizer: PreTrainedTokenizerFast, index: int) -> bool:
    """Return whether a text can give this id; none can give BERT's [unused0], whose brackets are cut off."""
    token = tokenizer.convert_ids_to_tokens(index)
    if token is None:
        return False
    backend = tokenizer.backend_tokenizer
    special = {*tokenizer.all_special_tokens, getattr(backend.model, "unk_token", None)}
    if token in special or index in tokenizer.added_tokens_decoder:
        return True
    if not isinstance(backend.pre_tokenizer, BertPreTokenizer):
        return True
    word = token.removeprefix(getattr(backend.model, "continuing_subword_prefix", ""))
    return len(backend.pre_tokenizer.pre_tokenize_str(word)) <= 1


def _types(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many token types a pair gets."""
    return int(max(tokenizer.backend_tokenizer.encode("a", "b").type_ids, default=0)) + 1


def _table(model: Any, name: str) -> torch.nn.Embedding | None:
    for path, module in model.named_modules():
        if path.endswith(name) and isinstance(module, torch.nn.Embedding):
            return module
    return None


def _name_of(model: Any, table: torch.nn.Embedding) -> str:
    return f"{next(path for path, module in model.named_modules() if module is table)}.weight"


def _rows(table: torch.nn.Embedding, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
    """Return these rows of a table, zeros for -1."""
    chosen = torch.as_tensor(indices)
    with torch.no_grad():
        return table.weight[chosen.clamp(min=0)] * (chosen >= 0).unsqueeze(1)


def _same_tokens(
    model: Any,
    own: PreTrainedTokenizerFast,
    aligned: Aligned,
    target: PreTrainedTokenizerFast,
    texts: Sequence[Text],
    max_length: int,
) -> list[int]:
    """Return the rows of the texts that give the same tokens, and the same token types if the model has several."""
    ours, theirs = tokenize(own, texts, max_length), tokenize(target, texts, max_length)
    types = _table(model, "token_type_embeddings")
    typed = types is not None and types.num_embeddings > 1
    return [
        row
        for row, (first, second) in enumerate(zip(ours["input_ids"], theirs["input_ids"], strict=True))
        if first == aligned.own_ids[second].tolist() and (not typed or _types_of(ours, row) == _types_of(theirs, row))
    ]


def _types_of(encoded: Any, row: int) -> list[int]:
    """Return the token types that a model gets for a row: zeros where the tokenizer gives none."""
    types = encoded.get("token_type_ids")
    return [0] * len(encoded["input_ids"][row]) if types is None else list(types[row])
