"""The command `cascade-rt`.

A command is a module with SUMMARY, EXAMPLE, `add_arguments` and `run`. Those of the runtime are here; other
distributions, and our own offline stage, register theirs as entry points of the group `cascade_rt.commands`.

Answers go to standard output, progress and errors to standard error. Exit status: 0 on success, 2 on an error that
is reported in one line, 1 when the reader of standard output closes it, 130 when interrupted, 128 plus the number of
another signal that ended it.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

from .. import __version__
from ..errors import CascadeError, InputError, InvalidOption, first_line
from .parser import Command, CommandParser
from .rendering import printable
from .signals import Termination, termination
from .streams import forget_closed_output, standard_streams

BUILT_IN = ("predict", "serve", "info", "evaluate", "tune", "benchmark", "adapt", "push", "doctor")
GROUP = "cascade_rt.commands"
_HOME = "set the environment variables HOME, to a folder that can be written, and USER"
_ENVIRONMENT = {
    "can't start new thread": "raise the limit of processes and threads (ulimit -u), or end some",
    "Could not determine home directory": _HOME,
    "uid not found": _HOME,  # the caches of libraries
}
"""Remedies for errors of Python's own that the process's environment causes, by a part of their message."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    if argv is None:
        _decode_arguments()
        argv = sys.argv[1:]
    with standard_streams():
        return _main(list(argv))


def _main(argv: Sequence[str]) -> int:
    names: Mapping[str, str] = {}
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
        elif argv[0] == "--version":
            print(f"cascade-rt {__version__}")
        else:
            command = find_command(argv[0])
            parser = CommandParser(argv[0], command)
            names = parser.option_names()
            if options := _parsed(parser, argv[1:]):
                written = [getattr(options, dest) for dest in parser.outputs]
                if any(written) and "-" not in written:
                    forget_closed_output()
                with termination():
                    command.run(options)
        _flush()
    except CascadeError as error:
        message = error.named(names.get(error.field, error.field)) if isinstance(error, InvalidOption) else str(error)
        return _complain("; ".join([message, *getattr(error, "__notes__", ())]))
    except BrokenPipeError:  # the reader of our output has closed it
        _leave_output()
        return 1
    except OSError as error:
        return _complain(_reason(error))
    except (RuntimeError, KeyError) as error:
        remedy = next((remedy for words, remedy in _ENVIRONMENT.items() if words in str(error)), None)
        if remedy is None:
            raise
        return _complain(f"{first_line(error)}; {remedy}")
    except (KeyboardInterrupt, Termination) as stopped:
        return getattr(stopped, "status", 130)
    return 0


def _parsed(parser: CommandParser, argv: Sequence[str]) -> argparse.Namespace | None:
    """Return the options; None where help was asked for, and shown."""
    try:
        return parser.parse_args(argv)
    except SystemExit:
        return None


def _decode_arguments() -> None:
    """Begin again in Python's UTF-8 mode in a locale that has ASCII alone: arguments, names and files are UTF-8 then.

    Python takes UTF-8 there by itself, unless the environment forbids it.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _flush() -> None:
    """Write what is left of standard output: a full disk shows now, and not after the end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _leave_output() -> bool:
    """Return whether output is left that cannot be written; it goes nowhere, since Python tries again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _reason(error: OSError) -> str:
    """Return what failed, and why."""
    if error.errno == errno.ENOMEM:
        where = f" for {error.filename}" if error.filename else ""
        return f"out of memory{where}; free memory, raise this process's limit, or run fewer processes"
    where = "standard output" if _leave_output() else error.filename or _nameless()
    return f"{where}: {error.strerror or error}"


def _nameless() -> str:
    """Return where an error without a file's name came from."""
    try:
        Path.cwd()
    except OSError:
        return "the working directory"
    return "input or output"


def find_command(name: str) -> Command:
    """Return a command by name; raise InputError, with the nearest name, if there is none."""
    if name in BUILT_IN:  # without a look at the installed distributions, which takes time
        return importlib.import_module(f"{__name__}.{name}")
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name in found:
        try:
            command: Command = found[name].load()
        except Exception as error:  # another distribution's code
            raise CascadeError(f"the command {name!r} cannot be loaded ({first_line(error)})") from error
        return command
    close = get_close_matches(name, [*BUILT_IN, *found], n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of: {', '.join([*BUILT_IN, *sorted(found)])}"
    raise InputError(f"found no command {name!r}; {hint}")


def _overview() -> str:
    names = [*BUILT_IN, *sorted(point.name for point in entry_points(group=GROUP))]
    lines = [f"cascade-rt {__version__}: text classification with a cascade of BERTs, small to big", ""]
    lines += ["usage: cascade-rt COMMAND [OPTIONS]", "", "commands:"]
    for name in dict.fromkeys(names):
        try:
            command = find_command(name)
            lines += [f"  {name:<12}{command.SUMMARY}", f"  {'':<12}  {command.EXAMPLE}"]
        except CascadeError as error:
            lines.append(f"  {name:<12}{error}")
    return "\n".join([*lines, "", "cascade-rt COMMAND --help shows the options of a command."])


def _complain(message: str) -> int:
    print("cascade-rt: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2
