"""What a command is, and its argument parser: one-line errors, defaults shown once, option names for error messages."""

from __future__ import annotations

import argparse
from typing import NoReturn, Protocol

from ..errors import InputError


class Command(Protocol):
    """A module that is a command."""

    SUMMARY: str
    """What it does, in a few words."""
    EXAMPLE: str
    """One command line that a user can try."""

    def add_arguments(self, parser: CommandParser, /) -> None:
        """Add its options."""

    def run(self, options: argparse.Namespace, /) -> None:
        """Do it; raise CascadeError for what the user can correct."""


class CommandParser(argparse.ArgumentParser):
    """The argument parser of one command."""

    def __init__(self, name: str, command: Command) -> None:
        """Make the parser and let the command add its options."""
        super().__init__(
            prog=f"cascade-rt {name}",
            description=(command.__doc__ or command.SUMMARY).strip(),
            epilog=f"example: {command.EXAMPLE}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.aliases: dict[str, str] = {}
        """Library parameters that no option has as its `dest`, and how to name them in error messages."""
        command.add_arguments(self)

    def option_names(self) -> dict[str, str]:
        """Return the option for each parameter of the library, to name it in error messages."""
        names = {}
        for action in self._actions:
            long = [option for option in action.option_strings if option.startswith("--")]
            names[action.dest] = long[0] if long else str(action.metavar or action.dest)
        return names | self.aliases

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing the usage."""
        raise InputError(f"{message} (see: {self.prog} --help)")


class _Formatter(argparse.HelpFormatter):
    """Appends the default of an option to its help, if there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None or isinstance(default, bool) or default in ([], argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} (default: {shown})"
