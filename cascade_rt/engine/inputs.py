"""Inputs that count as texts: any iterable for `predict`, and for `__call__` what a transformers pipeline takes.

And which types a runtime's arguments may have: others would fail late, or pass for something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, InvalidOption
from ..types import Text


def iterated(texts: Iterable[Text]) -> Iterator[Text]:
    """Iterate over texts; raise InputError for one text, a mapping, a set or a table."""
    if isinstance(texts, list):  # the usual case, without the slower questions below
        return iter(texts)
    if isinstance(texts, str | bytes | Mapping):
        raise InputError(f"found one {type(texts).__name__}, expected a list of texts; wrap it: [text]")
    is_scalar = not isinstance(texts, Iterable) or (isinstance(texts, np.ndarray) and texts.ndim == 0)
    if is_scalar or isinstance(texts, set | frozenset) or type(texts).__name__ == "DataFrame":
        raise InputError(f"found {type(texts).__name__}, expected a list of texts, or one column of a table")
    return iter(texts)


def listed(inputs: Any) -> list[Any] | None:
    """Return the texts of a list, pandas Series or numpy array; None for one text; raise InputError for the rest."""
    if isinstance(inputs, list):
        return inputs
    is_vector = isinstance(inputs, np.ndarray) and inputs.ndim == 1 and inputs.dtype.kind in "UOT"
    if is_vector or type(inputs).__name__ == "Series":
        return list(inputs.tolist() if is_vector else inputs.to_list())
    if isinstance(inputs, str | dict | tuple):
        return None
    raise InputError(
        f"found {type(inputs).__name__}, expected a text, a pair, a dict, a list of them, a pandas Series or a "
        "one-dimensional numpy array of str; for other iterables use predict_iter"
    )


def unwrapped(item: Any) -> Any:
    """Return the text or pair of a pipeline's dict; anything else unchanged."""
    if not isinstance(item, dict):
        return item
    if not {"text"} <= item.keys() <= {"text", "text_pair"}:
        raise InputError(f"found a dict with the keys {', '.join(map(repr, item))}, expected 'text' and 'text_pair'")
    return (item["text"], item["text_pair"]) if "text_pair" in item else item["text"]


def check_types(**arguments: object) -> None:
    """Raise InvalidOption for an argument of `CascadeRuntime` that has another type than it should."""
    for field, value in arguments.items():
        fits, expected = _TYPES[field]
        if not fits(value):
            raise InvalidOption(field, value, expected)


def _names(value: object) -> bool:
    return isinstance(value, Sequence | Mapping) and all(isinstance(name, str) for name in value)


_FLAG = (lambda value: isinstance(value, bool), "True or False")
_TYPES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "model_dir": (
        lambda value: isinstance(value, str | os.PathLike) and bool(str(value)),
        "a path, or hf:org/name on the Hugging Face hub",
    ),
    "members": (lambda value: value is None or _names(value), "names of members, or None"),
    "preload": _FLAG,
    "provider_options": (
        lambda value: value is None or (isinstance(value, Mapping) and _names(value)),
        'names and values, for instance {"device_id": "1"}, or None',
    ),
    "cache": (
        lambda value: value is None or (isinstance(value, str | os.PathLike) and bool(str(value))),
        'a folder, or "off"',
    ),
    "low_memory": _FLAG,
    "word_cache": _FLAG,
    "packed": _FLAG,
    "verify": _FLAG,
    "expected_sha256": (lambda value: value is None or isinstance(value, str), "64 hexadecimal digits, or None"),
    "trace": (lambda value: value is None or callable(value), "a function, or None"),
}
