"""The errors that a user can mend: one clear line each (what was found, what was expected, the remedy)."""


class CascadeError(Exception):
    """Base of every error that cascade-rt raises on purpose; the CLI prints it as one line and exits with 2."""


class BundleError(CascadeError):
    """The bundle is missing, damaged, of a newer format, or does not fit together."""


class InputError(CascadeError):
    """Texts, files, columns, labels or options that cannot be used as given."""


class TextError(InputError):
    """One text among many that cannot be used; `index` is its place, `reason` what is wrong with it."""

    def __init__(self, index: int, reason: str, where: str | None = None) -> None:
        """Say `reason` of the text at `index`, or at `where` when a file and line are known."""
        super().__init__(f"{where or f'text {index}'}: {reason}")
        self.index = index
        self.reason = reason


class MissingExtraError(CascadeError):
    """An optional part of the distribution is not installed."""

    def __init__(self, what: str, extra: str, cause: ImportError) -> None:
        """Name what was asked for, the extra that brings it, and the import that failed."""
        super().__init__(
            f"{what} needs packages that are not installed ({cause}); "
            f"install them with: pip install 'cascade-rt[{extra}]'"
        )
