"""The interface of a command, and its argument parser.

Errors in one line, defaults shown once, option names for error messages; and what is true of every command: an option
has one value, and no output is an input.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ..errors import InputError
from ..io.apart import check_apart

Paths = Callable[[Any], Iterable[str | Path]]
"""The paths that one value of an option stands for."""


class Command(Protocol):
    """A module that is a command."""

    SUMMARY: str
    """Its purpose in a few words."""
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
        self.inputs: dict[str, Paths] = {}
        """By `dest`, the options for what is read."""
        self.outputs: dict[str, Paths] = {}
        """By `dest`, the options for what is written."""
        self.given: dict[str, Any] = {}
        """By `dest`, the options in the command line."""
        for spelled in (None, "store"):
            self.register("action", spelled, _Once)
        command.add_arguments(self)

    def reads(self, *dests: str, paths: Paths = lambda path: [path]) -> None:
        """Note which options name what is read: `parse_args` refuses an output there."""
        self.inputs |= dict.fromkeys(dests, paths)

    def writes(self, dest: str, *, paths: Paths = lambda path: [path]) -> None:
        """Note which option names what is written; `paths`: all that a value of it stands for."""
        self.outputs[dest] = paths

    def parse_args(  # type: ignore[override]  # into a namespace of its own
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Return the options; raise InputError where they cannot be, and for an output that is also an input."""
        self.given.clear()
        options, others = self.parse_known_args(args)
        if others:
            self.error(expanded(others) or f"unrecognized arguments: {' '.join(others)}")
        check_apart(self._paths(options, self.inputs), self._paths(options, self.outputs))
        return options

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

    def _paths(self, options: argparse.Namespace, declared: Mapping[str, Paths]) -> dict[str, list[str | Path]]:
        found: dict[str, list[str | Path]] = {}
        names = self.option_names()
        for dest, paths in declared.items():
            values = list(_listed(getattr(options, dest)))
            found[names[dest]] = [path for value in values for path in ([value] if value == "-" else paths(value))]
        return found


def expanded(arguments: Sequence[str]) -> str | None:
    """Return a message if arguments that no option takes are files, as when a shell has expanded a pattern."""
    file = next((argument for argument in arguments if os.path.isfile(argument)), None)  # noqa: PTH113 - texts too
    if file is None:
        return None
    return f"found a further file, {file}, where one is expected; put a pattern in quotes, or name a folder"


def _listed(value: Any) -> Iterator[Any]:
    """Yield the values of an option, which may have none, one or several."""
    if value is not None:
        yield from value if isinstance(value, list) else [value]


class _Once(argparse.Action):
    """Stores the value of an option, as argparse does by default; a second one, if it differs, is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store."""
        assert isinstance(parser, CommandParser), "others have no such actions"
        before = parser.given.setdefault(self.dest, values) if option_string else values
        if before is not values and before != values:
            first, second = (" ".join(map(str, _listed(value))) for value in (before, values))
            several = "; for several files name a folder, or a pattern in quotes" if self.dest == "input" else ""
            parser.error(f"found {option_string} {first} and {option_string} {second}, expected it once{several}")
        setattr(namespace, self.dest, values)


class _Formatter(argparse.HelpFormatter):
    """Appends the default of an option to its help, if there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if default is None or isinstance(default, bool) or default in ("", [], argparse.SUPPRESS):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        return f"{text} (default: {shown})"
