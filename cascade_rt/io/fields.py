"""The meaning of a field: the label that it spells, the order of labels, and what counts as no text.

The same rules hold for every format and every command.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal, DecimalException

from ..types import Text

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of control characters, of those that only format (zero-width ones), and of white space."""


def label(value: object) -> str:
    """Return the label that a value of a file spells, "" where it spells none; raise TypeError for several values.

    White space around it is not part of it. JSON has one type of number, so 1 and 1.0 are the same label there.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict):
        raise TypeError("an object")
    if isinstance(value, list | tuple | set):
        raise TypeError("a list")
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace").strip()
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == (whole := int(value)):
        return str(whole)
    return str(value).strip()


def labels(value: object, separator: str = ",") -> list[str]:
    """Return all labels that a value spells, each once: a list, a JSON list, or labels between separators.

    [] where it spells none.
    """
    value = _unpacked(value)
    found = value if isinstance(value, list | tuple | set) else label(value).split(separator)
    return list(dict.fromkeys(name for name in map(label, found) if name))


def is_list(value: object) -> bool:
    """Return whether a value is a list of labels, also one written as JSON."""
    return isinstance(_unpacked(value), list | tuple | set)


def _unpacked(value: object) -> object:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def number(label: str) -> Decimal | None:
    """Return the value of a label that is a number; None if it is none."""
    if not _NUMBER.fullmatch(label.strip()):
        return None
    try:
        return Decimal(label.strip())
    except DecimalException:  # an exponent of more digits than decimals have
        return None


def label_order(label: str) -> tuple[int, Decimal, str]:
    """Sort numbers first, by value, then the other labels; what is equal, by spelling."""
    value = number(label)
    return (1, Decimal(), label) if value is None else (0, value, label)


def same_label(label: str) -> str | Decimal:
    """Return what two spellings of one label share: the value of a number, else the text without space around it."""
    value = number(label)
    return label.strip() if value is None else value


def nearest_label(label: str, others: Iterable[str]) -> str | None:
    """Return the label among others that differs in case, spaces, hyphens or the kind of letters alone."""
    return next((other for other in others if _loosely(other) == _loosely(label)), None)


def is_blank(text: Text) -> bool:
    """Return whether a text, or one of a pair, has nothing to read: white space and invisible characters alone."""
    parts = (text,) if isinstance(text, str) else text
    return not all(any(unicodedata.category(sign) not in _INVISIBLE for sign in part) for part in parts)


def _loosely(label: str) -> str:
    letters = unicodedata.normalize("NFKC", label).casefold()
    return "".join(sign for sign in letters if sign not in "-_" and not sign.isspace())
