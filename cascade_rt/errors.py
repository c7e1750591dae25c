"""The errors of cascade-rt.

    CascadeError                everything that cascade-rt raises on purpose
    ├── BundleError             a bundle is missing, damaged, of a newer format, or does not fit together
    ├── InputError              what was passed cannot be used
    │   ├── InvalidOption       one parameter: `field`, `found`, `expected`
    │   └── TextError           one text among many: `index`, `reason`
    ├── InferenceError          a model failed while it ran, or memory ran out
    └── MissingExtraError       an optional dependency is not installed

A message says what was found, what was expected and what to do. It names parameters in backticks, as the library
spells them; the command line replaces them by its options (`CascadeError.spelled`). Errors of other libraries are kept
as `__cause__`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class CascadeError(Exception):
    """Base of every error that cascade-rt raises on purpose."""

    def spelled(self, names: Mapping[str, str]) -> str:
        """Return the message with every parameter in backticks replaced by its name in `names`, else by itself."""
        return re.sub(r"`(\w+)`", lambda field: names.get(field[1], field[1]), str(self))


class BundleError(CascadeError):
    """A bundle is missing, damaged, of a newer format, or does not fit together."""


class InputError(CascadeError):
    """Texts, files, columns, labels or parameters that cannot be used."""


class InvalidOption(InputError):
    """A parameter has a value that cannot be used.

    `field`: the parameter's name; `found`: its value; `expected`: what it may be, in words.
    """

    def __init__(self, field: str, found: object, expected: str) -> None:
        super().__init__(f"`{field}`: found {_shown(found)}, expected {expected}")
        self.field = field
        self.found = found
        self.expected = expected

    def __reduce__(self) -> tuple[type[InvalidOption], tuple[str, object, str]]:
        """Pickle by the arguments of the constructor, not by the message."""
        return type(self), (self.field, self.found, self.expected)


class TextError(InputError):
    """One text among many cannot be used. `index`: its 0-based position; `reason`: what is wrong with it."""

    def __init__(self, index: int, reason: str, where: str | None = None) -> None:
        """Name the text by `index`, or by `where` when its file and line are known."""
        super().__init__(f"{where or f'text {index}'}: {reason}")
        self.index = index
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[type[TextError], tuple[int, str, str | None]]:
        """Pickle by the arguments of the constructor, not by the message."""
        return type(self), (self.index, self.reason, self.where)


class InferenceError(CascadeError):
    """A model failed while it ran, answered NaN or infinity, or ran out of memory."""


class MissingExtraError(CascadeError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str, cause: ImportError) -> None:
        """Name what was asked for, the extra that provides it, and the import that failed."""
        super().__init__(
            f"{what} needs packages that are not installed ({cause}); "
            f"install them with: pip install 'cascade-rt[{extra}]'"
        )
        self.what = what
        self.extra = extra
        self.cause = cause

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, ImportError]]:
        """Pickle by the arguments of the constructor, not by the message."""
        return type(self), (self.what, self.extra, self.cause)


def first_line(error: BaseException) -> str:
    """Return the line of another library's error that says what is wrong, or its class where it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Exception from "):  # OpenVINO begins with the places
        return lines[-1]
    return " ".join(lines[: 1 + lines[0].endswith(":")])  # torch begins with a heading


def _shown(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
