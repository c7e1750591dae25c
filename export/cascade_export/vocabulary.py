"""A smaller vocabulary: the tokens that texts of a domain use, and what is needed so that every text still gets tokens.

A text all of whose tokens are kept is cut as before. WordPiece takes the longest token that fits, and no other fits
better than before; BPE applies the same merges, since each kept token keeps those that make it; Unigram finds the same
best path, since paths were only removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tokenizers import Tokenizer

from cascade_rt.errors import InputError
from cascade_rt.types import Text

_HELD_OUT = 10  # each tenth text
_FEWEST = 20  # texts
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # tokens that unknown characters fall back to
_KINDS = ("WordPiece", "BPE", "Unigram")
_IDS, _OWN_IDS = "input_ids", "own_input_ids"


@dataclass(frozen=True)
class Vocabulary:
    """Kept tokens under new ids."""

    backend: Tokenizer
    """The tokenizer that knows them alone."""
    own_ids: NDArray[np.int64]
    """The id that each had before, ascending, (tokens,)."""
    facts: Mapping[str, Any]
    """The number of tokens and texts, for the manifest."""


def trimmed(backend: Tokenizer, texts: Sequence[Text], most: float = 0.005) -> Vocabulary:
    """Return the vocabulary that `texts` need.

    Each tenth text is held out: where more than `most` of them have tokens that the others do not, the most common
    tokens of the tokenizer's own order are kept too, until they have not. Raises InputError for too few texts, and for
    a tokenizer that cannot be trimmed.
    """
    described = json.loads(backend.to_str())
    if described["model"]["type"] not in _KINDS:
        raise InputError(
            f"found tokenizer {described['model']['type']}, expected one of {', '.join(_KINDS)}; keep its vocabulary"
        )
    if len(texts) < _FEWEST:
        raise InputError(f"found {len(texts)} texts to trim the vocabulary by, expected at least {_FEWEST}")
    used = _used(backend, texts)
    always = _always(backend, described)
    held_out = [ids - always for ids in used[::_HELD_OUT]]
    known = set().union(*(ids for number, ids in enumerate(used) if number % _HELD_OUT))
    common = _by_frequency(described["model"])
    places = {token: place for place, token in enumerate(common, 1)}
    # A held-out text is cut as before once its least common unknown token is kept.
    ranks = sorted(max((places[token] for token in ids - known if token in places), default=0) for ids in held_out)
    allowed = int(most * len(ranks))
    kept_common = ranks[-1 - allowed] if allowed < len(ranks) else 0
    kept = always.union(*used, common[:kept_common])
    if described["model"]["type"] == "BPE":
        kept = _with_parts(described["model"], kept)
    own_ids = np.array(sorted(kept), dtype=np.int64)
    facts = {
        "tokens": len(own_ids),
        "of": backend.get_vocab_size(),
        "texts": len(texts),
        "held_out": len(ranks),
        "cut_differently": sum(rank > kept_common for rank in ranks),
    }
    renumbered = _renumbered(described, own_ids)
    if [renumbered.id_to_token(new) for new in range(len(own_ids))] != [backend.id_to_token(own) for own in own_ids]:
        raise InputError("found a tokenizer whose added tokens have ids of their own; keep its vocabulary")
    return Vocabulary(renumbered, own_ids, facts)


def trim_graph(file: Path, own_ids: NDArray[np.int64], max_length: int) -> int:
    """Make an encoder's ONNX file take the new ids; return the number of weights that it no longer has.

    The table of the words keeps their rows. Whatever else reads ids, as positions that are counted from the padding,
    gets those of before. Positions from `max_length` on go too, where they are counted from the first token.
    """
    model = onnx.load(file)
    tables = {weight.name: weight for weight in model.graph.initializer if len(weight.dims) == 2}
    words = [
        node
        for node in model.graph.node
        if node.op_type == "Gather" and node.input[1] == _IDS and node.input[0] in tables
    ]
    removed = 0
    positions = dict.fromkeys(_positions(model, tables, max_length), slice(max_length))
    kept: dict[str, Any] = dict.fromkeys((node.input[0] for node in words), own_ids)
    for name, rows in {**positions, **kept}.items():
        table = numpy_helper.to_array(tables[name])
        removed += table.size - table[rows].size
        tables[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(table[rows]), name))
    others = [node for node in model.graph.node if _IDS in node.input and node not in words and node.op_type != "Shape"]
    for node in others:
        node.input[:] = [_OWN_IDS if name == _IDS else name for name in node.input]
    if others:
        model.graph.initializer.append(numpy_helper.from_array(own_ids, "own_ids"))
        model.graph.node.insert(0, helper.make_node("Gather", ["own_ids", _IDS], [_OWN_IDS], name=_OWN_IDS))
    onnx.save(model, file)
    return removed


def _positions(model: onnx.ModelProto, tables: Mapping[str, Any], max_length: int) -> list[str]:
    """Return the tables that are read at 0, 1, 2 and so on, up to the tokens: Gather of a Slice of a range."""
    constants = {node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"}
    constants |= {weight.name: weight for weight in model.graph.initializer}
    ranges = set()
    for node in model.graph.node:
        if node.op_type == "Slice" and constants.keys() >= set(node.input[:2]):
            values, start = (numpy_helper.to_array(constants[name]) for name in node.input[:2])
            if values.dtype == np.int64 and np.array_equal(values.ravel(), np.arange(values.size)) and not start.any():
                ranges.add(node.output[0])
    return [
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Gather"
        and node.input[0] in tables
        and node.input[1] in ranges
        and tables[node.input[0]].dims[0] > max_length
    ]


def _used(backend: Tokenizer, texts: Sequence[Text]) -> list[set[int]]:
    """Return the ids of each text's tokens, also of those that would be cut off."""
    whole = Tokenizer.from_str(backend.to_str())
    whole.no_truncation()
    whole.no_padding()
    return [set(encoding.ids) for encoding in whole.encode_batch(list(texts))]


def _always(backend: Tokenizer, described: Mapping[str, Any]) -> set[int]:
    """Return the ids of special tokens, of the one for unknown words, of single characters and of bytes."""
    model, vocabulary = described["model"], backend.get_vocab()
    marks = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    kept = {token["id"] for token in described["added_tokens"]}
    unknown = model.get("unk_token")
    if unknown in vocabulary:
        kept.add(vocabulary[unknown])
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        kept.add(model["unk_id"])
    for token, number in vocabulary.items():
        bare = token.removeprefix(marks[0] or "").removesuffix(marks[1] or "")
        if len(bare) <= 1 or _BYTE.fullmatch(token):
            kept.add(number)
    return kept


def _by_frequency(model: Mapping[str, Any]) -> list[int]:
    """Return all ids, the most common tokens first: WordPiece and BPE number them so, Unigram gives them scores."""
    if model["type"] == "Unigram":
        return sorted(range(len(model["vocab"])), key=lambda number: -model["vocab"][number][1])
    return sorted(model["vocab"].values())


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _with_parts(model: Mapping[str, Any], kept: set[int]) -> set[int]:
    """Return the ids with those of all tokens that they are merged from."""
    vocabulary = model["vocab"]
    parts: dict[int, list[int]] = {}
    for left, right in _merges(model):
        parts.setdefault(vocabulary[_merged(model, left, right)], []).extend([vocabulary[left], vocabulary[right]])
    found, waiting = set(kept), list(kept)
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            if part not in found:
                found.add(part)
                waiting.append(part)
    return found


def _renumbered(described: dict[str, Any], own_ids: NDArray[np.int64]) -> Tokenizer:
    """Return the tokenizer with the kept tokens alone, under their places in `own_ids`."""
    new = {own: number for number, own in enumerate(own_ids.tolist())}
    model = described["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][own] for own in new if own < len(model["vocab"])]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[own] for token, own in model["vocab"].items() if own in new}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [
            list(merge) for merge in _merges(model) if all(part in known for part in (*merge, _merged(model, *merge)))
        ]
    for token in described["added_tokens"]:
        token["id"] = new[token["id"]]
    if described["padding"]:
        described["padding"]["pad_id"] = new[described["padding"]["pad_id"]]
    _renumber_templates(described["post_processor"], new)
    return Tokenizer.from_str(json.dumps(described))


def _renumber_templates(processor: dict[str, Any] | None, new: Mapping[int, int]) -> None:
    """Change the ids in what adds special tokens, in place."""
    if processor is None:
        return
    for one in processor.get("processors", ()):
        _renumber_templates(one, new)
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = new[processor[name][1]]
    templates: Iterable[dict[str, Any]] = (processor.get("special_tokens") or {}).values()
    for token in templates:
        token["ids"] = [new[own] for own in token["ids"]]
