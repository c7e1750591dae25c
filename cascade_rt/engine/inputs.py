"""What counts as texts: any iterable for `predict`, and for `__call__` what a transformers pipeline takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from ..types import Text


def iterated(texts: Iterable[Text]) -> Iterator[Text]:
    """Iterate over texts; raise InputError for one text, a mapping, a set or a table."""
    if isinstance(texts, str | bytes | Mapping):
        raise InputError(f"found one {type(texts).__name__}, expected a list of texts; wrap it: [text]")
    is_scalar = not isinstance(texts, Iterable) or (isinstance(texts, np.ndarray) and texts.ndim == 0)
    if is_scalar or isinstance(texts, set | frozenset) or type(texts).__name__ == "DataFrame":
        raise InputError(f"found a {type(texts).__name__}, expected a list of texts, or one column of a table")
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
        f"found a {type(inputs).__name__}, expected a text, a pair, a dict, a list of them, a pandas Series or a "
        "one-dimensional numpy array of str; for other iterables use predict_iter"
    )


def unwrapped(item: Any) -> Any:
    """Return the text or pair of a pipeline's dict; anything else unchanged."""
    if not isinstance(item, dict):
        return item
    if not {"text"} <= item.keys() <= {"text", "text_pair"}:
        raise InputError(f"found a dict with the keys {', '.join(map(repr, item))}, expected 'text' and 'text_pair'")
    return (item["text"], item["text_pair"]) if "text_pair" in item else item["text"]
