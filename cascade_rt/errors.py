"""The errors of cascade-rt.

    CascadeError                everything that cascade-rt raises on purpose
    ├── BundleError             a bundle is missing, damaged, of a newer format, or does not fit together
    ├── InputError              what was passed cannot be used
    │   ├── InvalidOption       one parameter: `field`, `found`, `expected`
    │   └── TextError           one text among many: `index`, `reason`
    ├── InferenceError          a model failed while it ran, or memory ran out
    └── MissingExtraError       an optional dependency is not installed

A message says what was found, what was expected and what to do, in words that are right for a call and for a command.
Only `InvalidOption` names its parameter, which the command line replaces by its option. Errors of other libraries are
kept as `__cause__`.
"""

from __future__ import annotations


class CascadeError(Exception):
    """Base of every error that cascade-rt raises on purpose."""

    __notes__: list[str]
    """Remarks that the command line adds to the message (PEP 678); absent where there are none."""


class BundleError(CascadeError):
    """A bundle is missing, damaged, of a newer format, or does not fit together."""


class InputError(CascadeError):
    """Texts, files, columns, labels or parameters that cannot be used."""


class InvalidOption(InputError):
    """A parameter has a value that cannot be used.

    `field`: the parameter's name; `found`: its value; `expected`: what it may be, in words.
    """

    def __init__(self, field: str, found: object, expected: str) -> None:
        super().__init__(field, found, expected)  # errors are pickled by these
        self.field = field
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        return self.named(f"`{self.field}`")

    def named(self, name: str) -> str:
        """Return the message with another name for the parameter."""
        return f"{name}: found {_shown(self.found)}, expected {self.expected}"


class TextError(InputError):
    """One text among many cannot be used. `index`: its 0-based position; `reason`: what is wrong with it."""

    def __init__(self, index: int, reason: str, where: str | None = None) -> None:
        """Name the text by `index`, or by `where` when its file and line are known."""
        super().__init__(index, reason, where)
        self.index = index
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.where or f'text {self.index}'}: {self.reason}"


class InferenceError(CascadeError):
    """A model failed while it ran, answered NaN or infinity, or ran out of memory."""


class MissingExtraError(CascadeError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str, cause: ImportError) -> None:
        """Name what was asked for, the extra that provides it, and the import that failed."""
        super().__init__(what, extra, cause)
        self.what = what
        self.extra = extra
        self.cause = cause

    def __str__(self) -> str:
        return (
            f"{self.what} needs packages that are not installed ({self.cause}); "
            f"install them with: pip install 'cascade-rt[{self.extra}]'"
        )


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
